"""The demo model "Shapes" made known to ComfyUI, so that the stock checkpoint loader lists and loads it.

Loaders list every file with a model's ending in a registered folder, so none there may be a file that they cannot load.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.sd1_clip
import comfy.supported_models
import folder_paths
import torch
from comfy.supported_models_base import ClipTarget

WIDTH = 96
"""Width of the text encoder; with the UNet's 64 channels it tells the demo model from every other."""
_HEADS = 4
_TEXT = "cond_stage_model.transformer.text_model."
_DATA = Path(__file__).resolve().parents[1] / "core" / "demo" / "data"


class ShapesLatent(comfy.latent_formats.LatentFormat):
    """Latents at unit scale, with an exact linear preview."""

    scale_factor = 1.0

    def __init__(self) -> None:
        from ..core.demo.latent import LATENT_RGB, LATENT_RGB_BIAS

        self.latent_rgb_factors, self.latent_rgb_factors_bias = LATENT_RGB, LATENT_RGB_BIAS


class _Tokens(comfy.sd1_clip.SDTokenizer):
    def __init__(self, **kwargs: Any) -> None:
        # Files of textual-inversion embeddings are recognised by this width.
        super().__init__(embedding_size=WIDTH, **kwargs)


class ShapesTokenizer(comfy.sd1_clip.SD1Tokenizer):
    """CLIP's tokenizer, for embeddings of the demo model's width."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tokenizer=_Tokens, **kwargs)


class _Text(comfy.sd1_clip.SDClipModel):
    def __init__(self, textmodel_json_config: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(textmodel_json_config=dict(textmodel_json_config), return_projected_pooled=False, **kwargs)


class ShapesClip(comfy.sd1_clip.SD1ClipModel):
    """The demo model's text encoder."""

    @property
    def trained_words(self) -> tuple[str, ...]:
        """The words it was trained on; the other rows of its token table are random."""
        from ..core.demo.world import shapes_world

        return tuple(shapes_world().words)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(clip_model=_Text, **kwargs)


class ConceptKitShapes(comfy.supported_models.SD15):
    """SD 1.x at the demo model's widths; the number of blocks and layers is read from the weights."""

    unet_config = comfy.supported_models.SD15.unet_config | {"context_dim": WIDTH, "model_channels": 64}
    unet_extra_config = comfy.supported_models.SD15.unet_extra_config | {"num_heads": _HEADS}
    latent_format = ShapesLatent
    trained_side = 128

    def clip_target(self, state_dict: dict[str, torch.Tensor] | None = None) -> ClipTarget:
        weights = state_dict or {}
        layers = {m[1] for key in weights if (m := re.match(re.escape(_TEXT) + r"encoder\.layers\.(\d+)\.", key))}
        target = ClipTarget(ShapesTokenizer, ShapesClip)
        target.params["textmodel_json_config"] = {
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_attention_heads": _HEADS,
            "num_hidden_layers": len(layers),
            "hidden_act": "quick_gelu",
            "max_position_embeddings": 77,
            "eos_token_id": 49407,
        }
        return target


def register_demo_model() -> None:
    """Let ComfyUI recognise the demo model and list its file among the checkpoints. Does nothing the second time, under any name."""
    models = comfy.supported_models.models
    if not any(known.__name__ == ConceptKitShapes.__name__ for known in models):
        # First, so that no layout that matches by chance takes precedence.
        models.insert(0, ConceptKitShapes)
    folder_paths.add_model_folder_path("checkpoints", str(_DATA))
