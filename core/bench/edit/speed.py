"""How fast an edit is solved and exported at the sizes of real models, against the published order of work, on random weights.

The like-for-like job is UCE's 2025 objective for 100 single columns: same columns, threads and precision. Text encoding is in none of
these figures. Weights are read from disk layer by layer, as they would be from a checkpoint; the published loops are given theirs in
memory. The whole verb, text encoding and report included, is timed on the demo model.

Everything that is compared is timed in turns in one process (ours, theirs, ours, theirs ...), and a ratio is the median over these pairs:
whatever else the machine does meets both sides alike.
"""

from __future__ import annotations

import ctypes
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...edit import ContextEdit, parse_concepts, save_lora, solve_edit
from ...edit.job import Job
from ...edit.layers import cross_attention, gram
from ...edit.presets import rece
from ...edit.solve import LowRank, Problem, minimise
from ...edit.texts import Texts
from ...model import Conditioning, Family, Model, Prompt
from ...vocabulary import WORD_END
from ..frame import Result

COLUMNS = 100
RIDGE = 0.5
LAYERS: Mapping[str, tuple[Family, int, Mapping[int, int]]] = {
    "sd15": ("sd1", 768, {320: 10, 640: 10, 1280: 12}),
    "sdxl": ("sdxl", 2048, {640: 20, 1280: 120}),
}
"""Family, width of the context, and how many to_k and to_v there are of each height."""
LENGTH = 77
REPEATS = 3
PAIRS = 7
"""Rounds in which everything that is compared is timed once. The range of their ratios is stated beside the median."""
ERASED = ("circle", "square")
"""What the whole verb is timed with on the demo model: a concept, which it finds an anchor for, and what it is read as in the published
loop, which has to be told."""
_SYLLABLES = ("ba", "do", "fi", "ku", "me", "no", "ra", "su")
WORDS = (
    "cat",
    "dog",
    "car",
    "house",
    "tree",
    "painting",
    "city",
    "woman",
    "man",
    "river",
    "mountain",
    "bird",
    "horse",
    "ship",
    "flower",
    "bread",
)
"""What the stand-in for a text encoder was trained on, for all that a method can see."""
MANY = tuple(first + second + third for first in _SYLLABLES for second in _SYLLABLES for third in _SYLLABLES)
"""The same where many concepts are erased at once, made up: the first ``COLUMNS`` are."""
COMMON = ("a", "an", "the", "of", "and", "on", "one", "photo", "picture", "drawing", "image", "large", "background", "with", "in")


class StoredLayers:
    """``core.model.CrossAttention`` over a file of random fp16 weights, read one layer at a time."""

    def __init__(self, path: Path, width: int, heights: Mapping[int, int]) -> None:
        self._path, self._width = path, width
        self._heights = [height for height, count in heights.items() for _ in range(count)]

    def write(self) -> StoredLayers:
        """Fill the file: normal with variance 1 / width."""
        rng = np.random.default_rng(0)
        with self._path.open("wb") as file:
            for height in self._heights:
                file.write((rng.standard_normal((height, self._width), dtype=np.float32) * self._width**-0.5).astype(np.float16).tobytes())
        return self

    def key_values(self) -> Iterator[tuple[str, Tensor]]:
        offset = 0
        for index, height in enumerate(self._heights):
            count = height * self._width
            values = np.fromfile(self._path, np.float16, count, offset=offset)
            offset += 2 * count
            name = f"down_blocks.0.attentions.0.transformer_blocks.{index // 2}.attn2.{('to_k', 'to_v')[index % 2]}"
            yield name, torch.from_numpy(values).view(height, self._width)

    def pooled(self) -> None:
        return None


