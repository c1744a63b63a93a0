"""A MODEL as a ``Denoiser``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...core.model import Conditioning
from .checks import trained_side
from .gradients import plain_attention, saving
from .residency import Resident, ordinary


class GraphDenoiser:
    """A MODEL as a ``Denoiser``."""

    def __init__(self, patcher: ModelPatcher, resident: Resident, on_denoised: Callable[[Tensor], None] | None = None) -> None:
        self._patcher, self._resident, self._on_denoised = patcher, resident, on_denoised
        self._sigmas = patcher.get_model_object("model_sampling").sigmas.detach().float().cpu().clone()

    @property
    def latent_channels(self) -> int:
        return int(self._patcher.model.latent_format.latent_channels)

    @property
    def downscale(self) -> int:
        return 8

    @property
    def side(self) -> int:
        return trained_side(self._patcher)

    @property
    def training_sigmas(self) -> Tensor:
        return self._sigmas

    @property
    def device(self) -> torch.device:
        return self._patcher.load_device

    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        self._resident.load()
        device = self.device
        x, sigma = ordinary(x).to(device, torch.float32), ordinary(sigma).to(device, torch.float32)
        conditioning = conditioning.map(lambda t: ordinary(t).to(device))
        options = dict(self._patcher.model_options["transformer_options"])
        options |= {"wrappers": self._patcher.wrappers, "callbacks": self._patcher.callbacks, "sigmas": sigma}
        options |= {"cond_or_uncond": [0], "uuids": [self._patcher.patches_uuid]}
        # The fast attentions have no backward, and the CPU's default loses it when it works in chunks.
        if torch.is_grad_enabled() or "optimized_attention_override" not in options:
            options["optimized_attention_override"] = plain_attention
        if torch.is_grad_enabled() and "patches" in options:
            options["patches"] = {name: list(map(saving, patches)) for name, patches in options["patches"].items()}
        inputs: dict[str, Any] = {"c_crossattn": conditioning.context, "transformer_options": options}
        if conditioning.pooled is not None:
            inputs["y"] = self._class_embedding(x, conditioning)
        apply = self._patcher.model.apply_model
        wrapper = self._patcher.model_options.get("model_function_wrapper")
        if wrapper is not None:
            denoised = wrapper(apply, {"input": x, "timestep": sigma, "c": inputs, "cond_or_uncond": [0]})
        else:
            denoised = apply(x, sigma, **inputs)
        if self._on_denoised is not None:
            self._on_denoised(denoised.detach())
        return denoised

    def _class_embedding(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = x.shape[-2] * self.downscale, x.shape[-1] * self.downscale
        size = conditioning.size or (height, width, 0, 0, height, width)
        names = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")
        y = self._patcher.model.encode_adm(pooled_output=conditioning.pooled, device=self.device, **dict(zip(names, size, strict=True)))
        return y.to(self.device)
