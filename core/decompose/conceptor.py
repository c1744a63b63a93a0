"""Conceptor: weights as a small network's function of the word embeddings, trained to denoise sampled pictures of the concept.

Source: Chefer et al., "The Hidden Language of Diffusion Models", ICLR 2024 (arXiv 2306.00966), with the settings of the released code.
Kept: the network, both losses, the optimiser, the numbers, and the choice among ten validations by picture similarity. Not kept, because
they are slips of that code: validation scores the very vector that is trained (normalised) on the sampler that made the references;
every random number comes from the seed; words are embedded without their end marker; any width and number of text encoders works; and
pictures are encoded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear

from ..artifact import ArtifactError, Header, Spec, content_hash, discard, read, write_spare
from ..model import Conditioning, NonFinite, OutOfMemory, UnsupportedModel
from ..sampling import initial_noise, sample, schedule
from .fidelity import explained, measure, picture_seeds, sampled_states
from .mixture import Mixture
from .result import Decomposition, mix
from .states import States, distances
from .task import Tally, Task

_CHECKPOINT = "conceptkit-conceptor-run"
_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's own names for its running means


@dataclass(frozen=True)
class Settings:
    """The published numbers.

    pictures, references: sampled to train on and to compare with, in ``sampler_steps`` steps at ``guidance``. steps, batch, rate: of the
    training; hidden: the network's width; sparsity: the weight of its second loss; kept: how many words make the explanation while
    training; every: steps between validations. dictionary: words left by the picture filter, where a scorer and more words are there.
    heldout, measured_steps: pictures and steps that the result is measured on. judged: reference states for validations by R2.
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

    def __call__(self, words: Tensor) -> Tensor:
        first, first_bias, second, second_bias = self.parameters
        return linear(linear(words, first, first_bias).relu(), second, second_bias)[:, 0].abs()


