"""The key map between the single-file layout and the names of diffusers and transformers."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from conceptkit.core.hosts import checkpoint
from conceptkit.core.hosts.scorer import Scorer
from conceptkit.core.model import UnsupportedModel
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

LAYOUTS = {
    "attention below": {"channels": (32, 64), "layers": 1, "attention": (False, True)},
    "attention everywhere": {"channels": (32, 32, 64), "layers": 2, "attention": (True, True, True)},
    "sd1": {"channels": (32, 32, 32, 32), "layers": 2, "attention": (True, True, True, False)},
    "one level": {"channels": (32,), "layers": 3, "attention": (True,)},
    "sdxl": {"channels": (32, 32, 32), "layers": 2, "attention": (False, True, True), "transformer_layers_per_block": (1, 2, 3)},
}


def unet(channels: tuple[int, ...], layers: int, attention: tuple[bool, ...], **more: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        cross_attention_dim=24,
        attention_head_dim=2,
        **more,
    )


def text() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, projection_dim=24)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_exact(layout: str) -> None:
    parts = [unet(**LAYOUTS[layout]).state_dict(), text().state_dict(), AutoencoderTiny().state_dict(), {"a.weight": torch.ones(2)}]
    single = checkpoint.to_single_file(*parts)
    for before, after in zip(parts, checkpoint.from_single_file(single), strict=True):
        before = {k.removeprefix("text_model."): v for k, v in before.items()}
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)
    again = checkpoint.to_single_file(*checkpoint.from_single_file(single))
    assert again.keys() == single.keys()


def test_names_of_the_single_file() -> None:
    """The places a reader of the layout counts on: samplers after attention, the decoder shifted by its clamp."""
    single = checkpoint.to_single_file(unet(**LAYOUTS["attention below"]).state_dict(), text().state_dict(), AutoencoderTiny().state_dict())
    for key in (
        "model.diffusion_model.input_blocks.2.0.op.weight",
        "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.middle_block.2.out_layers.3.weight",
        "model.diffusion_model.output_blocks.1.2.conv.weight",
        "model.diffusion_model.output_blocks.3.0.skip_connection.weight",
        "model.diffusion_model.out.2.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight",
        "first_stage_model.taesd_encoder.14.weight",
        "first_stage_model.taesd_decoder.1.weight",
        "first_stage_model.taesd_decoder.19.bias",
        "first_stage_model.vae_scale",
    ):
        assert key in single, key
    assert not any(key.startswith("model.diffusion_model.input_blocks.1.1") for key in single)


def test_upsampler_without_attention_stands_first() -> None:
    single = checkpoint.unet_from_diffusers(unet(channels=(32, 64), layers=1, attention=(True, False)).state_dict())
    assert "output_blocks.1.1.conv.weight" in single


def test_refuses_what_has_no_place() -> None:
    single = checkpoint.to_single_file(unet(**LAYOUTS["attention below"]).state_dict(), text().state_dict(), AutoencoderTiny().state_dict())
    for changed, match in (
        ({"model.diffusion_model.time_mix.weight": torch.ones(1)}, "time_mix"),
        ({"first_stage_model.decoder.conv_in.weight": torch.ones(1)}, "diffusers folder"),
        ({"first_stage_model.vae_scale": torch.tensor(0.18215)}, "unit scale"),
        ({"first_stage_model.vae_shift": torch.zeros(2)}, "unit scale"),
        ({"first_stage_model.taesd_decoder.x.weight": torch.ones(1)}, "a layer has a number"),
    ):
        with pytest.raises(ValueError, match=match):
            checkpoint.from_single_file(single | changed)
    for prefix, match in ((checkpoint.UNET, "UNet"), (checkpoint.TEXT, "text encoder"), (checkpoint.VAE, "autoencoder")):
        with pytest.raises(ValueError, match=match):
            checkpoint.from_single_file({k: v for k, v in single.items() if not k.startswith(prefix)})


def test_reading_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(3.0)}, path, metadata={"conceptkit": json.dumps({"format": "x"})})
    tensors, header = checkpoint.read_single_file(path)
    assert torch.equal(tensors["a"], torch.arange(3.0)) and header == {"format": "x"}
    whole = path.read_bytes()
    for damaged in (b"", whole[:-4], whole[:20], struct.pack("<Q", 1 << 60) + whole[8:], b"\x80\x04pickle" * 10):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            checkpoint.read_single_file(path)
    save_file({"a": torch.zeros(1)}, path, metadata={"conceptkit": "[1"})
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        checkpoint.read_single_file(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint.read_single_file(tmp_path / "nowhere.safetensors")


def scorer_file(path: Path, *, without: str = "-", **header: object) -> Path:
    """A small untrained scorer beside a weight of another part."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = {"conceptkit_scorer." + key: value.half() for key, value in Scorer(8).state_dict().items() if without not in key}
    stated = {"format": "conceptkit-demo", "version": 1, "scorer": {"width": 8}} | header
    save_file(state | {"model.diffusion_model.out.0.bias": torch.ones(2)}, path, {"conceptkit": json.dumps(stated)})
    return path


