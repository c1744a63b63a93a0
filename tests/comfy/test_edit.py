"""Edits in the graph: they reach what they say, compose with LoRAs, equal their other forms, and leave the model as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conceptkit.tests.comfy.graphs import node
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
API = Path(__file__).parent / "api"
EXAMPLES = sorted(path for path in API.glob("*.json") if int(path.stem.split()[0]) >= 7)
UNET_KEY = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


def erase(name="erase", model=("loader", 0), **inputs):
    """An Erase Concept node, by name."""
    given = {"concepts": "circle -> square", "keep": "", "method": "conceptkit", "strength": 1.0, "hard": False, "seed": 0} | inputs
    return {name: node("ConceptKitErase", model=list(model), clip=["loader", 1], **given)}


def apply(name, edit, model=("loader", 0), strength=1.0):
    return {name: node("ConceptKitApplyEdit", model=list(model), edit=list(edit), strength=strength)}


def sampled(name, model=("loader", 0), positive=("positive", 0), negative=("negative", 0), prompt="a photo of a red circle", steps=4):
    """Stock sampling to a latent file called ``name``."""
    return {
        "positive": node("CLIPTextEncode", clip=["loader", 1], text=prompt),
        "negative": node("CLIPTextEncode", clip=["loader", 1], text=""),
        "empty": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        f"sample {name}": node(
            "KSampler",
            model=list(model),
            positive=list(positive),
            negative=list(negative),
            latent_image=["empty", 0],
            seed=3,
            steps=steps,
            cfg=3.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        f"save {name}": node("SaveLatent", samples=[f"sample {name}", 0], filename_prefix=f"edit/{name}"),
    }


def latents(comfy, *graphs):
    """Run graphs as one and return the latents saved, by name."""
    outputs = comfy.run(comfy.loaders() | {key: value for graph in graphs for key, value in graph.items()})
    found = {}
    for key, output in outputs.items():
        if key.startswith("save "):
            (file,) = output["latents"]
            found[key.removeprefix("save ")] = load_file(comfy.base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]
    return found


@pytest.fixture
def untouched(comfy):
    """The state of MODEL and CLIP must be the same before and after, loaded again from scratch as well."""
    before = comfy.probe("state")
    yield
    assert comfy.probe("state") == before
    comfy.post("/free", {"unload_models": True})
    assert comfy.probe("state") == before


@pytest.fixture(scope="module")
def lora(comfy):
    """A stock LoRA file for one cross-attention."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"{UNET_KEY}.lora_up.weight": torch.randn(128, 2, generator=generator) * 0.3,
        f"{UNET_KEY}.lora_down.weight": torch.randn(2, 96, generator=generator) * 0.3,
        f"{UNET_KEY}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, comfy.base / "models" / "loras" / "attention.safetensors")
    return "attention.safetensors"


def loaded(name, lora, model):
    return {name: node("LoraLoaderModelOnly", model=list(model), lora_name=lora, strength_model=1.0)}


@pytest.fixture(scope="module")
def exported(comfy):
    """An edit's file and its LoRA files, by precision; and the combo lists them from now on."""
    graph = erase()
    for precision in ("fp16", "fp32"):
        graph |= {
            precision: node(
                "ConceptKitSaveEditLora", model=["loader", 0], edit=["erase", 1], name=f"no-circle-{precision}", precision=precision
            )
        }
        graph |= {f"show {precision}": node("PreviewAny", source=[precision, 0])}
    graph |= {"edit": node("ConceptKitSaveEdit", edit=["erase", 1], name="no-circle"), "show edit": node("PreviewAny", source=["edit", 0])}
    outputs = comfy.run(comfy.loaders() | graph)
    return {key: outputs[f"show {key}"]["text"][0] for key in ("fp16", "fp32", "edit")}


