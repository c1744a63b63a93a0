"""Training the demo model: pairs, then autoencoder and diffusion (independent of each other), then the scorer; each stage resumable.

``python -m conceptkit.core.demo.train STAGE --runs DIR``, stages in order: ``pairs``, ``autoencoder``, ``diffusion``, ``scorer``,
``export``. Every stage writes a checkpoint every few minutes and continues from it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from numpy.typing import NDArray
from torch import Tensor, nn

from ..hosts.scorer import READ_SIDE
from . import architecture, render
from .latent import latent_code
from .world import Caption, World, second_world, shapes_world

log = logging.getLogger("conceptkit.demo")

TOKEN_NORM = 1.0
"""Every token embedding has this length, so that mixtures renormalised to it stay where the encoder was trained."""
MAX_MIX = 6
OFFSET_NOISE = 0.25
"""Noise added to a whole channel at once. SD's schedule ends at a signal level of 0.068, where white noise of 16 x 16 cells still lets a
picture's mean colour through; a model trained on it reads the background off the noise instead of the prompt (Guttenberg 2023)."""
SHARD = 4096
WORLDS: Mapping[str, Callable[[], World]] = {"shapes": shapes_world, "second": second_world}


@dataclass(frozen=True)
class Tokens:
    """Captions as compact ids: the world's tokens, then start and end; mixtures as word lists with weights at one position.

    ids: (n, 77). at: (n,) position of the mixture or -1. words, weights: (n, MAX_MIX), weights 0 where unused.
    """

    ids: Tensor
    at: Tensor
    words: Tensor
    weights: Tensor

    def __getitem__(self, index: Tensor | slice) -> Tokens:
        return Tokens(self.ids[index], self.at[index], self.words[index], self.weights[index])


def tokenize(world: World, captions: list[Caption]) -> Tokens:
    """Compact ids of captions; a caption of the world always fits 77 positions."""
    index = {token: i for i, token in enumerate(world.tokens)}
    start, end = len(index), len(index) + 1
    n = len(captions)
    ids = torch.full((n, architecture.POSITIONS), end, dtype=torch.int16)
    ids[:, 0] = start
    at = torch.full((n,), -1, dtype=torch.int16)
    words = torch.zeros((n, MAX_MIX), dtype=torch.int16)
    weights = torch.zeros((n, MAX_MIX))
    for row, caption in enumerate(captions):
        position = 1
        for part in caption.parts:
            if isinstance(part, str):
                for token in part.split():
                    ids[row, position] = index[token]
                    position += 1
                continue
            at[row] = position
            for column, (word, weight) in enumerate(part):
                words[row, column] = index[word]
                weights[row, column] = weight
            position += 1
    return Tokens(ids, at, words, weights)


