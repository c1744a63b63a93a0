"""The demo model through ComfyUI's own nodes, and the pack's own start."""

from __future__ import annotations

import re

import pytest
import torch
from conceptkit.tests.comfy.graphs import node
from safetensors.torch import load_file, save_file

WIDTH = 96
UNET_KEY = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
CLIP_KEY = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


def sampled(comfy, *, model=("loader", 0), clip=("loader", 1), prompt="a red circle", seed=3, steps=4, cfg=4.0):
    """A stock graph from prompt to picture."""
    return comfy.loaders() | {
        "positive": node("CLIPTextEncode", clip=list(clip), text=prompt),
        "negative": node("CLIPTextEncode", clip=list(clip), text=""),
        "empty": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "sampler": node(
            "KSampler",
            model=list(model),
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
    }


@pytest.fixture(scope="module")
def lora(comfy):
    """A stock LoRA file for one cross-attention and one text layer."""
    generator = torch.Generator().manual_seed(1)
    sd = {}
    for key, out in ((UNET_KEY, 128), (CLIP_KEY, WIDTH)):
        sd[f"{key}.lora_up.weight"] = torch.randn(out, 2, generator=generator) * 0.3
        sd[f"{key}.lora_down.weight"] = torch.randn(2, WIDTH, generator=generator) * 0.3
        sd[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(sd, comfy.base / "models" / "loras" / "tiny.safetensors")
    return "tiny.safetensors"


def test_the_checkpoint_loader_recognises_the_demo_model(comfy):
    found = comfy.probe("detected")
    assert found == {"class": "ConceptKitShapes", "clip": "ShapesClip", "vae": "TAESD", "scale": 1.0, "preview": 4, "inference": True}
    assert not re.search(r"(unet|clip) missing|unet unexpected|Missing VAE keys", comfy.log.read_text())


def test_registering_twice_changes_nothing(comfy):
    assert comfy.probe("registered") == {"known": 1, "first": "ConceptKitShapes", "folders": 1}


def test_the_pack_loads_fully(comfy):
    """And quickly, because of what tests/unit_nodes/test_files.py says of its imports: the log has the seconds."""
    log = comfy.log.read_text()
    assert not re.search(r"Cannot import .*conceptkit", log)
    assert re.search(r"[\d.]+ seconds: .*conceptkit\b", log)


def test_stock_nodes_sample_a_picture(comfy):
    graph = sampled(comfy) | {
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["loader", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="stock"),
    }
    (image,) = comfy.run(graph)["save"]["images"]
    assert (comfy.base / "output" / image["filename"]).is_file()


def wiring(kind):
    """Extra nodes, and where MODEL and CLIP then come from."""
    tail = {"lora_name": "tiny.safetensors", "strength_model": 1.0, "strength_clip": 1.0}
    lora = {"lora": node("LoraLoader", model=["loader", 0], clip=["loader", 1], **tail)}
    return {
        "plain": ({}, ["loader", 0], ["loader", 1]),
        "lora": (lora, ["lora", 0], ["lora", 1]),
        "clip skip": ({"skip": node("CLIPSetLastLayer", clip=["loader", 1], stop_at_clip_layer=-2)}, ["loader", 0], ["skip", 0]),
        "v": ({"v": node("ModelSamplingDiscrete", model=["loader", 0], sampling="v_prediction", zsnr=False)}, ["v", 0], ["loader", 1]),
        "merge": (lora | {"m": node("ModelMergeSimple", model1=["loader", 0], model2=["lora", 0], ratio=0.3)}, ["m", 0], ["loader", 1]),
        "bypass": ({"b": node("LoraLoaderBypass", model=["loader", 0], clip=["loader", 1], **tail)}, ["b", 0], ["b", 1]),
    }[kind]


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("kind", ["plain", "lora", "clip skip", "v", "merge", "bypass"])
def test_the_host_sees_the_graph_as_it_is_wired(comfy, lora, kind, guidance):
    """Stock KSampler and the core's sampler through the host end in the same latent, given the same noise and noise levels."""
    extra, model, clip = wiring(kind)
    graph = sampled(comfy, model=model, clip=clip, cfg=guidance) | extra
    wires = {"model": model, "clip": clip, "latent": ["sampler", 0], "conditioning": ["positive", 0]}
    arguments = {"prompt": "a red circle", "negative": "", "seed": 3, "steps": 4, "sampler": "euler"}
    path = comfy.base / f"{kind}.safetensors"
    result = comfy.probe("picture", wires=wires, graph=graph, guidance=guidance, path=str(path), **arguments)
    assert result["latent"] < 1e-4 * max(result["size"], 1.0)
    assert result["conditioning"] < 1e-5
    assert result["calls"] == 4
    assert result["evals"] == 4 * (1 if guidance == 1 else 2)
    assert result["velocity"] is (kind == "v")


def test_the_wirings_differ(comfy, lora):
    """Otherwise agreeing with stock would prove nothing."""
    latents = {}
    for kind in ("plain", "lora", "clip skip", "v", "merge"):
        extra, model, clip = wiring(kind)
        path = comfy.base / f"differs {kind}.safetensors"
        arguments = {"prompt": "a red circle", "negative": "", "seed": 3, "steps": 4, "sampler": "euler", "guidance": 1.0}
        comfy.probe("picture", wires={"model": model, "clip": clip}, graph=extra, path=str(path), **arguments)
        latents[kind] = load_file(path)["latents"]
    for kind in ("lora", "clip skip", "v", "merge"):
        assert (latents[kind] - latents["plain"]).abs().max() > 1e-3, kind


@pytest.mark.parametrize("kind", ["lora", "clip skip", "v", "merge", "bypass"])
def test_whatever_is_wired_leaves_the_base_as_it_was(comfy, lora, kind):
    before = comfy.probe("state")
    extra, model, clip = wiring(kind)
    comfy.probe(
        "gradients", wires={"model": model, "clip": clip, "vae": None}, graph=extra, word="circle", path=str(comfy.base / "l.safetensors")
    )
    assert comfy.probe("state") == before


def test_weights_that_stay_behind_give_the_same_gradients(comfy, lora):
    """Fetched and patched at every call, and run again for the gradient instead of being remembered."""
    extra, model, clip = wiring("lora")
    before, results = comfy.probe("state"), []
    for lowvram in (False, True):
        path = comfy.base / f"lowvram {lowvram}.safetensors"
        wires = {"model": model, "clip": clip, "vae": None}
        found = comfy.probe("gradients", wires=wires, graph=extra, word="circle", path=str(path), lowvram=lowvram)
        assert (found["recomputed"] > 0) == lowvram
        results.append(load_file(path))
    for name in ("rows", "context"):
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-7)
    assert comfy.probe("state") == before


def test_stock_embedding_files_of_the_models_width_load(comfy):
    save_file({"clip_l": torch.randn(2, WIDTH)}, comfy.base / "models" / "embeddings" / "thing.safetensors")
    graph = comfy.loaders() | {
        "text": node("CLIPTextEncode", clip=["loader", 1], text="a embedding:thing"),
        "same": node("CLIPTextEncode", clip=["loader", 1], text="a"),
    }
    log = len(comfy.log.read_text())
    arguments = {"prompt": "a", "negative": "", "seed": 0, "steps": 1, "guidance": 1.0, "sampler": "euler"}
    result = comfy.probe("picture", wires={"conditioning": ["text", 0]}, graph=graph, path=str(comfy.base / "e.safetensors"), **arguments)
    assert result["conditioning"] > 1e-2
    assert "shape mismatch" not in comfy.log.read_text()[log:]


@pytest.mark.slow
def test_the_stock_lora_trainer_trains_it(comfy):
    before = comfy.probe("state")
    graph = sampled(comfy) | {
        "train": node(
            "TrainLoraNode",
            model=["loader", 0],
            latents=["sampler", 0],
            positive=["positive", 0],
            batch_size=1,
            grad_accumulation_steps=1,
            steps=2,
            learning_rate=1e-3,
            rank=2,
            optimizer="AdamW",
            loss_function="MSE",
            seed=0,
            training_dtype="fp32",
            lora_dtype="fp32",
            quantized_backward=False,
            algorithm="LoRA",
            gradient_checkpointing=False,
            checkpoint_depth=1,
            offloading=False,
            existing_lora="[None]",
            bucket_mode=False,
            bypass_mode=False,
        ),
        "save": node("SaveLoRA", lora=["train", 0], prefix="loras/trained", steps=["train", 2]),
    }
    comfy.run(graph)
    assert list((comfy.base / "output").rglob("trained*.safetensors"))
    assert comfy.probe("state") == before
