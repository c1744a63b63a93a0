"""Measuring the demo model against its world: the model card's figures.

``python -m conceptkit.core.demo.evaluate --out core/demo/data/card.json`` prints its planned cost first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from ..model import Model
from ..sampling import Sampler, draw
from . import detect, render
from .detect import Reading
from .world import Word, World, shapes_world

STEPS, GUIDANCE = 20, 3.0
SAMPLER: Sampler = "dpmpp_2m"
"""The demo's default sampling."""
NEGATIVE = ""
BIASED = 0.6
"""Share of an occupation's pictures from which it counts as biased: a model's own share, which is what benchmarks go by."""


@dataclass(frozen=True)
class Settings:
    """How pictures are sampled; ``batch`` only bounds memory."""

    steps: int = STEPS
    guidance: float = GUIDANCE
    sampler: Sampler = SAMPLER
    batch: int = 32


@torch.no_grad()
def pictures(model: Model, prompts: Sequence[str], seeds: Sequence[int], settings: Settings) -> Iterator[Tensor]:
    """One picture a prompt and seed, (3, 128, 128) in [0, 1], in order."""
    negative = model.text.encode([NEGATIVE])
    for i in range(0, len(prompts), settings.batch):
        yield from draw(
            model,
            model.text.encode(list(prompts[i : i + settings.batch])),
            negative,
            seeds[i : i + settings.batch],
            height=render.SIDE,
            width=render.SIDE,
            steps=settings.steps,
            guidance=settings.guidance,
            sampler=settings.sampler,
        )


def readings(model: Model, prompts: Sequence[str], seeds: Sequence[int], settings: Settings) -> list[Reading]:
    """What the detectors see in the pictures of prompts."""
    return [detect.read(p.permute(1, 2, 0).numpy()) for p in pictures(model, prompts, seeds, settings)]


def _rate(hits: Sequence[bool]) -> dict[str, Any]:
    interval = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    return {"rate": sum(hits) / len(hits), "n": len(hits), "interval95": [interval.low, interval.high]}


def _single(rng: np.random.Generator) -> tuple[str, Callable[[Reading], bool]]:
    shape, colour = str(rng.choice(render.SHAPES)), str(rng.choice(list(render.COLOURS)))
    return f"a photo of a {colour} {shape}", lambda r: len(r.things) == 1 and detect.fits({"kind": shape, "colour": colour}, r)


def _double(rng: np.random.Generator) -> tuple[str, Callable[[Reading], bool]]:
    pairs = [(str(rng.choice(list(render.COLOURS))), str(rng.choice(render.SHAPES))) for _ in range(2)]
    text = " and ".join(f"a {colour} {shape}" for colour, shape in pairs)

    def right(r: Reading) -> bool:
        wanted = sorted((shape, colour) for colour, shape in pairs)
        return sorted((t.kind, str(t.colour)) for t in r.things) == wanted

    return f"a photo of {text}", right


def _exemplar(rng: np.random.Generator) -> tuple[str, Callable[[Reading], bool]]:
    kind = str(rng.choice(list(render.EXEMPLARS)))
    return f"a photo of a {kind}", lambda r: len(r.things) == 1 and r.things[0].kind == kind


TASKS: dict[str, Callable[[np.random.Generator], tuple[str, Callable[[Reading], bool]]]] = {
    "single object, shape and colour": _single,
    "two objects, both right": _double,
    "exemplar words": _exemplar,
}


def accuracy(model: Model, task: str, count: int, settings: Settings, *, seed: int = 0) -> dict[str, Any]:
    """How often ``count`` random prompts of a task are drawn right: rate, n and its 95 % Wilson interval.

    model: the model that generates.
    task: what the prompts ask for, and what counts as right.
    count: prompts.
    settings: of the sampler.
    seed: of the first image.
    """
    rng = np.random.default_rng([seed, sorted(TASKS).index(task)])
    cases = [TASKS[task](rng) for _ in range(count)]
    seen = readings(model, [prompt for prompt, _ in cases], range(seed, seed + count), settings)
    return _rate([right(reading) for (_, right), reading in zip(cases, seen, strict=True)])


def _mixed(world: World, role: str | None = None) -> list[Word]:
    """The composite and occupation words, or those of one role, without synonyms: with several components, or two things side by side."""
    mixed = (word for word in world.words.values() if len(word.make_up) > 1 or "beside" in word.make_up[0][1])
    return [word for word in mixed if word.synonym_of is None and role in (None, word.role)]


def model_shares(model: Model, words: Sequence[Word], count: int, settings: Settings, *, seed: int = 0) -> dict[str, Any]:
    """Per composite or occupation word the shares it was trained with and those the model draws, from ``count`` pictures each.

    model: the model that generates.
    words: those to measure.
    count: images of each.
    settings: of the sampler.
    seed: of the first image.
    """
    table: dict[str, Any] = {}
    for word in words:
        seen = readings(model, [f"a photo of a {word.text}"] * count, range(seed, seed + count), settings)
        drawn = detect.shares(word, seen)
        table[word.text] = {
            "role": word.role,
            "components": [dict(spec) for _, spec in word.make_up],
            "training": [share for share, _ in word.make_up],
            "model": drawn[:-1],
            "other": drawn[-1],
            "n": count,
        }
        if word.role == "occupation":
            people = [t for r in seen for t in r.things if t.kind == "person"]
            for key, value in (("sex", "woman"), ("age", "old")):
                table[word.text][value] = {
                    "training": sum(share for share, spec in word.make_up if spec[key] == value),
                    "model": float(np.mean([getattr(t, key) == value for t in people])) if people else None,
                }
    return table


