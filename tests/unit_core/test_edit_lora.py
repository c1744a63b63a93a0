"""An edit's LoRA file through diffusers' own loader gives the edited weights' output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conceptkit.core.edit import save_lora, solve_edit
from conceptkit.core.edit.layers import cross_attention
from conceptkit.core.hosts.diffusers import load_model
from conceptkit.core.model import Model

pytest.importorskip("peft", reason="diffusers loads LoRAs with peft")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-3)])
def test_diffusers_loads_it_exactly(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    from diffusers import StableDiffusionPipeline

    model = load_model("demo")
    edit = solve_edit(model, ["circle -> square"], method="uce-2025")
    path = save_lora(edit, cross_attention(model), tmp_path / "no-circle.safetensors", dtype=dtype)
    conditioning = model.text.encode(["a photo of a red circle"])
    x, sigma = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 3, torch.tensor([3.0])
    with torch.no_grad():
        plain = model.denoise(x, sigma, conditioning)
        wanted = model.denoise(x, sigma, edit.apply_to_conditioning(conditioning))
        state, alphas = StableDiffusionPipeline.lora_state_dict(str(path))
        unet(model).load_lora_adapter(state, network_alphas=alphas, prefix="unet")
        found = model.denoise(x, sigma, conditioning)
    size = float(wanted.abs().max())
    assert float((plain - wanted).abs().max()) > 0.02 * size
    assert float((found - wanted).abs().max()) < tolerance * size


def unet(model: Model):
    return model.denoiser._unet