def test_the_form_makes_no_difference(comfy, untouched, exported):
    """Patched model, edited conditioning, an edit from disk, and a stock LoRA through the stock loader draw the same.

    To what design.md promises, of the largest value of the latent.
    """
    conditionings = {
        side: node("ConceptKitEditConditioning", conditioning=[side.removeprefix("edited "), 0], edit=["erase", 1], strength=1.0)
        for side in ("edited positive", "edited negative")
    }
    found = latents(
        comfy,
        erase(),
        conditionings,
        {"file": node("ConceptKitLoadEdit", file=exported["edit"])},
        apply("read", ("file", 0)),
        loaded("fp16", exported["fp16"], ("loader", 0)),
        loaded("fp32", exported["fp32"], ("loader", 0)),
        sampled("plain"),
        sampled("patched", ("erase", 0)),
        sampled("conditioned", positive=("edited positive", 0), negative=("edited negative", 0)),
        sampled("from disk", ("read", 0)),
        sampled("lora fp16", ("fp16", 0)),
        sampled("lora fp32", ("fp32", 0)),
    )
    patched = found["patched"]
    size = float(patched.abs().max())
    assert float((found["plain"] - patched).abs().max()) > 0.05 * size
    assert torch.equal(found["from disk"], patched)
    assert float((found["conditioned"] - patched).abs().max()) < 1e-5 * size
    assert float((found["lora fp32"] - patched).abs().max()) < 1e-5 * size
    assert float((found["lora fp16"] - patched).abs().max()) < 1e-3 * size


def test_a_lora_of_another_model_or_precision_is_another_file(comfy, lora, exported):
    graph = loaded("tuned", lora, ("loader", 0)) | {"file": node("ConceptKitLoadEdit", file=exported["edit"])}
    for name, model, precision in (("a", "loader", "fp16"), ("b", "loader", "fp32"), ("c", "tuned", "fp16"), ("d", "loader", "fp16")):
        saved = node("ConceptKitSaveEditLora", model=[model, 0], edit=["file", 0], name="", precision=precision)
        graph |= {name: saved, f"show {name}": node("PreviewAny", source=[name, 0])}
    outputs = comfy.run(comfy.loaders() | graph)
    a, b, c, d = (outputs[f"show {name}"]["text"][0] for name in "abcd")
    assert len({a, b, c}) == 3 and a == d
    assert len({(comfy.base / "models" / "loras" / name).read_bytes() for name in (a, b, c)}) == 3


def test_nothing_asked_for_changes_nothing(comfy, untouched):
    found = latents(
        comfy,
        erase("weak", strength=0.0),
        erase("empty", concepts=""),
        erase(),
        apply("none", ("erase", 1), strength=0.0),
        {"same": node("ConceptKitEditConditioning", conditioning=["positive", 0], edit=["weak", 1], strength=1.0)},
        sampled("plain"),
        sampled("weak", ("weak", 0)),
        sampled("empty", ("empty", 0)),
        sampled("none", ("none", 0)),
        sampled("same", positive=("same", 0)),
    )
    plain = found.pop("plain")
    assert all(torch.equal(latent, plain) for latent in found.values())


def test_edits_add_to_loras_and_compose(comfy, untouched, lora, exported):
    """On the weights themselves: before or after a LoRA, patched twice or combined, scaled, and beside another clone's patches."""
    found = comfy.probe("edited", wires={"clip": ["loader", 1], "vae": None}, file=exported["edit"], lora=lora)
    assert found["layers"] == 8 and found["moved"] > 0.1
    for name in ("patched", "lora then edit", "edit then lora", "twice", "half", "beside another clone", "wrapped", "lowvram"):
        assert found[name] < 1e-5, name


def test_combined_is_patched_twice(comfy, untouched):
    found = latents(
        comfy,
        erase("first"),
        erase("second", concepts="red -> blue"),
        apply("both", ("second", 1), ("first", 0)),
        {"combined": node("ConceptKitCombineEdits", first=["first", 1], second=["second", 1], first_strength=1.0, second_strength=1.0)},
        apply("combination", ("combined", 0)),
        sampled("both", ("both", 0)),
        sampled("combined", ("combination", 0)),
        sampled("first", ("first", 0)),
    )
    size = float(found["both"].abs().max())
    assert float((found["both"] - found["combined"]).abs().max()) < 1e-4 * size < float((found["both"] - found["first"]).abs().max())


