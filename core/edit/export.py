"""An edit as a LoRA file that loads where ConceptKit is not installed: the stock loaders of ComfyUI, diffusers and others."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..artifact import ArtifactError, beside
from ..model import CrossAttention
from .context_edit import ContextEdit

_OTHER_NAMES = {"add_embedding.linear_1": "label_emb_0_0"}
"""Layers that loaders know by the name they have in the original UNet only."""


def lora_tensors(edit: ContextEdit, attention: CrossAttention, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """The edit as a LoRA in kohya's naming: per layer ``lora_unet_<path>`` with ``.lora_down.weight`` V^T (rank, in), ``.lora_up.weight``
    W U (out, rank) and ``.alpha`` = rank, so that strength 1 is the edit. Exact up to ``dtype`` for the weights it was made from.

    Raises ValueError for the identity, which loaders take for a broken file, or a number that ``dtype`` cannot hold; and what
    ``ContextEdit.weight_patches`` raises.
    """
    if edit.is_identity:
        raise ValueError("the edit changes nothing, and a LoRA file cannot be empty: erase something, or raise the strength above 0")
    tensors: dict[str, Tensor] = {}
    for path, patch in edit.weight_patches(attention):
        name = "lora_unet_" + _OTHER_NAMES.get(path, path.replace(".", "_"))
        # Copies: the layers share one factor, and the format stores no shared memory.
        up, down = patch.up.to(dtype), patch.down.to(dtype, copy=True)
        if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
            raise ValueError(f"the edit of {path} does not fit in {dtype}: save the LoRA in float32")
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = up
        tensors[f"{name}.alpha"] = torch.tensor(float(patch.up.shape[1]), dtype=dtype)
    return tensors


def save_lora(
    edit: ContextEdit, attention: CrossAttention, path: str | Path, *, dtype: torch.dtype = torch.float16, overwrite: bool = False
) -> Path:
    """Write the edit as a LoRA file, completely or not at all, and return its path.

    edit: a loader's strength 1 is the edit as it is; 0 is none.
    attention: the weights of the model that the LoRA is for. It fits no other checkpoint exactly.
    path: the file.
    dtype: float16 makes the file half as large; float32 is exact up to its own rounding.
    overwrite: whether a file that is there may be replaced.

    Raises ArtifactError for a path that exists unless ``overwrite``, and what ``lora_tensors`` raises.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise ArtifactError(f"{path} exists: choose another name, or delete it first")
    tensors = lora_tensors(edit, attention, dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(edit.rank),
        "modelspec.title": "without " + "; ".join(map(str, edit.concepts)),
    }
    try:
        save_file(tensors, temporary, metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
