"""After a run, a failure or an interrupt the graph is as it was; what is not supported is refused with what to connect instead."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from conceptkit.tests.comfy.graphs import node
from safetensors.torch import load_file, save_file


@pytest.fixture
def untouched(comfy):
    """The state of MODEL and CLIP must be the same before and after."""
    before = comfy.probe("state")
    yield
    assert comfy.probe("state") == before
    assert before["overridden"] == before["wrapped"] == 0
    assert not before["patcher"]


def test_after_a_run(comfy, untouched):
    comfy.probe("gradients", wires={"vae": None}, word="circle", path=str(comfy.base / "run.safetensors"))


@pytest.mark.parametrize(
    ("kind", "message"), [("error", "something went wrong"), ("nan", "NaN or infinity"), ("long", "76 tokens, the text encoder reads 75")]
)
def test_after_a_failure(comfy, untouched, kind, message):
    assert message in comfy.fail(comfy.probing("failure", kind=kind))


def test_after_an_interrupt(comfy, untouched):
    prompt_id = comfy.queue(comfy.probing("failure", kind="forever"))
    for _ in range(100):
        if comfy.get("/queue")["queue_running"]:
            break
        time.sleep(0.1)
    time.sleep(1)
    comfy.post("/interrupt", {})
    history = comfy.wait(prompt_id)
    assert any(kind == "execution_interrupted" for kind, _ in history["status"]["messages"]), history["status"]


@pytest.mark.parametrize(("what", "at"), [("distilled", 40), ("conceptor", 20), ("text", 2), ("erase", 1)])
def test_cancelling_leaves_nothing(comfy, untouched, what, at):
    """No further call to the model, no copy of one loaded, no graph of autograd, and no file but the one to go on from."""
    found = comfy.probe("cancelled", what=what, at=at)
    files = found.pop("files")
    assert found == {"later": 0, "foreign": 0, "graphs": 0, "interrupting": False}
    assert all(file.endswith(".checkpoint") for file in files)
    assert len(files) <= (what in ("distilled", "conceptor"))
    for file in map(Path, files):
        file.unlink()


def test_evictable_weights_are_copied(comfy, untouched):
    result = comfy.probe("dynamic")
    assert result["own"]
    assert result["gradient"] > 0
    assert result["left"] == 0


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("other clip", "the MODEL reads text of width 96 but the CLIP gives 64: connect the CLIP of the same checkpoint"),
        ("architecture", "Linear models are not supported: connect the MODEL and CLIP of an SD 1.x"),
        ("refiner", "connect the SDXL base model"),
    ],
)
def test_refused(comfy, untouched, what, message):
    assert message in comfy.fail(comfy.probing("refused", what=what))


def test_no_clip_is_refused(comfy):
    assert "the CLIP is missing" in comfy.fail(comfy.probing("refused", what="nothing", wires={"clip": None}))
    assert "the CLIP is missing" in comfy.fail(comfy.probing("decomposed", wires={"clip": None}))


def test_flow_sampling_is_refused(comfy):
    extra = {"flow": node("ModelSamplingSD3", model=["loader", 0], shift=3.0)}
    assert "not by noise levels" in comfy.fail(comfy.probing("refused", what="flow", wires={"model": ["flow", 0]}, graph=extra))


def test_inpainting_models_are_refused(comfy):
    weights = load_file(comfy.weights)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    weights[key] = weights[key].repeat(1, 3, 1, 1)[:, :9].contiguous()
    save_file(weights, comfy.base / "models" / "checkpoints" / "inpaint.safetensors")
    extra = {"inpaint": node("CheckpointLoaderSimple", ckpt_name="inpaint.safetensors")}
    message = comfy.fail(comfy.probing("refused", what="inpaint", wires={"model": ["inpaint", 0]}, graph=extra))
    assert "connect the base model they were made from" in message


def test_quantised_models_are_refused(comfy):
    folder = comfy.base / "models" / "diffusion_models"
    folder.mkdir(exist_ok=True)
    save_file(load_file(comfy.weights), folder / "shapes.safetensors")
    extra = {"fp8": node("UNETLoader", unet_name="shapes.safetensors", weight_dtype="fp8_e4m3fn")}
    message = comfy.fail(comfy.probing("refused", what="fp8", wires={"model": ["fp8", 0]}, graph=extra))
    assert "the MODEL is quantised: load it in fp16, bf16 or fp32" in message


PATCHED = {
    "FreeU": {"b1": 2.0, "b2": 2.0, "s1": 0.2, "s2": 0.2},
    "FreeU_V2": {"b1": 2.0, "b2": 2.0, "s1": 0.2, "s2": 0.2},
}
"""Stock nodes whose patches write into the network's hidden states."""


@pytest.mark.parametrize("kind", PATCHED)
def test_patches_that_write_in_place_are_differentiated(comfy, untouched, kind):
    """The gradient through the patch is that of finite differences, and is not the gradient without the patch."""
    extra = {"patch": node(kind, model=["loader", 0], **PATCHED[kind])}
    found = comfy.probe("slope", wires={"model": ["patch", 0], "vae": None}, graph=extra)
    plain = comfy.probe("slope", wires={"vae": None})
    for slope in (found, plain):
        assert slope["gradient"] == pytest.approx(slope["difference"], rel=0.01)
    assert found["gradient"] != pytest.approx(plain["gradient"], rel=0.05)


def test_a_model_with_freeu_is_decomposed(comfy, untouched):
    asked = {"concept": "bird", "template": "a photo of a {}", "words": 1, "seed": 0, "size": 64, "budget": "fast"}
    patch = node("FreeU_V2", model=["loader", 0], **PATCHED["FreeU_V2"])
    graph = {"patch": patch, "node": node("ConceptKitDecompose", model=["patch", 0], clip=["loader", 1], **asked)}
    outputs = comfy.run(comfy.loaders() | graph | {"show": node("PreviewAny", source=["node", 3])})
    assert outputs["show"]["text"][0].startswith("bird = ")


def test_a_patch_without_a_gradient_is_refused(comfy, untouched):
    assert "connect the MODEL from before that node" in comfy.fail(comfy.probing("overwritten", wires={"vae": None}))
