"""Load Image Scorer: the scorer in the graph is the headless one, and what it cannot use is refused with what to choose instead."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TEXTS = ["a red circle", "a large blue star and a bird", "a photo of a green square"]


def wired(checkpoint, clip=("loader", 1)):
    return {"scorer": {"class_type": "ConceptKitLoadScorer", "inputs": {"checkpoint": checkpoint, "clip": list(clip)}}}


def altered(comfy, name, change):
    """A copy of the demo model's file among the checkpoints, with ``change`` applied to its tensors."""
    tensors = load_file(comfy.weights)
    change(tensors)
    with safe_open(comfy.weights, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, comfy.base / "models" / "checkpoints" / name, metadata)
    return name


def asked(comfy, graph):
    """A graph that asks the loaded scorer, the pictures it is shown, and the file with its answers."""
    pictures, path = comfy.base / "pictures.safetensors", comfy.base / "scored.safetensors"
    if not pictures.is_file():
        save_file({"pictures": torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(0))}, pictures)
    given = {"texts": TEXTS, "pictures": str(pictures), "path": str(path)}
    return comfy.probing("score", wires={"scorer": ["scorer", 0]}, graph=graph, **given), load_file(pictures)["pictures"], path


def test_the_same_scores_as_headless(comfy):
    pytest.importorskip("diffusers", reason="the other host needs diffusers in the environment that runs the tests")
    from conceptkit.core.hosts.diffusers import load_model
    from conceptkit.core.score import zero_shot

    mine, before = load_model(comfy.weights).scorer, comfy.probe("state")
    skip = {"skip": {"class_type": "CLIPSetLastLayer", "inputs": {"clip": ["loader", 1], "stop_at_clip_layer": -2}}}
    for graph in (wired(comfy.checkpoint), skip | wired(comfy.checkpoint, ("skip", 0))):
        prompt, pictures, path = asked(comfy, graph)
        outputs, theirs = comfy.run(prompt), load_file(path)
        moving = pictures.clone().requires_grad_()
        vectors, words = mine.embed_pictures(moving), mine.embed_texts(TEXTS)
        (vectors @ words.T).square().sum().backward()
        expected = {"outside": words, "read": zero_shot(mine, pictures, TEXTS), "pictures": vectors, "texts": words}
        for name, value in (expected | {"gradient": moving.grad}).items():
            torch.testing.assert_close(theirs[name], value.detach(), rtol=0, atol=1e-4)
        assert f'"scorer": true, "scale": {mine.logit_scale}' in outputs["probe"]["text"][0]
    assert comfy.probe("state") == before


def listed(comfy):
    return comfy.get("/object_info/ConceptKitLoadScorer")["ConceptKitLoadScorer"]["input"]["required"]["checkpoint"][1]["options"]


def refusal(comfy, checkpoint):
    """What is said about a checkpoint before the graph runs."""
    with pytest.raises(AssertionError, match="custom_validation_failed") as refused:
        comfy.queue(asked(comfy, wired(checkpoint))[0])
    (error,) = json.loads(str(refused.value))["node_errors"]["scorer"]["errors"]
    return error["details"]


def test_files_without_a_scorer_are_not_listed_and_refused(comfy):
    def without_scorer(tensors):
        for key in [key for key in tensors if key.startswith("conceptkit_scorer.")]:
            del tensors[key]

    def without_projection(tensors):
        del tensors["conceptkit_scorer.text_projection.weight"]

    bare, half = (altered(comfy, f"{change.__name__}.safetensors", change) for change in (without_scorer, without_projection))
    (comfy.base / "models" / "checkpoints" / "broken.safetensors").write_bytes(b"\xff" * 64)
    assert {comfy.checkpoint, half} <= set(listed(comfy))
    assert not {bare, "broken.safetensors"} & set(listed(comfy))
    assert f"{bare} holds no image scorer: choose" in refusal(comfy, bare)
    message = comfy.fail(asked(comfy, wired(half))[0])
    assert f"{half} holds no image scorer" in message
    assert "choose shapes.safetensors" in message


def test_a_file_that_gets_a_scorer_is_listed(comfy):
    path = comfy.base / "models" / "checkpoints" / "growing.safetensors"
    save_file({"other": torch.zeros(1)}, path)
    assert path.name not in listed(comfy)
    altered(comfy, path.name, lambda _: None)
    assert path.name in listed(comfy)
    path.unlink()


def test_a_free_path_is_refused(comfy):
    assert "is not among the checkpoints: choose a checkpoint that is listed" in refusal(comfy, str(comfy.weights))
    assert "no scorer is chosen: choose shapes.safetensors" in refusal(comfy, "")


def test_another_clip_is_refused(comfy):
    message = comfy.fail(comfy.probing("refused_scorer", path=str(comfy.weights)))
    assert "the scorer reads text of width 96 but the CLIP gives 64: connect the CLIP of the same checkpoint" in message


def test_a_changed_file_is_read_again(comfy):
    def halved(tensors):
        tensors["conceptkit_scorer.log_scale"] -= 0.5

    name = altered(comfy, "changing.safetensors", lambda _: None)
    first = comfy.run(asked(comfy, wired(name))[0])["probe"]["text"]
    altered(comfy, name, halved)
    later = os.stat(comfy.base / "models" / "checkpoints" / name).st_mtime + 2
    os.utime(comfy.base / "models" / "checkpoints" / name, (later, later))
    assert comfy.run(asked(comfy, wired(name))[0])["probe"]["text"] != first
