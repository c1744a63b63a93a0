"""The weights that read the text: a MODEL as ``CrossAttention``, and edits as patches on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import comfy.lora
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher, get_key_weight
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from ...core.model import UnsupportedModel
from .checks import FLOAT, SUPPORTED

if TYPE_CHECKING:
    from ...core.edit import ContextEdit


class GraphCrossAttention:
    """A MODEL's cross-attention as ``core.model.CrossAttention``: its weights as its patches leave them, whatever is loaded at the moment.

    Raises UnsupportedModel for a network without cross-attention on a text.
    """

    def __init__(self, patcher: ModelPatcher) -> None:
        network = getattr(patcher.model, "diffusion_model", None)
        config = getattr(getattr(patcher.model, "model_config", None), "unet_config", {})
        if not isinstance(network, UNetModel) or not isinstance(config.get("context_dim"), int):
            raise UnsupportedModel(f"{type(patcher.model).__name__} models cannot be edited: {SUPPORTED}")
        self._patcher = patcher
        weights = network.state_dict().keys()
        diffusers = comfy.utils.unet_to_diffusers(config)
        self.keys = {
            path.removesuffix(".weight"): f"diffusion_model.{key}"
            for path, key in diffusers.items()
            if key in weights and (path.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) or path == "add_embedding.linear_1.weight")
        }
        """Per module, named as diffusers names it, the key of its weight."""

    def key_values(self) -> Iterator[tuple[str, Tensor]]:
        for path, key in self.keys.items():
            if "attn2" in path:
                yield path, self._seen(key)

    def pooled(self) -> tuple[str, Tensor] | None:
        path = "add_embedding.linear_1"
        return (path, self._seen(self.keys[path])) if path in self.keys else None

    def _seen(self, key: str) -> Tensor:
        weight, _, convert = get_key_weight(self._patcher.model, key)
        # Clones share modules: what is live may be another clone's, and what it was before lies aside.
        if key in self._patcher.backup:
            weight = self._patcher.backup[key].weight
        elif key in self._patcher.hook_backup:
            weight = self._patcher.hook_backup[key][0]
        if weight.dtype not in FLOAT or type(weight.data) is not Tensor:
            raise UnsupportedModel(
                "the MODEL is quantised, so its weights cannot be patched exactly: use Apply Edit to Conditioning on positive and negative "
                "instead (solve the edit on the fp16, bf16 or fp32 file of the same checkpoint)"
            )
        patches = self._patcher.patches.get(key, [])
        wrappers = self._patcher.weight_wrapper_patches.get(key, [])
        if convert is None and not patches and not wrappers:
            return weight.detach()
        with torch.inference_mode(False), torch.no_grad():
            seen = weight.to(torch.float32, copy=True)
            if convert is not None:
                seen = convert(seen, inplace=True)
            seen = comfy.lora.calculate_weight(patches, seen, key)
            for change in wrappers:
                seen = change(seen)
        return seen


def patch_model(model: ModelPatcher, edit: ContextEdit) -> ModelPatcher:
    """A clone of the MODEL with an edit as patches on its cross-attention, which add to LoRAs before and after it.

    Raises UnsupportedModel, saying what to connect instead, for a MODEL that is quantised or that the edit does not fit.
    """
    patched = model.clone()
    if edit.is_identity:
        return patched
    with torch.inference_mode(False), torch.no_grad():
        attention = GraphCrossAttention(model)
        patches = {
            attention.keys[path]: LoRAAdapter(set(), (patch.up, patch.down, None, None, None, None))
            for path, patch in edit.weight_patches(attention)
        }
    lacking = patches.keys() - set(patched.add_patches(patches))
    if lacking:
        raise UnsupportedModel(f"this MODEL has no {min(lacking)} to patch: use Apply Edit to Conditioning instead")
    return patched