def make_pairs(world: World, folder: Path, shards: int, *, seed: int) -> None:
    """Draw ``shards`` files of captioned pictures as latent codes and thumbnails; existing files are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        path = folder / f"{shard:04d}.pt"
        if path.exists():
            continue
        rng = np.random.default_rng([seed, shard])
        pairs = [world.sample(rng) for _ in range(SHARD)]
        latents, thumbnails = [], []
        for i in range(0, SHARD, 256):
            pictures = as_pictures(render.draw_batch([scene for _, scene in pairs[i : i + 256]]))
            latents.append(latent_code(pictures).half())
            small = nn.functional.interpolate(pictures, size=(READ_SIDE, READ_SIDE), mode="area")
            thumbnails.append((small * 255).round().to(torch.uint8))
        tokens = tokenize(world, [caption for caption, _ in pairs])
        _save({"latents": torch.cat(latents), "thumbnails": torch.cat(thumbnails), "tokens": vars(tokens)}, path)
        log.info("pairs %s: %d of %d", folder, shard + 1, shards)


def as_pictures(pixels: NDArray[np.uint8]) -> Tensor:
    """8-bit (batch, height, width, 3) to float (batch, 3, height, width) in [0, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def _save(value: object, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)


class TextSide(nn.Module):
    """The text encoder over the world's own tokens, whose table rows are kept at one norm."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.encoder = architecture.build_text_encoder(tokens + 2)
        nn.init.normal_(self.encoder.embeddings.token_embedding.weight)

    def table(self) -> Tensor:
        """(tokens + 2, width) rows of length TOKEN_NORM."""
        return nn.functional.normalize(self.encoder.embeddings.token_embedding.weight, dim=-1) * TOKEN_NORM

    def forward(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """States (batch, 77, width) and the state at the first end token (batch, width)."""
        table = self.table()
        ids = tokens.ids.long()
        rows = table[ids]
        mixed = torch.einsum("bk,bkw->bw", tokens.weights, table[tokens.words.long()])
        mixed = nn.functional.normalize(mixed, dim=-1) * TOKEN_NORM
        here = torch.arange(ids.shape[1], device=ids.device)[None] == tokens.at.long()[:, None]
        rows = torch.where(here[..., None], mixed[:, None], rows)
        hidden = self.encoder.embeddings(inputs_embeds=rows)
        hidden = self.encoder.encoder(inputs_embeds=hidden, attention_mask=None, is_causal=True).last_hidden_state
        hidden = self.encoder.final_layer_norm(hidden)
        end = (ids == table.shape[0] - 1).int().argmax(1)
        return hidden, hidden[torch.arange(len(ids), device=ids.device), end]


class Pairs:
    """Batches from the shards of a folder, in a seeded order that a resumed run continues."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        files = sorted(folder.glob("*.pt"))
        if not files:
            raise FileNotFoundError(f"no pairs in {folder}: run the stage 'pairs' first")
        loaded = [torch.load(path, weights_only=True) for path in files]
        self.latents = torch.cat([x["latents"] for x in loaded]).to(device)
        self.thumbnails = torch.cat([x["thumbnails"] for x in loaded]).to(device)
        self.tokens = Tokens(**{k: torch.cat([x["tokens"][k] for x in loaded]).to(device) for k in loaded[0]["tokens"]})

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor, Tokens]:
        """Latents, thumbnails in [0, 1] and captions of step ``step``; a tenth of the captions is empty, for guidance."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = torch.randint(len(self), (size,), generator=generator).to(self.latents.device)
        tokens = self.tokens[index]
        empty = (torch.rand(size, generator=generator) < 0.1).to(self.latents.device)
        end = int(tokens.ids.max())
        blank = tokens.ids.clone()
        blank[:, 1:] = end
        tokens = Tokens(
            torch.where(empty[:, None], blank, tokens.ids),
            torch.where(empty, torch.full_like(tokens.at, -1), tokens.at),
            tokens.words,
            tokens.weights,
        )
        return self.latents[index].float(), self.thumbnails[index].float() / 255, tokens


@dataclass
class Run:
    """A resumable optimisation: modules, their exponential moving average, optimiser and step, in one file.

    The learning rate warms up, stays, and decays to zero over the last fifth of ``steps``; ``steps`` may be raised between resumes.
    """

    path: Path
    modules: nn.ModuleDict
    learning_rate: float
    steps: int
    ema_decay: float = 0.999
    step: int = 0

    def __post_init__(self) -> None:
        parameters = [p for p in self.modules.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(parameters, lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.average = {k: v.detach().clone() for k, v in self.modules.state_dict().items()}
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True, map_location=next(self.modules.parameters()).device)
            self.modules.load_state_dict(saved["modules"])
            if "optimiser" in saved:
                self.optimiser.load_state_dict(saved["optimiser"])
            self.average, self.step = saved["average"], saved["step"]

    def _rate(self) -> float:
        warm = min(1.0, (self.step + 1) / 200)
        left = (self.steps - self.step) / max(1, self.steps // 5)
        return self.learning_rate * min(warm, max(left, 1e-3), 1.0)

    def update(self, loss: Tensor) -> None:
        """One optimiser step on ``loss``, gradient norm clipped to 1, and one of the average."""
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for key, value in self.modules.state_dict().items():
                self.average[key].lerp_(value, 1 - decay) if value.is_floating_point() else self.average[key].copy_(value)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {"modules": self.modules.state_dict(), "optimiser": self.optimiser.state_dict(), "average": self.average, "step": self.step}
        _save(state, self.path)

    def loop(self, every: int) -> Iterator[int]:
        """Steps still to do; logs and saves every ``every`` steps and at the end."""
        began, first = time.monotonic(), self.step
        while self.step < self.steps:
            yield self.step
            if self.step % every == 0 or self.step == self.steps:
                self.save()
                log.info(
                    "%s step %d of %d, %.2f s a step",
                    self.path.stem,
                    self.step,
                    self.steps,
                    (time.monotonic() - began) / (self.step - first),
                )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Initial weights from ``seed``, the global random state left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class Smoothed:
    """A running mean for the log."""

    def __init__(self) -> None:
        self.value = math.nan

    def add(self, value: float) -> None:
        self.value = value if math.isnan(self.value) else 0.98 * self.value + 0.02 * value


def contrastive(pictures: Tensor, texts: Tensor, log_scale: Tensor, tokens: Tokens) -> Tensor:
    """Symmetric InfoNCE (Radford et al. 2021, section 2.3), pairs with the same caption not counted as negatives."""
    logits = log_scale.exp().clamp(max=100) * pictures @ texts.T
    same = (tokens.ids[:, None] == tokens.ids[None]).all(-1) & (tokens.at[:, None] < 0) & (tokens.at[None] < 0)
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, -1e4)
    target = torch.arange(len(logits), device=logits.device)
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2


def train_diffusion(
    pairs: Pairs, tokens: int, path: Path, *, steps: int, batch: int, learning_rate: float, seed: int, device: torch.device
) -> Run:
    """UNet, text encoder and scorer together: noise prediction (min-SNR weighted, gamma 5, Hang et al. 2023) and the contrastive loss."""
    with _seeded(seed):
        unet, text, scorer = architecture.build_unet(), TextSide(tokens), architecture.build_scorer()
    modules = nn.ModuleDict({"unet": unet, "text": text, "scorer": scorer}).to(device)
    unet.to(memory_format=torch.channels_last)
    run = Run(path, modules, learning_rate, steps)
    alphas = DDPMScheduler(**architecture.SCHEDULE).alphas_cumprod.to(device)
    weight = (alphas / (1 - alphas)).clamp(max=5) / (alphas / (1 - alphas))
    noise_loss, pair_loss = Smoothed(), Smoothed()
    for step in run.loop(100):
        latents, thumbnails, captions = pairs.batch(step, batch, seed)
        generator = torch.Generator().manual_seed(seed * 7_000_003 + step)
        time_index = torch.randint(len(alphas), (batch,), generator=generator).to(device)
        noise = torch.randn(latents.shape, generator=generator)
        noise = (noise + OFFSET_NOISE * torch.randn((batch, latents.shape[1], 1, 1), generator=generator)).to(device)
        a = alphas[time_index][:, None, None, None]
        states, pooled = text(captions)
        predicted = unet(a.sqrt() * latents + (1 - a).sqrt() * noise, time_index, states).sample
        error = (predicted - noise).square().mean((1, 2, 3))
        denoising = (weight[time_index] * error).mean()
        matching = contrastive(scorer.pictures(thumbnails), scorer.texts(pooled), scorer.log_scale, captions)
        run.update(denoising + 0.02 * matching)
        noise_loss.add(float(error.detach().mean()))
        pair_loss.add(float(matching.detach()))
        if run.step % 50 == 0:
            log.info("diffusion %d: noise %.4f, pairs %.3f", run.step, noise_loss.value, pair_loss.value)
    return run


def adopt(trained: Path, of: World, path: Path, world: World, *, seed: int) -> None:
    """Start ``path``, a diffusion run of ``world``, from a finished one of another world: words they share keep their embeddings."""
    average = dict(torch.load(trained, weights_only=True, map_location="cpu")["average"])
    key = "text.encoder.embeddings.token_embedding.weight"
    known = {token: row for row, token in enumerate(of.tokens)}
    old = average[key]
    table = torch.randn((len(world.tokens) + 2, old.shape[1]), generator=torch.Generator().manual_seed(seed)) * old.std()
    for row, token in enumerate(world.tokens):
        if token in known and of.words.get(token) == world.words.get(token):
            table[row] = old[known[token]]
    table[-2:] = old[-2:]
    average[key] = table
    path.parent.mkdir(parents=True, exist_ok=True)
    _save({"modules": average, "average": average, "step": 0}, path)


def train_scorer(pairs: Pairs, diffusion: Path, tokens: int, path: Path, *, steps: int, batch: int, seed: int, device: torch.device) -> Run:
    """The scorer alone against the finished text encoder."""
    average = torch.load(diffusion, weights_only=True, map_location=device)["average"]
    text = TextSide(tokens).to(device).requires_grad_(False)
    text.load_state_dict(_part(average, "text."))
    scorer = architecture.build_scorer().to(device)
    scorer.load_state_dict(_part(average, "scorer."))
    run = Run(path, nn.ModuleDict({"scorer": scorer}), 1e-3, steps)
    loss_mean = Smoothed()
    for step in run.loop(200):
        _, thumbnails, captions = pairs.batch(step, batch, seed + 1)
        with torch.no_grad():
            _, pooled = text(captions)
        jitter = torch.randn(thumbnails.shape, generator=torch.Generator().manual_seed(step)).to(device)
        loss = contrastive(scorer.pictures((thumbnails + 0.02 * jitter).clamp(0, 1)), scorer.texts(pooled), scorer.log_scale, captions)
        run.update(loss)
        loss_mean.add(float(loss.detach()))
        if run.step % 100 == 0:
            log.info("scorer %d: pairs %.3f", run.step, loss_mean.value)
    return run


def train_autoencoder(
    world: World, path: Path, *, steps: int, batch: int, crop: int, learning_rate: float, seed: int, device: torch.device
) -> Run:
    """Encoder to write the chosen code, decoder to read it (L1 and L2), on crops aligned to the textures' period.

    The decoder sees codes with a little noise, as a sampler leaves behind.
    """
    with _seeded(seed):
        model = architecture.build_autoencoder()
    model.to(device, memory_format=torch.channels_last)
    run = Run(path, nn.ModuleDict({"autoencoder": model}), learning_rate, steps, ema_decay=0.995)
    code_error, picture_error = Smoothed(), Smoothed()
    pool: Tensor | None = None
    for step in run.loop(50):
        rng = np.random.default_rng([seed, step])
        if pool is None or step % 40 == 0:
            pool = as_pictures(render.draw_batch([world.sample(rng)[1] for _ in range(160)]))
        chosen = pool[torch.from_numpy(rng.choice(len(pool), batch, replace=False))]
        places = rng.integers(0, (render.SIDE - crop) // 16 + 1, (batch, 2)) * 16
        pictures = torch.stack([p[:, y : y + crop, x : x + crop] for p, (y, x) in zip(chosen, places, strict=True)]).to(device)
        code = latent_code(pictures)
        noise = torch.from_numpy(rng.standard_normal(tuple(code.shape), dtype=np.float32)).to(device)
        level = torch.from_numpy(rng.uniform(0, 0.12, (batch, 1, 1, 1)).astype(np.float32)).to(device)
        written = model.encoder(pictures * 2 - 1) if step % 4 == 0 else None
        drawn = model.decoder(code + level * noise)
        target = pictures * 2 - 1
        drawing = (drawn - target).abs().mean() + (drawn - target).square().mean()
        writing = torch.zeros((), device=device) if written is None else (written - code).abs().mean() + (written - code).square().mean()
        run.update(drawing + writing)
        picture_error.add(float((drawn.detach() - target).square().mean() / 4))
        if written is not None:
            code_error.add(float((written.detach() - code).square().mean()))
        if run.step % 25 == 0:
            log.info("autoencoder %d: %.2f dB, code error %.4f", run.step, -10 * math.log10(picture_error.value), code_error.value)
    return run


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def full_table(world: World, compact: Tensor, vocabulary: Mapping[str, int], *, seed: int = 0) -> Tensor:
    """The token table over CLIP's whole vocabulary: trained rows in their places, the rest random at the trained rows' norm."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(architecture.VOCABULARY, compact.shape[1], generator=generator)
    table = nn.functional.normalize(table, dim=-1) * TOKEN_NORM
    for i, token in enumerate(world.tokens):
        table[vocabulary[f"{token}</w>"]] = compact[i]
    table[architecture.START], table[architecture.END] = compact[-2], compact[-1]
    return table


