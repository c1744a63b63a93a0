"""The one key map between the single-file layout of SD 1.x and the names of diffusers and transformers.

A single file holds ``model.diffusion_model.*`` (the UNet in latent-diffusion names), ``cond_stage_model.transformer.text_model.*``
(CLIP text), ``first_stage_model.taesd_encoder.*`` and ``.taesd_decoder.*`` (the tiny autoencoder, with ``vae_scale`` and
``vae_shift``) and, for the demo model, ``conceptkit_scorer.*``. On the other side stand the state dicts of
``UNet2DConditionModel``, ``CLIPTextModel``, ``AutoencoderTiny`` and of the scorer. The map follows the number of levels, of
layers per level and the places of attention from the keys themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..artifact import KEY
from ..model import UnsupportedModel
from .scorer import Scorer

StateDict: TypeAlias = dict[str, Tensor]

UNET, TEXT, SCORER = "model.diffusion_model.", "cond_stage_model.transformer.text_model.", "conceptkit_scorer."
TABLE = TEXT + "embeddings.token_embedding.weight"
ROWS = TEXT + "embeddings.token_embedding.rows"
"""In a file that stands beside another: the numbers of the token table's rows it replaces; ``TABLE`` then holds those rows alone."""
VAE, VAE_ENCODER, VAE_DECODER = "first_stage_model.", "first_stage_model.taesd_encoder.", "first_stage_model.taesd_decoder."

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def _modules(layers: list[int], attended: set[str]) -> dict[str, str]:
    """Latent-diffusion module name to diffusers' for a UNet of ``layers[level]`` residual layers per level.

    ``attended`` holds, in either convention, the names of the places that carry attention; only the output side needs it, because
    there the upsampler comes after the attention and is counted.
    """
    pairs = dict(_ENDS)

    def resnet(ldm: str, diffusers: str) -> None:
        pairs.update({f"{ldm}.{a}": f"{diffusers}.{b}" for a, b in _RESNET.items()})

    block = 1
    for level, count in enumerate(layers):
        for i in range(count):
            resnet(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{i}")
            pairs[f"input_blocks.{block}.1"] = f"down_blocks.{level}.attentions.{i}"
            block += 1
        if level < len(layers) - 1:
            pairs[f"input_blocks.{block}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            block += 1
    for ldm, name in (("0", "resnets.0"), ("2", "resnets.1")):
        resnet(f"middle_block.{ldm}", f"mid_block.{name}")
    pairs["middle_block.1"] = "mid_block.attentions.0"
    block = 0
    for level, count in enumerate(reversed(layers)):
        for i in range(count + 1):
            ldm, diffusers = f"output_blocks.{block}.1", f"up_blocks.{level}.attentions.{i}"
            resnet(f"output_blocks.{block}.0", f"up_blocks.{level}.resnets.{i}")
            here = bool({ldm, diffusers} & attended)
            if here:
                pairs[ldm] = diffusers
            if i == count and level < len(layers) - 1:
                pairs[f"output_blocks.{block}.{2 if here else 1}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
            block += 1
    return pairs


def _renamed(sd: Mapping[str, Tensor], modules: Mapping[str, str]) -> StateDict:
    out: StateDict = {}
    for key, value in sd.items():
        cuts = [i for i, character in enumerate(key) if character == "."]
        cut = next((i for i in reversed(cuts) if key[:i] in modules), None)
        if cut is None:
            raise ValueError(f"unexpected UNet weight {key!r}: this is not a UNet in the layout of SD 1.x, 2.x or SDXL")
        out[modules[key[:cut]] + key[cut:]] = value
    return out


def unet_to_diffusers(sd: Mapping[str, Tensor]) -> StateDict:
    """A UNet's weights under diffusers' names, from latent-diffusion names without prefix. ValueError for a name without place."""
    samplers = sorted({int(m[1]) for k in sd if (m := re.match(r"input_blocks\.(\d+)\.0\.op\.", k))})
    blocks = [int(m[1]) for k in sd if (m := re.match(r"input_blocks\.(\d+)\.", k))]
    if not blocks:
        raise ValueError("no UNet in these weights: there is no input_blocks.0")
    edges = [0, *samplers, max(blocks) + 1]
    layers = [b - a - 1 for a, b in pairwise(edges)]
    attended = {m[1] for k in sd if (m := re.match(r"(output_blocks\.\d+\.1)\.transformer_blocks\.", k))}
    return _renamed(sd, _modules(layers, attended))


def unet_from_diffusers(sd: Mapping[str, Tensor]) -> StateDict:
    """A UNet's weights under latent-diffusion names without prefix, from diffusers' names. ValueError for a name without place."""
    counts: dict[int, int] = {}
    for key in sd:
        if m := re.match(r"down_blocks\.(\d+)\.resnets\.(\d+)\.", key):
            counts[int(m[1])] = max(counts.get(int(m[1]), 0), int(m[2]) + 1)
    if sorted(counts) != list(range(len(counts))) or not counts:
        raise ValueError("no UNet in these weights: there is no down_blocks.0")
    attended = {m[1] for k in sd if (m := re.match(r"(up_blocks\.\d+\.attentions\.\d+)\.", k))}
    modules = _modules([counts[level] for level in range(len(counts))], attended)
    return _renamed(sd, {diffusers: ldm for ldm, diffusers in modules.items()})


def _decoder_shift(key: str, by: int) -> str:
    # The single-file decoder counts its input clamp as layer 0; diffusers clamps outside its layers.
    index, _, rest = key.partition(".")
    if not index.isdecimal():
        raise ValueError(f"unexpected autoencoder weight {key!r}: a layer has a number")
    return f"{int(index) + by}.{rest}"


def to_single_file(
    unet_sd: Mapping[str, Tensor],
    text_sd: Mapping[str, Tensor],
    vae_sd: Mapping[str, Tensor],
    scorer_sd: Mapping[str, Tensor] | None = None,
) -> StateDict:
    """One state dict in the single-file layout from the four networks' own. Tensors are passed on as they are.

    ``text_sd`` may carry the ``text_model.`` prefix of older transformers. ``vae_scale`` 1 and ``vae_shift`` 0 are added: latents are
    at unit scale. Raises ValueError for a weight that has no place in the layout.
    """
    out = {UNET + k: v for k, v in unet_from_diffusers(unet_sd).items()}
    out |= {TEXT + k.removeprefix("text_model."): v for k, v in text_sd.items() if not k.endswith("position_ids")}
    for key, value in vae_sd.items():
        part, _, rest = key.partition(".layers.")
        if part == "encoder":
            out[VAE_ENCODER + rest] = value
        elif part == "decoder":
            out[VAE_DECODER + _decoder_shift(rest, 1)] = value
        else:
            raise ValueError(
                f"unexpected autoencoder weight {key!r}: only the tiny autoencoder (AutoencoderTiny) has a place in this layout"
            )
    out[VAE + "vae_scale"], out[VAE + "vae_shift"] = torch.tensor(1.0), torch.tensor(0.0)
    return out | {SCORER + k: v for k, v in (scorer_sd or {}).items()}


def from_single_file(sd: Mapping[str, Tensor]) -> tuple[StateDict, StateDict, StateDict, StateDict]:
    """The UNet's, text encoder's, tiny autoencoder's and scorer's state dicts from one in the single-file layout.

    Text names are those of transformers 5 (no ``text_model.`` prefix). The scorer's may be empty. Raises ValueError where a part is
    missing, a weight has no place, or latents are not at unit scale.
    """
    unet: StateDict = {}
    text: StateDict = {}
    vae: StateDict = {}
    scorer: StateDict = {}
    for key, value in sd.items():
        if key.startswith(UNET):
            unet[key[len(UNET) :]] = value
        elif key.startswith(TEXT):
            if not key.endswith("position_ids"):
                text[key[len(TEXT) :]] = value
        elif key.startswith(VAE_ENCODER):
            vae["encoder.layers." + key[len(VAE_ENCODER) :]] = value
        elif key.startswith(VAE_DECODER):
            vae["decoder.layers." + _decoder_shift(key[len(VAE_DECODER) :], -1)] = value
        elif key.startswith(SCORER):
            scorer[key[len(SCORER) :]] = value
        elif key in (VAE + "vae_scale", VAE + "vae_shift"):
            if value.numel() != 1 or float(value) != float(key.endswith("vae_scale")):
                raise ValueError(
                    f"{key} is {value.tolist()}: only a tiny autoencoder with latents at unit scale (scale 1, shift 0) can be read"
                )
        else:
            raise ValueError(
                f"unexpected weight {key!r}: only the demo's single-file layout (SD 1.x UNet, CLIP text, tiny autoencoder) can be read; "
                "convert other checkpoints to a diffusers folder first"
            )
    for part, name in ((unet, "UNet"), (text, "text encoder"), (vae, "tiny autoencoder")):
        if not part:
            raise ValueError(f"the file holds no {name} in the layout of SD 1.x: choose a complete checkpoint or a diffusers folder")
    return unet_to_diffusers(unet), text, vae, scorer


def read_single_file(path: str | Path, prefix: str = "") -> tuple[StateDict, dict[str, Any]]:
    """The tensors of a safetensors file whose names start with ``prefix``, and the JSON under its key ``conceptkit`` ({} without one).

    Raises FileNotFoundError, or ValueError for a file that is truncated, hostile or not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is truncated, damaged or no safetensors file ({error}): fetch or export it again") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path.name} has a damaged header: fetch or export it again")
    return tensors, header


def read_checkpoint(path: str | Path) -> tuple[StateDict, dict[str, Any]]:
    """All tensors of a checkpoint in the demo's layout, and its header.

    One whose header names another file under ``beside`` holds only what differs from that file, which lies in the same folder.
    Raises as ``read_single_file``, UnsupportedModel for a file that is no demo checkpoint, and ValueError where the two do not fit.
    """
    path = Path(path)
    tensors, header = read_single_file(path)
    if (header.get("format"), header.get("version")) != ("conceptkit-demo", 1):
        raise UnsupportedModel(f"{path.name} is not a demo checkpoint: convert other single files to a diffusers folder and give that")
    beside = header.get("beside")
    if beside is None:
        return tensors, header
    if not isinstance(beside, str) or Path(beside).name != beside:
        raise ValueError(f"{path.name} has a damaged header: fetch or export it again")
    base, _ = read_single_file(path.with_name(beside))
    rows, replaced, table = tensors.pop(ROWS, None), tensors.get(TABLE), base.get(TABLE)
    if rows is not None:
        if (
            replaced is None
            or table is None
            or rows.dtype != torch.int64
            or replaced.shape != (*rows.shape, *table.shape[1:])
            or bool(((rows < 0) | (rows >= len(table))).any())
        ):
            raise ValueError(f"the token rows in {path.name} do not fit {beside}: fetch or export both again")
        tensors[TABLE] = table.index_copy(0, rows, replaced.to(table))
    return base | tensors, header


def stand_beside(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> StateDict:
    """What of a state dict in the single-file layout differs from ``base``: what ``read_checkpoint`` completes again."""
    differs = {key: value for key, value in state.items() if key not in base or not torch.equal(value, base[key])}
    if TABLE in differs and TABLE in base:
        rows = (differs[TABLE] != base[TABLE]).any(1).nonzero()[:, 0]
        differs |= {TABLE: differs[TABLE][rows], ROWS: rows}
    return differs


def read_scorer(path: str | Path) -> Scorer:
    """The image scorer in a demo checkpoint, as ``scorer_network``; nothing else of the file is read.

    Raises FileNotFoundError, UnsupportedModel for a file whose text encoder has no projection into one space with pictures, or
    ValueError for one that is damaged.
    """
    tensors, header = read_single_file(path, SCORER)
    state, name = {key.removeprefix(SCORER): value for key, value in tensors.items()}, Path(path).name
    if (header.get("format"), header.get("version")) != ("conceptkit-demo", 1) or "text_projection.weight" not in state:
        raise UnsupportedModel(
            f"{name} holds no image scorer: nothing in it projects its text encoder's states into one space with images; "
            "choose shapes.safetensors, which comes with ConceptKit"
        )
    return scorer_network(state, header, name)


def scorer_network(state: StateDict, header: Mapping[str, Any], name: str) -> Scorer:
    """The scorer that a demo checkpoint's header describes, with its weights: frozen, float32, on the CPU.

    Raises ValueError, naming the file ``name``, when the weights are others than those the header promises.
    """
    try:
        with torch.device("meta"):  # names and shapes are checked before anything of a header's size is allocated
            network = Scorer(**header["scorer"])
        assign_weights(network, state)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the scorer's weights in {name} do not fit its header ({first_line(error)}): fetch or export it again") from error
    return network.float().eval().requires_grad_(False)


def assign_weights(module: nn.Module, state: StateDict) -> None:
    """Give a module built on the meta device its weights. RuntimeError when names or shapes differ."""
    module.load_state_dict(state, assign=True)
    for owner in module.modules():
        for key, buffer in list(owner.named_buffers(recurse=False)):
            if buffer.is_meta:  # CLIP's position numbers, which no file stores
                setattr(owner, key, torch.arange(buffer.numel(), dtype=buffer.dtype).view(buffer.shape))


def first_line(error: Exception) -> str:
    """What an exception says first, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
