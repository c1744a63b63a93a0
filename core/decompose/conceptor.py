"""Conceptor: weights as a small network's function of the word embeddings, trained to denoise generated images of the concept.

Source: Chefer et al., "The Hidden Language of Diffusion Models", ICLR 2024 (arXiv 2306.00966), with the settings of the released code.
As there: the network, both losses, the optimiser, all numbers, images re-encoded from 8 bits and mirrored, the target that the model
itself was trained on (noise or velocity), the dictionary's filter with its 27 prompts, and the choice among ten validations by image
similarity.

What differs, and why:

- The words to choose from are the caller's (by default the 1,000 nearest to the concept); the filter by image similarity works on
  those, and only where they are more than 5,000. Encoding the whole vocabulary in 27 prompts takes longer than the training.
- The result holds as many words as were asked for, where the published one holds 50 (ask for 50 to get it).
- The validated vector is the trained one, rescaled as in training: the released code validates it unscaled.
- Training and validation images come from one sampler (DPM++ 2M): the released code compares images of two samplers pair by pair.
- Every random number comes from the seed: the released training is unseeded.
- Words are encoded as text, without their end-of-word marker, which the released filter leaves in.
- Images are encoded once, to the mode of the posterior: the autoencoder's interface offers no samples, whose spread is far below the
  noise that is added. Minibatches are sampled with replacement: 3,000 of 10,000 repeats of 100 images are nearly that.
- Any width and number of text encoders works: the released network is 1024 wide.
- Without an autoencoder (selection by R2) the sampled latents are trained on as they are, and flipped instead of the images.

``Settings.refit`` is not part of the published method: the words that are left are fitted once more, by the same loss and validation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear, normalize

from ..artifact import Header, Spec
from ..gradient import vjp
from ..model import Conditioning, NonFinite, UnsupportedModel
from ..sampling import draw, initial_noise, sample, schedule
from .decomposition import Decomposition, mix
from .fidelity import explained, measure, picture_seeds, sampled_states
from .mixture import Mixture, SimplexDescent, top_k
from .states import States, distances
from .task import Tally, Task

_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's own names for its running means
_AT_ONCE = 10
"""Images in memory at once, as published."""

PROMPTS = (
    *("a photo of a {}", "a rendering of a {}", "a cropped photo of the {}"),
    *("the photo of a {}", "a photo of a clean {}", "a photo of a dirty {}"),
    *("a dark photo of the {}", "a photo of my {}", "a photo of the cool {}"),
    *("a close-up photo of a {}", "a bright photo of the {}", "a cropped photo of a {}"),
    *("a photo of the {}", "a good photo of the {}", "a photo of one {}"),
    *("a close-up photo of the {}", "a rendition of the {}", "a photo of the clean {}"),
    *("a rendition of a {}", "a photo of a nice {}", "a good photo of a {}"),
    *("a photo of the nice {}", "a photo of the small {}", "a photo of the weird {}"),
    *("a photo of the large {}", "a photo of a cool {}", "a photo of a small {}"),
)
"""The 27 prompts that the released filter averages a word's text embedding over."""


@dataclass(frozen=True)
class Settings:
    """The published numbers.

    pictures, references: images to train on and to compare with, in ``sampler_steps`` steps at ``guidance``. steps, batch, rate: of the
    training; hidden: the network's width; sparsity: the weight of its second loss; kept: how many words make the explanation while
    training; every: steps between validations. dictionary: words left by the image filter, where a scorer and more words are there.
    heldout, measured_steps: images and steps that the result is measured on. judged: reference states for validations by R2.
    refit, refit_rate: steps of the same batch, and their rate, in which the weights of the words left at the end are fitted alone. They
    are taken where one more validation finds them the best of all. 0 leaves the weights as they are, as published.
    """

    pictures: int = 100
    references: int = 20
    sampler_steps: int = 50
    guidance: float = 7.5
    steps: int = 500
    batch: int = 6
    rate: float = 1e-3
    hidden: int = 100
    sparsity: float = 1e-3
    kept: int = 50
    every: int = 50
    dictionary: int = 5000
    heldout: int = 2
    measured_steps: int = 12
    judged: int = 40
    refit: int = 0
    refit_rate: float = 0.01