def export(world: World, runs: Path, target: Path, beside: Path | None = None) -> None:
    """Write the averaged networks of a run folder as one fp16 file in the single-file layout, with the architecture in its header.

    With ``beside``, a finished file in the same folder, only what differs from it is written.
    """
    from ..hosts.checkpoint import read_single_file, stand_beside, to_single_file

    diffusion = torch.load(runs / "diffusion.pt", weights_only=True, map_location="cpu")["average"]
    autoencoder = torch.load(runs / "autoencoder.pt", weights_only=True, map_location="cpu")["average"]
    scorer_run = runs / "scorer.pt"
    scorer = _part(
        torch.load(scorer_run, weights_only=True, map_location="cpu")["average"] if scorer_run.exists() else diffusion, "scorer."
    )
    side = TextSide(len(world.tokens))
    side.load_state_dict(_part(diffusion, "text."))
    vocabulary = json.loads((Path(__file__).parent / "data" / "vocab.json").read_text(encoding="utf-8"))
    text = dict(side.encoder.state_dict())
    text["embeddings.token_embedding.weight"] = full_table(world, side.table().detach(), vocabulary)
    state = to_single_file(_part(diffusion, "unet."), text, _part(autoencoder, "autoencoder."), scorer)
    header = {
        "format": "conceptkit-demo",
        "version": 1,
        "unet": architecture.UNET,
        "text": architecture.TEXT,
        "autoencoder": architecture.AUTOENCODER,
        "scheduler": architecture.SCHEDULE,
        "scorer": {"width": architecture.WIDTH},
        "world": world.name,
        "words": list(world.words),
    }
    from ..artifact import write

    fresh = target.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    if beside is not None:
        state, header = stand_beside(state, read_single_file(beside)[0]), {**header, "beside": beside.name}
    write(fresh, state, header)
    os.replace(fresh, target)