class StandInText:
    """A text encoder without weights: contexts of full rank, drawn from each token, its place and its prompt, and the time spent on them.

    The tokenizer knows ``words`` and prompts' common words, one token each.
    """

    def __init__(self, width: int, words: Sequence[str]) -> None:
        self._width = width
        names = [*words, *COMMON]
        self._vocabulary = {word + WORD_END: index for index, word in enumerate(dict.fromkeys(names))}
        self._rows: dict[tuple[str, object], Tensor] = {}
        self.seconds, self.prompts = 0.0, 0

    @property
    def vocabulary(self) -> Mapping[str, int]:
        return self._vocabulary

    @cached_property
    def tables(self) -> Mapping[str, Tensor]:
        return {"l": torch.stack([self._row("token", index) for index in range(len(self._vocabulary))])}

    def tokenize(self, text: str) -> list[int]:
        return [self._vocabulary[word + WORD_END] for word in text.split()]

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        start = time.perf_counter()
        context = torch.stack([self._context(str(prompt)) for prompt in prompts])
        self.seconds += time.perf_counter() - start
        self.prompts += len(prompts)
        return Conditioning(context)

    def _context(self, prompt: str) -> Tensor:
        names = (["start", *map(str, self.tokenize(prompt))] + ["end"] * LENGTH)[:LENGTH]
        tokens = torch.stack([self._row("token", name) for name in names])
        places = torch.stack([self._row("place", place) for place in range(LENGTH)])
        # What stands before a token colours it, in directions of its own for every beginning of a prompt.
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6], "little")
        own = torch.randn(LENGTH, self._width, generator=torch.Generator().manual_seed(seed))
        own[0] = 0
        return tokens + 0.5 * places + tokens.cumsum(0) / torch.arange(1, LENGTH + 1)[:, None] + 0.3 * own

    def _row(self, kind: str, name: object) -> Tensor:
        if (kind, name) not in self._rows:
            seed = int.from_bytes(hashlib.sha256(f"{kind} {name}".encode()).digest()[:6], "little")
            self._rows[kind, name] = torch.randn(self._width, generator=torch.Generator().manual_seed(seed))
        return self._rows[kind, name]


def measure_speed(size: str, threads: int, methods: bool, layers: int, pairs: int = PAIRS) -> Result:
    """Seconds to solve and export, in turns with the published loops, and for the Gram matrix, with the memory taken.

    methods: to run RECE's loop and to solve with the default method one concept (its memory is that of the first time, captions and all)
    and ``COLUMNS`` of them in one call, too. layers: of each height that the published loops are timed on; their seconds are scaled up to
    all of them. pairs: rounds of ours and theirs.
    """
    import scipy.optimize  # noqa: F401  a library that is loaded once, in ComfyUI at its start, is no memory of an edit

    torch.set_num_threads(threads)
    family, width, heights = LAYERS[size]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        stored = StoredLayers(Path(folder, "layers"), width, heights).write()
        c, a = _columns(width)
        ones = torch.ones(COLUMNS, dtype=torch.float64)

        def like_for_like() -> None:
            found = minimise(Problem(c.double(), a.double(), ones, RIDGE))
            edit = ContextEdit(family, LowRank(found.u.float(), found.v.float()))
            save_lora(edit, stored, Path(folder, "lora.safetensors"), overwrite=True)

        # The first time, too: what is kept of it would not show later.
        before = _resident(reset=True)
        like_for_like()
        like_for_like()
        peak = _resident(peak=True) - before
        compared = _in_turns({"": lambda: _seconds(like_for_like), **_published(heights, layers, c, a)}, pairs)
        text = StandInText(width, WORDS)
        model = Model(family, size, text, words=WORDS, cross_attention=stored)
        result: dict[str, float] = {"peak_mb": peak, "gram_seconds": _seconds(lambda: gram(model, width, None, Path(folder)))}
        if methods:
            result["rece_seconds"] = _rece_seconds(model, Path(folder))
            before = _resident(reset=True)
            solve_edit(model, ["cat"], cache=Path(folder))
            result["default_peak_mb"] = _resident(peak=True) - before
            encoding, start = text.seconds, time.perf_counter()
            solve_edit(model, ["cat"], cache=Path(folder))
            result["default_encode_seconds"] = text.seconds - encoding
            result["default_seconds"] = time.perf_counter() - start - result["default_encode_seconds"]
            text = StandInText(width, MANY)
            start = time.perf_counter()
            solve_edit(replace(model, text=text, words=MANY), MANY[:COLUMNS], cache=Path(folder))
            result["many_seconds"] = time.perf_counter() - start - text.seconds
            result["many_encode_seconds"], result["many_prompts"] = text.seconds, text.prompts
    rounded = {key: round(value, 6) for key, value in result.items()}
    return {**_medians(compared), **rounded, "threads": threads, "layers": layers, "evals": 0}