class _Run:
    """One decomposition under way."""

    mixture: Mixture
    latents: Tensor
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
        self.device = task.model.denoiser.device
        width = sum(table.shape[1] for table in task.model.text.tables.values())
        self.network = Network(width, options.hidden, self.generator, self.device)
        self.optimizer = torch.optim.AdamW(self.network.parameters, lr=options.rate, weight_decay=1e-2)
        self.tally = Tally(task, self._planned())

    def _planned(self) -> int:
        options, pictures = self.options, self.task.select == "scorer"
        guided = options.sampler_steps * (1 if options.guidance == 1 else 2)
        references = options.references * (guided if pictures else 2 * options.sampler_steps)
        validation = options.references * guided if pictures else options.judged
        measured = options.heldout * options.measured_steps * (4 + min(self.task.words, len(self.task.pool)))
        trained = 3 * options.batch * options.steps + math.ceil(options.steps / options.every) * validation
        return options.pictures * guided + references + trained + measured

    def run(self) -> Decomposition:
        options, task = self.options, self.task
        if task.checkpoint is not None and task.checkpoint.exists():
            self._resume(task.checkpoint)
        else:
            self.latents, self.references = self._pictures(), self._compared_with()
            self.best = torch.zeros(0)
        self.mixture = self._filtered(Mixture.of(self.model, task.template, task.pool))
        features = torch.cat([rows.float().to(self.device) for rows in self.mixture.embeddings.values()], dim=1)
        while self.step < options.steps:
            if self.step % options.every == 0:
                self._save()
            self._train(features)
            self.step += 1
            if self.step % options.every == 0 or self.step == options.steps:
                with torch.no_grad():
                    alpha = self.network(features).cpu()
                score = self._validate(strongest(alpha, options.kept))
                if score > max(self.scores, default=-math.inf):
                    self.best = alpha
                self.scores.append(score)
        found = self._result()
        if task.checkpoint is not None:
            discard(task.checkpoint)
        return found

    def _sampled(self, conditioning: Conditioning, seeds: list[int], at_once: int = 10) -> Tensor:
        """Latents (len(seeds), channels, h, w), CPU, of pictures sampled under a batch-1 conditioning."""
        task, denoiser = self.task, self.model.denoiser
        sigmas = schedule(denoiser, self.options.sampler_steps)
        found = []
        for start in range(0, len(seeds), at_once):
            noise = initial_noise(seeds[start : start + at_once], denoiser.latent_channels, task.height, task.width)
            with torch.no_grad():
                latents = sample(
                    self.model,
                    conditioning,
                    task.empty,
                    noise,
                    sigmas,
                    guidance=self.options.guidance,
                    on_step=lambda step, total, metrics: self.tally.report(),
                )
            found.append(latents.cpu())
        return torch.cat(found)

    @torch.no_grad()
    def _decoded(self, latents: Tensor) -> Iterator[Tensor]:
        """Pictures (1, 3, height, width) in [0, 1], one by one."""
        assert self.model.autoencoder is not None
        for row in latents:
            yield self.model.autoencoder.decode(row[None].to(self.device)).clamp(0, 1)

    @torch.no_grad()
    def _embedded(self, latents: Tensor) -> Tensor:
        """Unit vectors (n, width), CPU, of decoded pictures."""
        assert self.model.scorer is not None
        return torch.cat([self.model.scorer.embed_pictures(picture).float().cpu() for picture in self._decoded(latents)])

    @torch.no_grad()
    def _pictures(self) -> Tensor:
        """Latents to train on, then of their mirror images, (2 * pictures, channels, h, w), CPU."""
        latents = self._sampled(self.task.teacher, self.seeds)
        if self.model.autoencoder is None:
            return torch.cat([latents, latents.flip(-1)])
        mirrored = [self.model.autoencoder.encode(picture.flip(-1)).float().cpu() for picture in self._decoded(latents)]
        return torch.cat([latents, *mirrored])

    def _compared_with(self) -> Tensor | States:
        """What validations compare with: embeddings of the concept's own pictures, or states of their sampling."""
        options = self.options
        if self.task.select == "scorer":
            return self._embedded(self._sampled(self.task.teacher, self.reference_seeds))
        states = sampled_states(self.task, self.reference_seeds, options.sampler_steps, options.guidance, self.tally.report)
        chosen = torch.linspace(0, len(states) - 1, min(options.judged, len(states))).round().long()
        return states[chosen.to(states.x.device)]

    @torch.no_grad()
    def _filtered(self, mixture: Mixture) -> Mixture:
        """The words whose texts are nearest to the mean training picture, where there are more than ``dictionary`` and a scorer."""
        scorer, count = self.model.scorer, self.options.dictionary
        if len(mixture) <= count or scorer is None or self.model.autoencoder is None:
            return mixture
        mean = self._embedded(self.latents[: self.options.pictures]).mean(0)
        texts = [self.task.template.replace("{}", word) for word in mixture.words]
        cosines = torch.cat([scorer.embed_texts(texts[i : i + 64]).float().cpu() @ mean for i in range(0, len(texts), 64)])
        return mixture.choose(cosines.topk(count).indices.sort().values)

    def _train(self, features: Tensor) -> None:
        """One step on the noise target, plus sparsity * (1 - cos(w*, w*_N)), w* being the sum of the ``kept`` strongest words alone."""
        options, training_sigmas = self.options, self.model.denoiser.training_sigmas
        x0 = self.latents[torch.randint(len(self.latents), (options.batch,), generator=self.generator)]
        sigma = training_sigmas[torch.randint(len(training_sigmas), (options.batch,), generator=self.generator)].to(self.device)
        noise = torch.randn(x0.shape, generator=self.generator).to(self.device)
        spread = sigma.view(-1, 1, 1, 1)
        x = x0.to(self.device) + spread * noise
        try:
            with torch.enable_grad():
                alpha = self.network(features)
                predicted = (x - self.model.denoise(x, sigma, self.mixture.encode(alpha[None]))) / spread
                whole, top = (
                    mix(self.mixture.embeddings, self.mixture.norms, weights[None]) for weights in (alpha, strongest(alpha, options.kept))
                )
                alike = torch.stack([cosine_similarity(whole[name].flatten(), top[name].flatten(), dim=0).cpu() for name in whole]).mean()
                loss = (predicted - noise).square().mean() + options.sparsity * (1 - alike).to(self.device)
            gradients = torch.autograd.grad(loss, self.network.parameters)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"training on {options.batch} pictures at once does not fit in memory: use smaller pictures, or free memory first"
            ) from error
        for parameter, gradient in zip(self.network.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.tally.report({"loss": float(loss.detach())})

    @torch.no_grad()
    def _validate(self, alpha: Tensor) -> float:
        """How near the words come to the concept: mean cosine of same-seed pictures, or R2."""
        conditioning = self.mixture.encode(alpha[None])
        if isinstance(self.references, States):
            score = explained(distances(self.model, self.references, conditioning), self.references)
            self.tally.report({"r2": score})
        else:
            score = float((self._embedded(self._sampled(conditioning, self.reference_seeds)) * self.references).sum(1).mean())
            self.tally.report({"similarity": score})
        if not math.isfinite(score):
            raise NonFinite("a validation is NaN or infinite: check the autoencoder, the scorer and their precision")
        return score

    @torch.no_grad()
    def _result(self) -> Decomposition:
        options, task = self.options, self.task
        alpha = strongest(self.best, task.words)
        order = alpha.argsort(descending=True, stable=True)[: int((alpha > 0).sum())]
        chosen, alpha = self.mixture.choose(order), alpha[order]
        states = sampled_states(task, self.heldout_seeds, options.measured_steps, options.guidance, self.tally.report)
        fidelity, importance = measure(chosen, alpha, states, self.tally.report)
        whole = explained(distances(self.model, states, self.mixture.encode(self.best[None])), states)
        best = max(range(len(self.scores)), key=self.scores.__getitem__)
        how = "picture similarity by the image scorer" if task.select == "scorer" else "R2, not by the published picture similarity"
        step = min((best + 1) * options.every, options.steps)
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
            attempts=(),
            evals=self.tally.evals,
            calls=self.tally.calls,
            model=self.model.name,
            selected=f"{how}: {self.scores[best]:.3f} at step {step}, the best of {len(self.scores)} validations",
        )

    def _key(self) -> str:
        """Of what a checkpoint must have been made from to be continued."""
        task = self.task
        asked = {
            "model": task.model.name,
            "template": task.template,
            "pool": list(task.pool),
            "seed": task.seed,
            "size": [task.height, task.width],
            "select": task.select,
            "settings": vars(self.options),
        }
        return content_hash({"teacher": task.teacher.context, "empty": task.empty.context}, asked)

    def _save(self) -> None:
        if self.task.checkpoint is None:
            return
        against = vars(self.references) if isinstance(self.references, States) else {"pictures": self.references}
        tensors = {"latents": self.latents, "best": self.best, "generator": self.generator.get_state()}
        tensors |= {f"references.{name}": tensor for name, tensor in against.items()}
        for index, parameter in enumerate(self.network.parameters):
            state = self.optimizer.state[parameter]
            tensors[f"network.{index}"] = parameter
            tensors |= {f"{name}.{index}": state.get(name, torch.zeros_like(parameter)) for name in _MOMENTS}
        header = {"step": self.step, "scores": self.scores, "evals": self.tally.evals, "calls": self.tally.calls}
        identity = {"format": _CHECKPOINT, "version": 1, "key": self._key()}
        write_spare(self.task.checkpoint, tensors, {**header, **identity})

    def _resume(self, path: Path) -> None:
        """Continue where ``path`` says a run stopped. Raises ArtifactError when it cannot be read or is another run's."""
        tensors, header = read(path, _CHECKPOINT, 1, self._layout)
        if header["key"] != self._key():
            raise ArtifactError(f"{path} belongs to a run with other inputs: delete it, or give this run another checkpoint")
        self.step, self.scores = int(header["step"]), [float(score) for score in header["scores"]]
        self.latents, self.best = tensors["latents"], tensors["best"]
        self.generator.set_state(tensors["generator"])
        against = {name.removeprefix("references."): t for name, t in tensors.items() if name.startswith("references.")}
        pictures = against.get("pictures")
        self.references = States(**{n: t.to(self.device) for n, t in against.items()}) if pictures is None else pictures
        for index, parameter in enumerate(self.network.parameters):
            parameter.data.copy_(tensors[f"network.{index}"])
            moments = {name: tensors[f"{name}.{index}"].to(self.device) for name in _MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}
        self.tally = Tally(self.task, self._planned(), int(header["evals"]), int(header["calls"]))

    def _layout(self, header: Header) -> dict[str, Spec]:
        cells = (None, self.task.height, self.task.width)
        real, rows = torch.float32, 2 * self.options.pictures
        found: dict[str, Spec] = {"latents": (real, (rows, *cells)), "best": (real, (None,))}
        found["generator"] = (torch.uint8, tuple(self.generator.get_state().shape))
        for index, parameter in enumerate(self.network.parameters):
            found |= {f"{name}.{index}": (real, tuple(parameter.shape)) for name in ("network", *_MOMENTS)}
        if self.task.select == "scorer":
            return found | {"references.pictures": (real, (self.options.references, None))}
        states: dict[str, Spec] = {f"references.{name}": (real, (None, *cells)) for name in ("x", "teacher", "empty")}
        return found | states | {"references.sigma": (real, (None,)), "references.picture": (torch.int64, (None,))}


def strongest(alpha: Tensor, count: int) -> Tensor:
    """alpha without all but its largest ``count`` entries, summing to 1; differentiable."""
    kept = torch.zeros_like(alpha)
    kept[alpha.detach().topk(min(count, len(alpha))).indices] = 1
    return alpha * kept / (alpha * kept).sum()