BUDGETS: Mapping[str, Settings] = MappingProxyType(
    {
        "fast": Settings(pictures=20, references=6, sampler_steps=20, steps=250, every=50),
        "default": Settings(),
        "thorough": Settings(steps=1500, every=150),
    }
)
"""What may be spent, by name; "default" is the published budget of about 41,000 evals.

The published dictionary, too, takes ``decompose_concept(..., limit=n)`` with n far above 5,000: the picture filter then leaves 5,000.
"""


def decompose_conceptor(task: Task) -> Decomposition:
    """Take the task's concept apart by the published recipe.

    ``task.select``: "scorer" compares validation pictures with the concept's own by the model's image scorer, as published; "r2" takes
    the validation with the highest R2 at the states of the concept's references instead, and needs neither scorer nor autoencoder.
    Raises UnsupportedModel when the scorer or autoencoder that "scorer" needs is missing; ArtifactError for a checkpoint of another run.
    """
    options = task.choose(BUDGETS)
    if task.select == "scorer":
        missing = [name for name, part in (("scorer", task.model.scorer), ("autoencoder (VAE)", task.model.autoencoder)) if part is None]
        if missing:
            raise UnsupportedModel(
                f"the conceptor method chooses its result by an image scorer, and there is no {' and no '.join(missing)}: "
                'connect one, or select by "r2" instead, which needs neither'
            )
    elif task.select != "r2":
        raise ValueError(f"unknown selection {task.select!r}: choose scorer or r2")
    return _Run(task, options).run()


class Network:
    """alpha = |W2 relu(W1 w + b1) + b2|, from word embeddings (words, width) to weights (words,); ``parameters`` are its four tensors.

    Positive by absolute value, as in the released code: the paper's second ReLU can leave no word at all.
    """

    def __init__(self, width: int, hidden: int, generator: torch.Generator, device: torch.device) -> None:
        def uniform(fan_in: int, *shape: int) -> Tensor:
            draw = (torch.rand(*shape, generator=generator) * 2 - 1) / fan_in**0.5
            return draw.to(device).requires_grad_()

        self.parameters = [uniform(width, hidden, width), uniform(width, hidden), uniform(hidden, 1, hidden), uniform(hidden, 1)]

    def __call__(self, embeddings: Tensor) -> Tensor:
        first, first_bias, second, second_bias = self.parameters
        return linear(linear(embeddings, first, first_bias).relu(), second, second_bias)[:, 0].abs()


