"""Hashes of models and scorers as they are wired: what a result was made from."""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType
from typing import Any

import comfy.model_base
import torch
from blake3 import blake3
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ...core.model import ImageScorer


def graph_identity(*parts: ModelPatcher | CLIP | VAE) -> str | None:
    """A hash of models as they are wired: their weights, LoRAs, merges, samplings and clip skip, whatever is loaded at the moment.

    None when it cannot be told, because a node changed how the model computes by code of its own (FreeU, LoRAs in bypass mode).
    """
    digest = blake3(max_threads=torch.get_num_threads())
    try:
        for part in parts:
            _hash(digest, [type(part), getattr(part, "layer_idx", None), type(getattr(part, "tokenizer", None))])
            _hash(digest, _content(part if isinstance(part, ModelPatcher) else part.patcher))
    except _Opaque:
        return None
    return digest.hexdigest()


def scorer_identity(scorer: ImageScorer) -> str:
    """A hash of what a scorer makes of a picture and a text."""
    digest = blake3()
    with torch.inference_mode():
        picture = torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64)
        _hash(digest, [scorer.embed_pictures(picture), scorer.embed_texts(["a photo of a red bird"]), scorer.logit_scale])
    return digest.hexdigest()


def _content(patcher: ModelPatcher) -> list[Any]:
    """Everything that decides what a patcher's network computes."""
    base, options = patcher.model, patcher.model_options
    dtype = base.get_dtype_inference() if isinstance(base, comfy.model_base.BaseModel) else None
    names = {*patcher.object_patches, *(["model_sampling"] if hasattr(base, "model_sampling") else [])}
    objects = {name: patcher.get_model_object(name) for name in names}
    prefixes = tuple(f"{name}." for name in names)
    weights = {key: weight for key, weight in patcher.model_state_dict().items() if not key.startswith(prefixes)}
    # The live weights may be those of another clone; what they were before lies aside.
    weights |= {key: saved.weight for key, saved in patcher.backup.items() if key in weights}
    weights |= {key: saved[0] for key, saved in patcher.hook_backup.items() if key in weights}
    code = [patcher.weight_wrapper_patches, patcher.injections, patcher.wrappers, patcher.callbacks, patcher.additional_models]
    code += [options["transformer_options"], options.get("model_function_wrapper")]
    return [type(base), type(getattr(base, "model_config", None)), dtype, weights, objects, patcher.patches, code]


class _Opaque(Exception):
    """A value that cannot be hashed by what it holds."""


def _hash(digest: blake3, value: Any) -> None:
    """Add a value to a hash by what it holds; raises _Opaque for anything that does not say what it does."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        text = f"{type(value).__name__} {value}".encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    elif isinstance(value, Mapping):
        _hash(digest, [f"mapping {len(value)}", *(part for key in sorted(value, key=repr) for part in (repr(key), value[key]))])
    elif isinstance(value, (list, tuple)):
        _hash(digest, f"list {len(value)}")
        for item in value:
            _hash(digest, item)
    elif isinstance(value, type):
        _hash(digest, [f"{kind.__module__}.{kind.__qualname__}" for kind in value.__mro__])
    elif isinstance(value, WeightAdapterBase):
        _hash(digest, [type(value), value.weights])
    elif isinstance(value, torch.nn.Module):
        settings = {name: item for name, item in vars(value).items() if not name.startswith("_")}
        _hash(digest, [type(value), dict(value.named_parameters()), dict(value.named_buffers()), settings])
    elif isinstance(value, FunctionType) and not (value.__closure__ or value.__defaults__ or value.__kwdefaults__):
        _hash(digest, [f"{value.__module__}.{value.__qualname__}", value.__code__.co_code.hex()])
    else:
        raise _Opaque(type(value))