def test_the_scorer_is_read_alone(tmp_path: Path) -> None:
    scorer = checkpoint.read_scorer(scorer_file(tmp_path / "a.safetensors"))
    assert not scorer.training
    assert {(p.dtype, p.requires_grad, p.device.type) for p in scorer.parameters()} == {(torch.float32, False, "cpu")}
    vectors = scorer.pictures(torch.rand(2, 3, 40, 40))
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))
    assert float(scorer.log_scale) == 2.5


@pytest.mark.parametrize(
    "header", [{"scorer": {"width": 1 << 40}}, {"scorer": {"width": 16}}, {"scorer": {"width": "wide"}}, {"scorer": 1}]
)
def test_a_scorer_of_other_sizes_than_promised_is_refused(tmp_path: Path, header: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"the scorer's weights in a\.safetensors do not fit its header") as caught:
        checkpoint.read_scorer(scorer_file(tmp_path / "a.safetensors", **header))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"without": "text_projection"}, {"without": ""}, {"format": "other"}, {"version": 2}])
def test_a_file_without_a_scorer_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(UnsupportedModel, match=r"a\.safetensors holds no image scorer.*choose shapes\.safetensors"):
        checkpoint.read_scorer(scorer_file(tmp_path / "a.safetensors", **change))


def beside(folder: Path, rows: torch.Tensor, name: object = "base.safetensors", **more: torch.Tensor) -> Path:
    header = {"format": "conceptkit-demo", "version": 1}
    save_file({checkpoint.TABLE: torch.zeros(6, 2), "kept": torch.ones(3)}, folder / "base.safetensors", {"conceptkit": json.dumps(header)})
    path = folder / "other.safetensors"
    save_file({checkpoint.ROWS: rows, **more}, path, {"conceptkit": json.dumps({**header, "beside": name})})
    return path


def test_a_file_beside_another_holds_what_differs(tmp_path: Path) -> None:
    base = {checkpoint.TABLE: torch.zeros(6, 2), "kept": torch.ones(3), "changed": torch.ones(1)}
    other = {**base, checkpoint.TABLE: torch.zeros(6, 2).index_fill(0, torch.tensor([1, 4]), 2.0), "changed": torch.zeros(1)}
    differs = checkpoint.stand_beside(other, base)
    assert differs.keys() == {checkpoint.TABLE, checkpoint.ROWS, "changed"}
    assert differs[checkpoint.TABLE].shape == (2, 2)
    path = beside(tmp_path, differs.pop(checkpoint.ROWS), **differs)
    whole, _ = checkpoint.read_checkpoint(path)
    assert whole.keys() == base.keys()
    assert all(torch.equal(whole[key], other[key]) for key in other)


@pytest.mark.parametrize(
    ("rows", "name"),
    [([0, 6], "base.safetensors"), ([-1, 0], "base.safetensors"), ([0], "base.safetensors"), ([0, 1], "../base.safetensors"), ([0, 1], 3)],
)
def test_a_file_that_does_not_fit_the_one_beside_it_is_refused(tmp_path: Path, rows: list[int], name: object) -> None:
    path = beside(tmp_path, torch.tensor(rows), name, **{checkpoint.TABLE: torch.ones(2, 2)})
    with pytest.raises(ValueError, match="export"):
        checkpoint.read_checkpoint(path)