class _Run:
    """One decomposition under way."""

    mixture: Mixture
    latents: Tensor
    seen: Tensor
    references: Tensor | States
    best: Tensor
    step: int = 0

    def __init__(self, task: Task, options: Settings) -> None:
        self.task, self.options, self.model = task, options, task.model
        self.generator = torch.Generator().manual_seed(task.seed)
        self.seeds = picture_seeds(self.generator, options.pictures)
        self.reference_seeds = picture_seeds(self.generator, options.references)
        self.heldout_seeds = picture_seeds(self.generator, options.heldout)
        self.scores: list[float] = []
        self.denoiser = task.model.require_denoiser()
        self.device = self.denoiser.device
        width = sum(table.shape[1] for table in task.model.text.tables.values())
        self.network = Network(width, options.hidden, self.generator, self.device)
        self.optimizer = torch.optim.AdamW(self.network.parameters, lr=options.rate, weight_decay=1e-2)
        self.checkpoint = task.resumable("conceptkit-conceptor-run", 2, options, {}, {"select": task.select})
        self.tally = Tally(task, self._planned())

    def _planned(self) -> int:
        options, pictures = self.options, self.task.select == "scorer"
        guided = options.sampler_steps * (1 if options.guidance == 1 else 2)
        references = options.references * (guided if pictures else 2 * options.sampler_steps)
        validation = options.references * guided if pictures else options.judged
        measured = options.heldout * options.measured_steps * (4 + min(self.task.max_words, len(self.task.pool)))
        trained = 3 * options.batch * (options.steps + options.refit)
        trained += (math.ceil(options.steps / options.every) + (options.refit > 0)) * validation
        return options.pictures * guided + references + trained + measured

    def run(self) -> Decomposition:
        options, task = self.options, self.task
        # What the concept itself looks like, to train on and to compare with.
        if not self._resumed():
            self.latents, self.seen = self._pictures()
            self.references = self._compared_with()
            self.best = torch.zeros(0)
        self.mixture = self._filtered(Mixture.of(self.model, task.template, task.pool))
        # Train, and validate now and then: the best validation is kept.
        features = torch.cat([rows.float().to(self.device) for rows in self.mixture.embeddings.values()], dim=1)
        while self.step < options.steps:
            if self.step % options.every == 0:
                self._save()
            self._train(features)
            self.step += 1
            if self.step % options.every == 0 or self.step == options.steps:
                with torch.no_grad():
                    alpha = self.network(features).cpu()
                score = self._validate(self.mixture.encode(top_k(alpha, options.kept)[None]))
                if score > max(self.scores, default=-math.inf):
                    self.best = alpha
                self.scores.append(score)
        if options.refit:
            self._save()
        found = self._result()
        self.checkpoint.discard()
        return found

    @torch.no_grad()
    def _drawn(self, conditioning: Conditioning, seeds: Sequence[int]) -> Iterator[Tensor]:
        """Images (at most 10, 3, height, width) in [0, 1] as 8-bit files hold them, CPU, under a batch-1 conditioning."""
        task, side = self.task, self.denoiser.downscale
        for start in range(0, len(seeds), _AT_ONCE):
            images = draw(
                self.model,
                conditioning,
                task.empty,
                seeds[start : start + _AT_ONCE],
                height=task.height * side,
                width=task.width * side,
                steps=self.options.sampler_steps,
                guidance=self.options.guidance,
                on_step=self._told,
            )
            yield (images * 255).round() / 255

    def _told(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self.tally.report()

    @torch.no_grad()
    def _embedded(self, images: Iterable[Tensor]) -> Tensor:
        """Unit vectors (n, width), CPU, of batches of images."""
        assert self.model.scorer is not None
        return torch.cat([self.model.scorer.embed_pictures(batch.to(self.device)).float().cpu() for batch in images])

    @torch.no_grad()
    def _pictures(self) -> tuple[Tensor, Tensor]:
        """Latents to train on, then of their mirror images, (2 * pictures, channels, h, w), and the images' mean embedding (width,), CPU.

        Without an autoencoder, flipped latents; without a scorer, no embedding: (0,).
        """
        task, options, (autoencoder, scorer) = self.task, self.options, (self.model.autoencoder, self.model.scorer)
        if autoencoder is None:
            noise = initial_noise(self.seeds, self.denoiser.latent_channels, task.height, task.width)
            levels, guidance = schedule(self.denoiser, options.sampler_steps), options.guidance
            parts = noise.split(_AT_ONCE)
            sampled = [sample(self.model, task.teacher, task.empty, part, levels, guidance=guidance, on_step=self._told) for part in parts]
            latents = torch.cat(sampled).cpu()
            return torch.cat([latents, latents.flip(-1)]), torch.zeros(0)
        found: tuple[list[Tensor], list[Tensor]] = [], []
        seen = []
        for images in self._drawn(task.teacher, self.seeds):
            for rows, batch in zip(found, (images, images.flip(-1)), strict=True):
                rows += [autoencoder.encode(image[None].to(self.device)).float().cpu() for image in batch]
            if scorer is not None:
                seen.append(self._embedded([images]))
        return torch.cat([*found[0], *found[1]]), torch.cat(seen).mean(0) if seen else torch.zeros(0)

    def _compared_with(self) -> Tensor | States:
        """What validations compare with: embeddings of the concept's own pictures, or states of their sampling."""
        options = self.options
        if self.task.select == "scorer":
            return self._embedded(self._drawn(self.task.teacher, self.reference_seeds))
        states = sampled_states(self.task, self.reference_seeds, options.sampler_steps, options.guidance, self.tally.report)
        chosen = torch.linspace(0, len(states) - 1, min(options.judged, len(states))).round().long()
        return states[chosen.to(states.x.device)]

    @torch.no_grad()
    def _filtered(self, mixture: Mixture) -> Mixture:
        """The words whose texts are nearest to the mean training image, where there are more than ``dictionary`` and a scorer."""
        scorer, count = self.model.scorer, self.options.dictionary
        if len(mixture) <= count or scorer is None or not len(self.seen):
            return mixture
        cosines = []
        for start in range(0, len(mixture), 64):
            words = mixture.words[start : start + 64]
            texts = torch.stack([scorer.embed_texts([prompt.replace("{}", word) for word in words]).float().cpu() for prompt in PROMPTS])
            cosines.append(normalize(texts.mean(0), dim=1) @ self.seen)
        return mixture.choose(torch.cat(cosines).topk(count).indices.sort().values)

    def _train(self, features: Tensor) -> None:
        """One step on the model's own target plus sparsity * (1 - cos(w*, w*_N)), w* summing the ``kept`` strongest words alone."""
        options, missed = self.options, self._minibatch(self.mixture)

        def loss(rows: slice) -> Tensor:
            alpha = self.network(features)
            whole, top = (
                mix(self.mixture.embeddings, self.mixture.norms, weights[None]) for weights in (alpha, top_k(alpha, options.kept))
            )
            alike = torch.stack([cosine_similarity(whole[name].flatten(), top[name].flatten(), dim=0).cpu() for name in whole]).mean()
            return missed(alpha, rows) + options.sparsity * (1 - alike).to(self.device)

        for parameter, gradient in zip(self.network.parameters, self._gradients(loss, self.network.parameters), strict=True):
            parameter.grad = gradient
        self.optimizer.step()

    def _refitted(self, mixture: Mixture, alpha: Tensor) -> Tensor:
        """alpha (words,) after ``refit`` steps of descent on the model's own target, without the network."""
        descent = SimplexDescent(alpha, self.options.refit, self.options.refit_rate)
        for _ in range(self.options.refit):
            weights = descent.alpha.requires_grad_()
            descent.step(self._gradients(partial(self._minibatch(mixture), weights), [weights])[0])
        return descent.alpha.detach()

    def _minibatch(self, mixture: Mixture) -> Callable[[Tensor, slice], Tensor]:
        """What alpha misses of some rows of a fresh minibatch: images, noise levels and noise from the generator."""
        sigmas, batch = self.denoiser.training_sigmas, self.options.batch
        x0 = self.latents[torch.randint(len(self.latents), (batch,), generator=self.generator)]
        sigma = sigmas[torch.randint(len(sigmas), (batch,), generator=self.generator)]
        noise = torch.randn(x0.shape, generator=self.generator)
        x0, sigma, noise = (tensor.to(self.device) for tensor in (x0, sigma, noise))

        def missed(alpha: Tensor, rows: slice) -> Tensor:
            x = x0[rows] + sigma[rows].view(-1, 1, 1, 1) * noise[rows]
            denoised = self.model.denoise(x, sigma[rows], mixture.encode(alpha[None]))
            return target_loss(denoised, x0[rows], sigma[rows], velocity=self.model.predicts_velocity)

        return missed

    def _gradients(self, loss: Callable[[slice], Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Of the mean ``loss`` of a minibatch's rows."""
        batch = self.options.batch
        values, gradients = vjp(lambda rows: loss(rows) * ((rows.stop - rows.start) / batch), inputs, batch)
        self.tally.report({"loss": float(values.sum())})
        return gradients

    @torch.no_grad()
    def _validate(self, conditioning: Conditioning) -> float:
        """How near words come to the concept: mean cosine of same-seed images, or R2."""
        if isinstance(self.references, States):
            score = explained(distances(self.model, self.references, conditioning), self.references)
            self.tally.report({"r2": score})
        else:
            score = float((self._embedded(self._drawn(conditioning, self.reference_seeds)) * self.references).sum(1).mean())
            self.tally.report({"similarity": score})
        if not math.isfinite(score):
            raise NonFinite("a validation is NaN or infinite: check the autoencoder, the scorer and their precision")
        return score

    @torch.no_grad()
    def _result(self) -> Decomposition:
        options, task = self.options, self.task
        chosen, alpha = _sorted(self.mixture, top_k(self.best, task.max_words))
        best = max(range(len(self.scores)), key=self.scores.__getitem__)
        score, when = self.scores[best], f"at step {min((best + 1) * options.every, options.steps)}"
        if options.refit:
            fitted = self._refitted(chosen, alpha)
            again = self._validate(chosen.encode(fitted[None]))
            if again > score:
                score, when = again, "after fitting the words left"
                chosen, alpha = _sorted(chosen, fitted)
        states = sampled_states(task, self.heldout_seeds, options.measured_steps, options.guidance, self.tally.report)
        fidelity, importance = measure(chosen, alpha, states, self.tally.report)
        whole = explained(distances(self.model, states, self.mixture.encode(self.best[None])), states)
        how = "picture similarity by the image scorer" if task.select == "scorer" else "R2, not by the published picture similarity"
        self.tally.finish({"r2": fidelity.heldout})
        return Decomposition(
            concept=task.name,
            template=chosen.template,
            words=chosen.words,
            ids=chosen.ids,
            alpha=alpha,
            importance=importance,
            fidelity=replace(fidelity, every_word=whole),
            embeddings=chosen.embeddings,
            norms=chosen.norms,
            method="conceptor",
            seed=task.seed,
            seeds=tuple(self.seeds),
            heldout_seeds=tuple(self.heldout_seeds),
            settings={name: float(value) for name, value in vars(options).items()},
            candidates=len(self.mixture),
            restarts=(),
            evals=self.tally.evals,
            calls=self.tally.calls,
            model=self.model.name,
            selected=f"{how}: {score:.3f} {when}, the best of {len(self.scores) + (options.refit > 0)} validations",
        )

    def _save(self) -> None:
        against = vars(self.references) if isinstance(self.references, States) else {"pictures": self.references}
        tensors = {"latents": self.latents, "seen": self.seen, "best": self.best, "generator": self.generator.get_state()}
        tensors |= {f"references.{name}": tensor for name, tensor in against.items()}
        for index, parameter in enumerate(self.network.parameters):
            state = self.optimizer.state[parameter]
            tensors[f"network.{index}"] = parameter
            tensors |= {f"{name}.{index}": state.get(name, torch.zeros_like(parameter)) for name in _MOMENTS}
        self.checkpoint.save(tensors, {"step": self.step, "scores": self.scores, "evals": self.tally.evals, "calls": self.tally.calls})

    def _resumed(self) -> bool:
        """Whether there was a stopped run; if so, this one stands where it stopped."""
        stopped = self.checkpoint.load(self._layout)
        if stopped is None:
            return False
        tensors, header = stopped
        self.step, self.scores = int(header["step"]), [float(score) for score in header["scores"]]
        self.latents, self.seen, self.best = tensors["latents"], tensors["seen"], tensors["best"]
        self.generator.set_state(tensors["generator"])
        against = {name.removeprefix("references."): t for name, t in tensors.items() if name.startswith("references.")}
        pictures = against.get("pictures")
        self.references = States(**{n: t.to(self.device) for n, t in against.items()}) if pictures is None else pictures
        for index, parameter in enumerate(self.network.parameters):
            parameter.data.copy_(tensors[f"network.{index}"])
            moments = {name: tensors[f"{name}.{index}"].to(self.device) for name in _MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}
        self.tally = Tally(self.task, self._planned(), int(header["evals"]), int(header["calls"]))
        return True

    def _layout(self, header: Header) -> dict[str, Spec]:
        real, images = torch.float32, (2 * self.options.pictures, None, self.task.height, self.task.width)
        found: dict[str, Spec] = {"latents": (real, images), "seen": (real, (None,)), "best": (real, (None,))}
        found["generator"] = (torch.uint8, tuple(self.generator.get_state().shape))
        for index, parameter in enumerate(self.network.parameters):
            found |= {f"{name}.{index}": (real, tuple(parameter.shape)) for name in ("network", *_MOMENTS)}
        if self.task.select == "scorer":
            return found | {"references.pictures": (real, (self.options.references, None))}
        return found | States.layout("references.", self.task.height, self.task.width)


def target_loss(denoised: Tensor, x0: Tensor, sigma: Tensor, *, velocity: bool) -> Tensor:
    """Mean squared error of the network's own output, from its estimate of x0 (batch, ...) at sigma (batch,).

    The noise is missed by (x0 - denoised) / sigma, the velocity (Salimans and Ho, arXiv 2202.00512) by sqrt(1 + sigma^2) times that.
    """
    scale = sigma.view(-1, *[1] * (x0.ndim - 1))
    missed = ((x0 - denoised) / scale).square()
    return (missed * (1 + scale.square()) if velocity else missed).mean()


def _sorted(mixture: Mixture, alpha: Tensor) -> tuple[Mixture, Tensor]:
    """The words that carry weight, the strongest first."""
    order = alpha.argsort(descending=True, stable=True)[: int((alpha > 0).sum())]
    return mixture.choose(order), alpha[order]