def measure_verb(model: str, threads: int, pairs: int = PAIRS) -> Result:
    """Seconds of ``solve_edit`` for one concept, text encoding and report included, in turns with UCE as published.

    With what depends on the checkpoint alone at hand, as the nodes keep it, and without (``first``).
    """
    from ..worlds import load  # here, since all that comes along would change what ``measure_speed`` finds of memory

    torch.set_num_threads(threads)
    loaded = load(model)
    concept, guide = ERASED
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        solve_edit(loaded, concept, cache=Path(folder))
        runs = {
            "": lambda: solve_edit(loaded, concept, cache=Path(folder)),
            "first": lambda: solve_edit(loaded, concept),
            "official": lambda: uce_as_published(loaded, concept, guide),
        }
        # What a process does once (tables, threads, the allocator) is over for all three.
        for run in runs.values():
            run()
        compared = _in_turns({name: partial(_seconds, run) for name, run in runs.items()}, pairs)
    return {**_medians(compared), "threads": threads, "evals": 0}


def uce_as_published(model: Model, concept: str, guide: str) -> dict[str, Tensor]:
    """Every to_k and to_v of a model as UCE's published code edits it: ``concept`` read as ``guide``, last token for last token."""
    texts = Texts(model.text)
    texts.load([concept, guide])
    c, a = ((prompt := texts.prompt("{}", text)).context[prompt.last, :, None].float() for text in (concept, guide))
    return {path: as_published(weight.float(), c, a) for path, weight in cross_attention(model).key_values()}


def _published(heights: Mapping[int, int], layers: int, c: Tensor, a: Tensor) -> dict[str, Callable[[], float]]:
    """Per loop what times it on ``layers`` layers of each height, in seconds for all of them."""
    generator, width = torch.Generator().manual_seed(0), len(c)

    def weights(height: int) -> list[Tensor]:
        timed = min(layers, heights[height])
        return [torch.randn(height, width, generator=generator) * width**-0.5 for _ in range(timed)]

    listed = {height: weights(height) for height in heights}

    def seconds(loop: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
        total = 0.0
        for height, rows in listed.items():
            total += _seconds(partial(_each, loop, rows, c, a)) * heights[height] / len(rows)
        return total

    return {name: partial(seconds, loop) for name, loop in LOOPS.items()}


def _each(loop: Callable[[Tensor, Tensor, Tensor], Tensor], weights: Sequence[Tensor], c: Tensor, a: Tensor) -> None:
    for weight in weights:
        loop(weight, c, a)


def _in_turns(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each of ``runs``, one after the other, round by round."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run())
    return found


def _medians(compared: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Median seconds of what was timed in turns, ours without a name, and how many times as long the others took, pair by pair."""
    figures: dict[str, Any] = {f"{name}_seconds".lstrip("_"): round(statistics.median(times), 6) for name, times in compared.items()}
    for name, times in compared.items():
        if name:
            ratios = [other / own for own, other in zip(compared[""], times, strict=True)]
            figures[f"{name}_ratio"] = round(statistics.median(ratios), 3)
            figures[f"{name}_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    return {**figures, "pairs": len(compared[""])}


def as_published(weight: Tensor, columns: Tensor, anchors: Tensor) -> Tensor:
    """One layer in UCE's published order: an outer product a concept, an inverse a layer. weight (out, d), columns and anchors (d, N)."""
    left, right = RIDGE * weight, RIDGE * torch.eye(weight.shape[1])
    for column, anchor in zip(columns.T, anchors.T, strict=True):
        left += torch.outer(weight @ anchor, column)
        right += torch.outer(column, column)
    return left @ torch.inverse(right)


def vectorised(weight: Tensor, columns: Tensor, anchors: Tensor) -> Tensor:
    """The same, the concepts' sums as matrix products."""
    right = RIDGE * torch.eye(weight.shape[1]) + columns @ columns.T
    return (RIDGE * weight + (weight @ anchors) @ columns.T) @ torch.inverse(right)


LOOPS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"official": as_published, "vectorised": vectorised}


def _columns(width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(width, COLUMNS, generator=generator), torch.randn(width, COLUMNS, generator=generator)


def _rece_seconds(model: Model, folder: Path) -> float:
    job = Job(model, parse_concepts("cat"), cache=folder)
    solve = rece(0.1, 3, empty_per_concept=True)
    # Gram and texts are there once it has run.
    solve(job)
    return min(_seconds(lambda: solve(job)) for _ in range(REPEATS))


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _resident(*, reset: bool = False, peak: bool = False) -> float:
    """This process's resident memory in MiB, now or at its peak since the last reset; 0 where the system does not say."""
    try:
        if reset:
            # What was given back to the allocator goes back to the system: it counts when it is taken again.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", "ascii")
        lines = Path("/proc/self/status").read_text("ascii", "replace").splitlines()
    except (AttributeError, OSError):
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:" if peak else "VmRSS:")), 0.0)
