"""Cross-attention weights streamed from a model, their Gram matrix, and what is kept on disk about them."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from .. import artifact
from ..model import CrossAttention, Model, NonFinite, UnsupportedModel

logger = logging.getLogger(__name__)

CACHE_FORMAT, CACHE_VERSION = "conceptkit-cache", 1


def cross_attention(model: Model) -> CrossAttention:
    """The model's access to its weights. Raises UnsupportedModel where there is none."""
    if model.cross_attention is None:
        raise UnsupportedModel(f"the weights of {model.name} cannot be read: connect an SD 1.x, SD 2.x or SDXL model in fp16, bf16 or fp32")
    return model.cross_attention


def weights(attention: CrossAttention, width: int) -> Iterator[tuple[str, Tensor]]:
    """Path and weight (out, width) of every to_k and to_v, on the CPU in their own dtype.

    Raises ValueError for weights that read text of another width, UnsupportedModel for a model that has none or whose weights are no
    numbers.
    """
    found = False
    for path, weight in attention.key_values():
        found = True
        if not weight.is_floating_point():
            raise UnsupportedModel(
                f"{path} is quantised ({weight.dtype}): load the model in fp16, bf16 or fp32, or apply the edit to CONDITIONING"
            )
        if weight.ndim != 2 or weight.shape[1] != width:
            raise ValueError(
                f"{path} is {'x'.join(map(str, weight.shape))} and the edit is for text of width {width}: "
                "use the model family the edit was solved on, or solve it again on this model"
            )
        yield path, weight.detach().cpu()
    if not found:
        raise UnsupportedModel("the model has no cross-attention to_k and to_v weights: connect an SD 1.x, SD 2.x or SDXL model")


def in_single(attention: CrossAttention, width: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Path and weight as ``weights`` yields them, and the weight's values in float32, which hold until the next one is asked for.

    One buffer for all: memory taken and given back between what a caller keeps of each layer piles up. Raises as ``weights`` does.
    """
    room = torch.empty(0)
    for path, weight in weights(attention, width):
        if weight.numel() > room.numel():
            room = torch.empty(weight.numel())
        yield path, weight, room[: weight.numel()].view(weight.shape).copy_(weight)


@dataclass(frozen=True, eq=False)
class Gram:
    """G = sum_l W_l^T W_l over every to_k and to_v, (width, width) float64: what a distance between embeddings is worth to the model.

    pooled: the same for the pooled text's layer, (pooled, pooled), or None. key: a hash of the weights.
    """

    matrix: Tensor
    pooled: Tensor | None
    key: str


def gram(model: Model, width: int, pooled_width: int | None, cache: Path | None = None) -> Gram:
    """The Gram matrix of a model's weights, found in ``cache`` by the weights' own hash or computed and put there.

    Products in float32, sums in float64. Raises NonFinite for weights that hold NaN or infinity, what ``weights`` raises, and, before any
    layer, what ``model.before_call`` does.
    """
    attention = cross_attention(model)
    key = weights_hash(attention, width)

    def compute() -> dict[str, Tensor]:
        total = torch.zeros(width, width, dtype=torch.float64)
        for path, _, weight in in_single(attention, width):
            model.before_call()
            product = weight.T @ weight
            if not torch.isfinite(product).all():
                raise NonFinite(f"the weight {path} holds NaN, infinity or numbers too large to square: load the checkpoint again")
            total += product
        result = {"matrix": total}
        layer = None if pooled_width is None else attention.pooled()
        if layer is not None and pooled_width is not None:
            w = layer[1].detach().cpu()[:, :pooled_width].float()
            result["pooled"] = (w.T @ w).double()
        return result

    shapes = {"matrix": (width, width)} | ({} if pooled_width is None else {"pooled": (pooled_width, pooled_width)})
    found = cached(cache, f"gram-{key[:16]}", {"key": key}, shapes, compute)
    return Gram(found["matrix"], found.get("pooled"), key)


def weights_hash(attention: CrossAttention, width: int) -> str:
    """SHA-256 of the paths and values of the weights that read the text: equal weights have an equal hash, on any host of one precision."""
    digest = hashlib.sha256()
    layer = attention.pooled()
    for path, weight in chain(weights(attention, width), [] if layer is None else [layer]):
        digest.update(f"{path} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cached(
    folder: Path | None,
    name: str,
    identity: dict[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    compute: Callable[[], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Float64 tensors from a file, if they were computed from the same, else computed and put there.

    folder: None computes them. One that cannot be written is a warning in the log.
    name: of the file. Another ``identity`` under the same name replaces what is there.
    identity: what the tensors were computed from, as texts and hashes.
    shapes: of the tensors by name. A file with others is computed again.
    compute: makes the tensors.
    """
    if folder is None:
        return compute()
    path = folder / f"{name}.safetensors"
    header = {"format": CACHE_FORMAT, "version": CACHE_VERSION, **identity}
    if os.path.isfile(path):
        try:
            tensors, found = artifact.read(path, CACHE_FORMAT, CACHE_VERSION, lambda _: {n: (torch.float64, s) for n, s in shapes.items()})
        except artifact.ArtifactError as error:
            logger.warning("%s; it is computed again", error)
        else:
            if found == header:
                return tensors
    result = compute()
    artifact.write_spare(path, result, header)
    return result
