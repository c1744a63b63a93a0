"""A VAE as an ``Autoencoder``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

from .residency import Resident, ordinary

_GRADIENT_MEMORY = 3
"""A forward that keeps its activations and its backward take this many times what ComfyUI reckons with for a forward (SD's VAE: 2.3 to 2.8
times for decoding 256 and 128 pixels, less for encoding)."""


class GraphAutoencoder:
    """A VAE as an ``Autoencoder``, in the latent space of the MODEL it belongs to.

    Where a gradient to its input is asked for, the network runs under autograd, whole and in its own precision; otherwise through ComfyUI's
    own calls, which fall back to tiles where memory is short. lasting: the VAE's patcher, or a copy that autograd can save the weights of;
    asked for when the first gradient is. beside: the patchers whose weights a gradient may need as well, so they stay loaded.
    """

    def __init__(
        self, vae: VAE, patcher: ModelPatcher, lasting: Callable[[ModelPatcher], ModelPatcher], beside: tuple[ModelPatcher, ...] = ()
    ) -> None:
        self._vae, self._patcher, self._lasting, self._beside = vae, patcher, lasting, beside
        self._own: ModelPatcher | None = None

    def encode(self, pictures: Tensor) -> Tensor:
        if torch.is_grad_enabled() and pictures.requires_grad:
            pixels = self._vae.vae_encode_crop_pixels(pictures.movedim(1, -1)).movedim(-1, 1)
            network = self._loaded(self._vae.memory_used_encode(pixels.shape, self._vae.vae_dtype))
            encoded = network.encode(self._vae.process_input(self._moved(pixels))).float()
            return self._patcher.model.process_latent_in(encoded).to(self._patcher.load_device)
        with torch.inference_mode():
            latents = self._patcher.model.process_latent_in(self._vae.encode(pictures.movedim(1, -1)))
        return latents.to(self._patcher.load_device, torch.float32).clone()

    def decode(self, latents: Tensor) -> Tensor:
        if torch.is_grad_enabled() and latents.requires_grad:
            network = self._loaded(self._vae.memory_used_decode(latents.shape, self._vae.vae_dtype))
            decoded = network.decode(self._moved(self._patcher.model.process_latent_out(latents)))
            # A copy: process_output writes into what it is given.
            return self._vae.process_output(decoded.to(torch.float32, copy=True)).to(self._patcher.load_device)
        with torch.inference_mode():
            pictures = self._vae.decode(self._patcher.model.process_latent_out(latents.detach().cpu())).movedim(-1, 1)
        return pictures.to(self._patcher.load_device, torch.float32).clone()

    def _moved(self, values: Tensor) -> Tensor:
        return ordinary(values).to(self._vae.device, self._vae.vae_dtype)

    def _loaded(self, memory: float) -> Any:
        """The network, loaded with weights that autograd can save, beside what else a gradient needs."""
        if self._own is None:
            self._own = self._lasting(self._vae.patcher)
        management.throw_exception_if_processing_interrupted()
        # Anew each time: in between, ComfyUI's own calls may have moved the weights.
        Resident(*self._beside, self._own, memory=_GRADIENT_MEMORY * memory).load()
        return self._own.model