def test_the_report_of_any_edit(comfy, untouched):
    graph = erase(keep="ring, moon") | {
        "half": node("ConceptKitCombineEdits", first=["erase", 1], second=["erase", 1], first_strength=0.5, second_strength=0.0),
        "report": node("ConceptKitEditReport", model=["loader", 0], clip=["loader", 1], edit=["half", 0]),
        "own": node("PreviewAny", source=["erase", 3]),
        "text": node("PreviewAny", source=["report", 1]),
        "json": node("PreviewAny", source=["report", 2]),
        "chart": node("PreviewImage", images=["report", 0]),
    }
    outputs = comfy.run(comfy.loaders() | graph)
    figures = json.loads(outputs["json"]["text"][0])
    assert figures["concepts"][0]["trace"] == pytest.approx(0.5, abs=0.2)
    assert [word["word"] for word in figures["kept"]] == ["ring", "moon"]
    assert outputs["own"]["text"][0].startswith("circle -> square: method conceptkit")
    assert "blocks prompts, not the model's knowledge" in outputs["text"]["text"][0]
    (image,) = outputs["chart"]["images"]
    assert Image.open(comfy.base / "temp" / image["filename"]).size[0] == 1200


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"concepts": "circle -> circle"}, "is to be replaced by itself"),
        ({"concepts": "circle", "keep": "ring\ncircle"}, "take it off one of the two lists"),
        ({"concepts": "circle", "keep": '"ring, moon'}, "put quotation marks around a whole phrase"),
        ({"concepts": "circle", "keep": "ring -> moon"}, "an arrow has no meaning in this list"),
        ({"concepts": "ሴስ"}, "does not know the concept"),
        ({"concepts": "(circle:1.3)"}, "write plain words"),
        ({"concepts": "circle " * 80}, "tokens"),
        ({"concepts": "circle", "method": "uce-2025", "hard": True}, "turn hard off"),
    ],
)
def test_bad_inputs_fail_with_a_sentence(comfy, untouched, inputs, message):
    assert message in comfy.fail(comfy.loaders() | erase(**inputs) | sampled("bad", ("erase", 0)))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"concepts": "red\n-> circle"}, "line 2, '-> circle': write"),
        ({"concepts": "circle -> "}, "concept -> replacement"),
        ({"concepts": "circle, Circle -> ring"}, "listed twice"),
    ],
)
def test_bad_widgets_are_refused_before_anything_runs(comfy, inputs, message):
    with pytest.raises(AssertionError, match="custom_validation_failed") as refusal:
        comfy.queue(comfy.loaders() | erase(**inputs) | sampled("bad", ("erase", 0)))
    (error,) = json.loads(str(refusal.value))["node_errors"]["erase"]["errors"]
    assert message in error["details"]


def test_a_comma_separates_as_a_line_does(comfy, untouched):
    """It used to make one phrase of two concepts, which erased neither."""
    found = latents(
        comfy,
        erase("lines", concepts="circle -> star\nsquare -> ring", keep="moon\nred"),
        erase("commas", concepts="circle -> star, square -> ring; Circle -> star # again", keep="moon, red, Moon"),
        sampled("lines", ("lines", 0)),
        sampled("commas", ("commas", 0)),
        sampled("plain"),
    )
    assert torch.equal(found["lines"], found["commas"])
    assert not torch.equal(found["lines"], found["plain"])


def test_an_empty_list_is_no_error_and_says_so(comfy, untouched):
    graph = erase(concepts=" \n# circle") | {
        "text": node("PreviewAny", source=["erase", 3]),
        "chart": node("PreviewImage", images=["erase", 2]),
    }
    outputs = comfy.run(comfy.loaders() | graph)
    assert outputs["text"]["text"] == ["No edit: no concept was listed, or the strength is 0. The model stays as it is."]
    assert len(outputs["chart"]["images"]) == 1


def test_an_edit_of_another_family_is_refused(comfy, untouched):
    from conceptkit.core.edit import ContextEdit, LowRank

    factors = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    other = ContextEdit("sd1", LowRank(factors, factors))
    folder = comfy.base / "models" / "conceptkit" / "edits"
    other.save(folder / "other.safetensors", overwrite=True)
    comfy.get("/object_info")
    graph = comfy.loaders() | {"file": node("ConceptKitLoadEdit", file="other.safetensors")}
    assert "width 64" in comfy.fail(graph | apply("patched", ("file", 0)) | sampled("bad", ("patched", 0)))
    prompt = {"edited": node("ConceptKitEditConditioning", conditioning=["positive", 0], edit=["file", 0], strength=1.0)}
    assert "96 wide" in comfy.fail(graph | prompt | sampled("bad", positive=("edited", 0)))


