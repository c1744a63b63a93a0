"""The demo model's networks, in the layout of SD 1.x at a fraction of its size."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from ..hosts.scorer import Scorer

WIDTH = 96
"""Width of the text encoder, which is unique among the layouts hosts know: they recognise the model by it."""
VOCABULARY = 49408
START, END = 49406, 49407
POSITIONS = 77
SCHEDULE: dict[str, Any] = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""SD's noise schedule."""

UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [64, 128],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": WIDTH,
    # in this layout of the library the name means the number of heads
    "attention_head_dim": 4,
    "norm_num_groups": 32,
}
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": POSITIONS,
    "vocab_size": VOCABULARY,
    "bos_token_id": START,
    "eos_token_id": END,
    "pad_token_id": END,
    "projection_dim": WIDTH,
}
AUTOENCODER: dict[str, Any] = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "scaling_factor": 1.0}


def build_unet() -> UNet2DConditionModel:
    """The denoiser, untrained."""
    return UNet2DConditionModel(**UNET)


def build_text_encoder(vocabulary: int = VOCABULARY) -> CLIPTextModel:
    """The text encoder, untrained, with a token table of ``vocabulary`` rows, of which the last two are start and end."""
    special = (
        {} if vocabulary == VOCABULARY else {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    )
    return CLIPTextModel(CLIPTextConfig(**{**TEXT, "vocab_size": vocabulary, **special}))


def build_autoencoder() -> AutoencoderTiny:
    """The autoencoder in TAESD's layout, untrained."""
    return AutoencoderTiny(**AUTOENCODER)


def build_scorer() -> Scorer:
    """The image scorer, untrained."""
    return Scorer(WIDTH)