def main() -> None:
    """Run one stage from the command line."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["pairs", "autoencoder", "diffusion", "scorer", "export"])
    parser.add_argument("--runs", type=Path, required=True, help="folder of checkpoints and data")
    parser.add_argument("--world", choices=sorted(WORLDS), default="shapes")
    parser.add_argument("--steps", type=int, help="total optimiser steps (raise to go on)")
    parser.add_argument("--shards", type=int, default=24, help=f"files of {SHARD} captioned pictures")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--crop", type=int, default=64, help="side of the autoencoder's training crops in pixels")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--adopt", type=Path, help="stage 'diffusion' of another world: run folder of the Shapes world to start from")
    parser.add_argument("--out", type=Path, help="target file of the stage 'export'")
    parser.add_argument("--beside", type=Path, help="stage 'export': write only what differs from this file in the target's folder")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    world, device = WORLDS[options.world](), torch.device(options.device)
    common: dict[str, Any] = {"seed": options.seed, "device": device, "batch": options.batch}
    if options.stage == "pairs":
        make_pairs(world, options.runs / "pairs", options.shards, seed=options.seed)
    elif options.stage == "autoencoder":
        train_autoencoder(
            world,
            options.runs / "autoencoder.pt",
            steps=options.steps or 3000,
            crop=options.crop,
            learning_rate=options.learning_rate,
            **common,
        )
    elif options.stage == "diffusion":
        pairs = Pairs(options.runs / "pairs", device)
        if options.adopt and not (options.runs / "diffusion.pt").exists():
            adopt(options.adopt / "diffusion.pt", shapes_world(), options.runs / "diffusion.pt", world, seed=options.seed)
        train_diffusion(
            pairs,
            len(world.tokens),
            options.runs / "diffusion.pt",
            steps=options.steps or 20000,
            learning_rate=options.learning_rate,
            **common,
        )
    elif options.stage == "scorer":
        pairs = Pairs(options.runs / "pairs", device)
        train_scorer(
            pairs, options.runs / "diffusion.pt", len(world.tokens), options.runs / "scorer.pt", steps=options.steps or 2000, **common
        )
    else:
        # Loaders of checkpoints list every .safetensors file, and cannot load one that holds only what differs from another.
        ending = "safetensors" if options.beside is None else "delta"
        export(world, options.runs, options.out or Path(__file__).parent / "data" / f"{options.world}.{ending}", options.beside)


if __name__ == "__main__":
    main()