def test_a_missing_file_is_named(comfy):
    with pytest.raises(AssertionError, match=r"gone\.safetensors is missing"):
        comfy.queue(
            comfy.loaders()
            | {"file": node("ConceptKitLoadEdit", file="gone.safetensors")}
            | apply("a", ("file", 0))
            | sampled("x", ("a", 0))
        )


def test_quantised_weights_take_the_edit_on_the_conditioning(comfy, untouched, exported):
    folder = comfy.base / "models" / "diffusion_models"
    folder.mkdir(exist_ok=True)
    save_file(load_file(comfy.weights), folder / "edited.safetensors")
    graph = comfy.loaders() | {
        "fp8": node("UNETLoader", unet_name="edited.safetensors", weight_dtype="fp8_e4m3fn"),
        "file": node("ConceptKitLoadEdit", file=exported["edit"]),
    }
    refusal = comfy.fail(graph | apply("patched", ("file", 0), ("fp8", 0)) | sampled("bad", ("patched", 0)))
    assert "use Apply Edit to Conditioning on positive and negative" in refusal
    refused = comfy.fail(graph | erase(model=("fp8", 0)) | sampled("bad", ("erase", 0)))
    assert "the MODEL is quantised: load it in fp16" in refused and "Apply Edit to Conditioning" in refused
    edited = {
        "edited": node("ConceptKitEditConditioning", conditioning=["positive", 0], edit=["file", 0], strength=1.0),
    }
    found = latents(comfy, graph, edited, sampled("fp8", ("fp8", 0)), sampled("fp8 edited", ("fp8", 0), ("edited", 0)))
    assert float((found["fp8"] - found["fp8 edited"]).abs().max()) > 0.05


def test_weights_that_are_no_numbers_are_refused(comfy):
    weights = load_file(comfy.weights)
    key = next(key for key in weights if key.endswith("attn2.to_k.weight"))
    weights[key] = weights[key] * torch.nan
    save_file(weights, comfy.base / "models" / "checkpoints" / "nan.safetensors")
    graph = comfy.loaders() | {"nan": node("CheckpointLoaderSimple", ckpt_name="nan.safetensors")}
    assert "NaN" in comfy.fail(graph | erase(model=("nan", 0)) | sampled("bad", ("erase", 0)))


def test_an_interrupted_solve_leaves_nothing_behind(comfy, untouched):
    prompt_id = comfy.queue(comfy.probing("interrupted_edit"))
    history = comfy.wait(prompt_id)
    assert any(kind == "execution_interrupted" for kind, _ in history["status"]["messages"]), history["status"]


def test_the_node_offers_every_method_that_erases(comfy):
    from conceptkit.core.edit import METHODS

    (options,) = (
        spec[1]["options"] for name, spec in comfy.get("/object_info")["ConceptKitErase"]["input"]["required"].items() if name == "method"
    )
    assert options == [name for name, method in METHODS.items() if not method.balances]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_erases(comfy, untouched, path):
    prompt = json.loads(path.read_text())
    for entry in prompt.values():
        if entry["class_type"] == "CheckpointLoaderSimple":
            entry["inputs"]["ckpt_name"] = comfy.checkpoint
    outputs = comfy.run(prompt, seconds=900)
    pictures = {}
    for key, output in outputs.items():
        if prompt[key]["class_type"] == "SaveImage":
            files = [comfy.base / "output" / image["subfolder"] / image["filename"] for image in output["images"]]
            name = prompt[key]["inputs"]["filename_prefix"].removeprefix("conceptkit/")
            pictures[name] = np.stack([np.asarray(Image.open(file).convert("RGB"), dtype=np.uint8) for file in files])
    texts = [output["text"][0] for key, output in outputs.items() if prompt[key]["class_type"] == "PreviewAny"]
    assert any("method conceptkit" in text for text in texts)
    if comfy.weights.name == "shapes.safetensors":
        from conceptkit.core.demo.detect import read

        gone = {"7": "circle", "8": "circle", "9": "circle", "10": "robin"}[path.stem.split()[0]]
        after = next(batch for name, batch in pictures.items() if name.endswith("after") and "kept" not in name)
        assert not any(thing.kind == gone for picture in after for thing in read(picture).things)
