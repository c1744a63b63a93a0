"""A CLIP as a ``TextEncoder``, and what it encodes as a CONDITIONING."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import comfy.model_management as management
import comfy.sd1_clip
import torch
from comfy.sd import CLIP
from torch import Tensor

from ...core.model import Conditioning, Prompt
from .checks import encoders_of, width_of
from .residency import Resident

ENCODE_ROWS = 64
"""Prompts per call of the text encoder."""
_Row: TypeAlias = list[int | Tensor]


class GraphTextEncoder:
    """A CLIP as a ``TextEncoder``. Texts are read as they stand: weights in parentheses and embedding files are not interpreted."""

    def __init__(self, clip: CLIP, resident: Resident) -> None:
        self._clip, self._resident = clip, resident
        self._encoders = encoders_of(clip)
        self._tokenizer = getattr(clip.tokenizer, f"clip_{next(iter(self._encoders))}").tokenizer
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        self._tables: dict[str, Tensor] = {}

    @property
    def vocabulary(self) -> Mapping[str, int]:
        return self._vocabulary

    @property
    def tables(self) -> Mapping[str, Tensor]:
        if not self._tables:
            self._resident.load()
            device = self._clip.patcher.load_device
            for name, encoder in self._encoders.items():
                embeddings = encoder.transformer.get_input_embeddings()
                ids = torch.arange(embeddings.weight.shape[0], device=device)
                with torch.no_grad():
                    self._tables[name] = embeddings(ids, out_dtype=torch.float32)
        return self._tables

    @property
    def _length(self) -> int:
        return min(encoder.max_length for encoder in self._encoders.values()) - 2

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        self._fits(len(ids))
        return ids

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        encoded = self._run(prompts, {} if self._clip.layer_idx is None else {"layer": self._clip.layer_idx})
        context = torch.cat([context for context, _ in encoded.values()], dim=-1)
        return Conditioning(context, encoded["g"][1] if "g" in encoded else None)

    def pooled(self, texts: Sequence[str]) -> Tensor:
        """The first encoder's last normed state at the end token, (len(texts), width), without gradient: what an image scorer projects."""
        with torch.inference_mode():
            _, state = next(iter(self._run(texts, {"projected_pooled": False}).values()))
        self._clip.cond_stage_model.reset_clip_options()
        return state.clone()

    def _run(self, prompts: Sequence[Prompt], options: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
        """Per encoder its context (rows, tokens, width) and its state at each row's end token (rows, width), under CLIP ``options``."""
        if not prompts:
            raise ValueError("there is no prompt to encode")
        self._resident.load()
        stage = self._clip.cond_stage_model
        stage.reset_clip_options()
        stage.set_clip_options({**options, "execution_device": self._clip.patcher.load_device})
        encoded = {}
        for name, encoder in self._encoders.items():
            rows = [row for prompt in prompts for row in self._rows(prompt, name, encoder)]
            parts = []
            for start in range(0, len(rows), ENCODE_ROWS):
                management.throw_exception_if_processing_interrupted()
                parts.append(encoder.encode(rows[start : start + ENCODE_ROWS]))
            encoded[name] = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        return encoded

    def _fits(self, tokens: int) -> None:
        if tokens > self._length:
            raise ValueError(f"the prompt has {tokens} tokens, the text encoder reads {self._length}: shorten it")

    def _rows(self, prompt: Prompt, name: str, encoder: comfy.sd1_clip.SDClipModel) -> list[_Row]:
        """A prompt's rows for one encoder: ids and stacks of embeddings, with start, end and padding."""
        pieces: list[list[int] | Tensor] = []
        for part in [prompt] if isinstance(prompt, str) else prompt:
            if isinstance(part, str):
                pieces.append(self.tokenize(part))
                continue
            if name not in part:
                raise ValueError(f"a slot lacks the embeddings of text encoder {name!r}: it has {sorted(part)}")
            width = width_of(encoder)
            shape = tuple(part[name].shape)
            if len(shape) not in (2, 3) or shape[-1] != width:
                raise ValueError(f"a slot of text encoder {name!r} must be (n, {width}) or (batch, n, {width}), and is {shape}")
            pieces.append(part[name])
        sizes = {len(piece) for piece in pieces if isinstance(piece, Tensor) and piece.ndim == 3}
        if len(sizes) > 1:
            raise ValueError(f"the slots of a prompt differ in their batch: {sorted(sizes)}")
        used = sum(piece.shape[-2] if isinstance(piece, Tensor) else len(piece) for piece in pieces)
        self._fits(used)
        special = encoder.special_tokens
        tail = [special["end"]] + [special["pad"]] * (encoder.max_length - 2 - used)
        rows: list[_Row] = []
        for index in range(max(sizes, default=1)):
            row: _Row = [special["start"]]
            for piece in pieces:
                if isinstance(piece, Tensor):
                    row.append(piece[index] if piece.ndim == 3 else piece)
                else:
                    row.extend(piece)
            rows.append(row + tail)
        return rows


def graph_conditioning(conditioning: Conditioning) -> list[list[Any]]:
    """A CONDITIONING for the graph."""
    device = management.intermediate_device()
    pooled = {} if conditioning.pooled is None else {"pooled_output": conditioning.pooled.to(device)}
    return [[conditioning.context.to(device), pooled]]
