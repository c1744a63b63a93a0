"""A VAE as an ``Autoencoder``."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor


class GraphAutoencoder:
    """A VAE as an ``Autoencoder``, in the latent space of the MODEL it belongs to; not differentiable."""

    def __init__(self, vae: VAE, patcher: ModelPatcher) -> None:
        self._vae, self._patcher = vae, patcher

    def encode(self, pictures: Tensor) -> Tensor:
        with torch.inference_mode():
            latents = self._patcher.model.process_latent_in(self._vae.encode(pictures.movedim(1, -1)))
        return latents.to(self._patcher.load_device, torch.float32).clone()

    def decode(self, latents: Tensor) -> Tensor:
        with torch.inference_mode():
            pictures = self._vae.decode(self._patcher.model.process_latent_out(latents.detach().cpu())).movedim(-1, 1)
        return pictures.to(self._patcher.load_device, torch.float32).clone()