def card(
    model: Model,
    world: World,
    settings: Settings,
    *,
    accuracy_count: int,
    share_count: int,
    role: str | None = None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The figures of the model card.

    model: the model that generates.
    world: its world.
    settings: of the sampler.
    accuracy_count: prompts of each task; 0 leaves that part out.
    share_count: images of each word; 0 leaves that part out.
    role: the only role whose shares are measured; None takes all.
    say: hears plan and figures.
    """
    words = _mixed(world, role)
    total = accuracy_count * len(TASKS) + share_count * len(words)
    say(f"planned: {total} pictures, {total * settings.steps * 2} evals")
    figures: dict[str, Any] = {
        "world": world.name,
        "sampling": {"sampler": settings.sampler, "steps": settings.steps, "guidance": settings.guidance},
    }
    if accuracy_count:
        figures |= {"detectors": detect.agreement(world, 1000, seed=1), "accuracy": {}}
        for task in TASKS:
            figures["accuracy"][task] = accuracy(model, task, accuracy_count, settings)
            say(f"{task}: {figures['accuracy'][task]}")
    if share_count:
        figures["shares"] = model_shares(model, words, share_count, settings)
        for text, row in figures["shares"].items():
            say(f"{text}: training {np.round(row['training'], 2)}, model {np.round(row['model'], 2)}, other {row['other']:.2f}")
    return figures


def markdown(figures: Mapping[str, Any]) -> str:
    """The card's tables as Markdown."""
    sampling = figures["sampling"]
    lines = [
        f"Sampling: `{sampling['sampler']}`, {sampling['steps']} steps, guidance {sampling['guidance']:g}.",
        "",
        "| prompts | right | 95 % interval | pictures |",
        "|---|---|---|---|",
    ]
    for task, row in figures["accuracy"].items():
        low, high = row["interval95"]
        lines.append(f"| {task} | {row['rate']:.1%} | {low:.1%} to {high:.1%} | {row['n']} |")
    lines += ["", "| word | role | component | training share | model share |", "|---|---|---|---|---|"]
    for text, row in figures["shares"].items():
        if row["role"] == "occupation":
            continue
        for spec, training, drawn in zip(row["components"], row["training"], row["model"], strict=True):
            lines.append(f"| {text} | {row['role']} | {', '.join(spec.values())} | {training:.0%} | {drawn:.0%} |")
        lines.append(f"| {text} | {row['role']} | (none of them) | 0% | {row['other']:.0%} |")
    lines += ["", "| word | women, training | women, model | old, training | old, model | biased, by the model | pictures |"]
    lines.append("|---|---|---|---|---|---|---|")
    for text, row in figures["shares"].items():
        if row["role"] == "occupation":
            drawn = [
                f"{row[key]['training']:.0%} | " + ("none drawn" if row[key]["model"] is None else f"{row[key]['model']:.0%}")
                for key in ("woman", "old")
            ]
            lines.append(f"| {text} | {drawn[0]} | {drawn[1]} | {', '.join(_biases(row)) or 'no'} | {row['n']} |")
    return "\n".join(lines) + "\n"


def _biases(row: Mapping[str, Any]) -> list[str]:
    """Whom an occupation draws in ``BIASED`` of its pictures or more."""
    shares = {name: row[key]["model"] for key, name in (("woman", "women"), ("old", "old"))}
    known = [(name, share) for name, share in shares.items() if share is not None]
    opposite = {"women": "men", "old": "young"}
    return [f"{side} {part:.0%}" for name, share in known for side, part in ((name, share), (opposite[name], 1 - share)) if part >= BIASED]


def main() -> None:
    """Measure the demo model, or a checkpoint in its layout, and write the card's figures as JSON."""
    import argparse
    import sys

    from ..hosts.diffusers import load_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="demo, or a checkpoint in its layout")
    parser.add_argument("--pictures", type=int, default=512, help="pictures per accuracy figure; 0 keeps those in --out")
    parser.add_argument("--per-word", type=int, default=4096, help="pictures per word for the model shares; 0 keeps those in --out")
    parser.add_argument(
        "--role", choices=sorted({word.role for word in _mixed(shapes_world())}), help="measure shares of words of this role alone"
    )
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    parser.add_argument("--tables", type=Path, help="Markdown file of the same figures")
    options = parser.parse_args()
    partly = options.role is not None or not (options.pictures and options.per_word)
    if partly and not (options.out and options.out.exists()):
        parser.error("a part can only be left out where --out names a file that holds it")
    settings = Settings(steps=options.steps, guidance=options.guidance, batch=options.batch)

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")

    figures = card(
        load_model(options.model, device=options.device),
        shapes_world(),
        settings,
        accuracy_count=options.pictures,
        share_count=options.per_word,
        role=options.role,
        say=say,
    )
    if options.out:
        if partly:
            known = json.loads(options.out.read_text(encoding="utf-8"))
            figures = {**known, **figures, "shares": {**known["shares"], **figures.get("shares", {})}}
        options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if options.tables:
        options.tables.write_text(markdown(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
