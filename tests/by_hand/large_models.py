"""One gradient step through the diffusers host at the sizes of SD 1.5 and SDXL, on random weights; run by hand.

``python tests/by_hand/large_models.py sd15 sdxl`` (with the package installed, or ``.dev`` on PYTHONPATH) writes each pipeline in bfloat16
to a temporary folder (2 GB, 7 GB), loads it as any other, and prints seconds and the peak of resident memory. No file is fetched.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conceptkit.core.hosts.diffusers import DEMO, SCHEDULE, load_model
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": [CROSS.format("Down")] * 3 + [PLAIN.format("Down")],
        "up_block_types": [PLAIN.format("Up")] + [CROSS.format("Up")] * 3,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "sample_size": 64,
    },
    "sdxl": {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": [PLAIN.format("Down")] + [CROSS.format("Down")] * 2,
        "up_block_types": [CROSS.format("Up")] * 2 + [PLAIN.format("Up")],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
    },
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}


def write(folder: Path, build: Callable[[], Any], file: str) -> None:
    """A network's random weights in bfloat16, and its configuration."""
    with torch.device("meta"):
        module = build()
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in module.state_dict().items():
        if "norm" in name:
            weights[name] = torch.full(value.shape, float(name.endswith("weight")), dtype=torch.bfloat16)
        else:
            weights[name] = torch.empty(value.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    folder.mkdir()
    save_file(weights, folder / file, metadata={"format": "pt"})
    module.save_config(folder) if hasattr(module, "save_config") else module.config.save_pretrained(folder)


def write_pipeline(kind: str, folder: Path) -> None:
    """A pipeline folder of random weights."""
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    write(folder / "unet", lambda: UNet2DConditionModel(**UNETS[kind]), "diffusion_pytorch_model.safetensors")
    write(folder / "vae", lambda: AutoencoderKL(**VAE), "diffusion_pytorch_model.safetensors")
    write(folder / "text_encoder", lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L)), "model.safetensors")
    index["text_encoder"] = ["transformers", "CLIPTextModel"]
    if kind == "sdxl":
        write(
            folder / "text_encoder_2", lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G, hidden_act="gelu")), "model.safetensors"
        )
        index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
    (folder / "tokenizer").mkdir()
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(DEMO / file, folder / "tokenizer" / file)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULE), "utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")


def step(kind: str, folder: Path, cells: int, device: str) -> str:
    """Load, one forward, one gradient step to a token embedding; what they took, in a sentence."""
    start = time.perf_counter()
    model = load_model(folder, device=device, dtype=torch.bfloat16)
    loaded = time.perf_counter()
    slot = {name: table[[model.text.vocabulary["cat</w>"]]].clone().requires_grad_() for name, table in model.text.tables.items()}
    noise = torch.randn(1, 4, cells, cells, generator=torch.Generator().manual_seed(0))
    x = (noise * 5).to(model.denoiser.device)
    with torch.no_grad():
        model.denoise(x, 5.0, model.text.encode(["a photo of a cat"]))
    forward = time.perf_counter()
    model.denoise(x, 5.0, model.text.encode([["a photo of a", slot]])).square().mean().backward()
    backward = time.perf_counter()
    for name, rows in slot.items():
        if rows.grad is None or not torch.isfinite(rows.grad).all() or not rows.grad.any():
            raise AssertionError(f"no gradient reached the token embedding of {name!r}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    peak = peak / 1024 if sys.platform == "darwin" else peak
    return (
        f"{kind}, latents {cells}x{cells}, bfloat16 on {device}: loaded in {loaded - start:.0f} s, one forward {forward - loaded:.1f} s, "
        f"one gradient step {backward - forward:.1f} s, peak resident memory {peak:.1f} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="+", choices=sorted(UNETS))
    parser.add_argument("--cells", type=int, default=32, help="latent cells along one side")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="where the pipelines are written, kept and found again; by default a temporary folder")
    options = parser.parse_args()
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (options.folder or Path(temporary)) / kind
            if not folder.exists():
                folder.mkdir(parents=True)
                write_pipeline(kind, folder)
            sys.stdout.write(step(kind, folder, options.cells, options.device) + "\n")


if __name__ == "__main__":
    main()
