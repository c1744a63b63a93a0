"""The example workflows: they fit the nodes, and the API copies of them run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def number(path):
    """What a workflow's name begins with."""
    return int(path.stem.split()[0])


ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"), key=number)
API = Path(__file__).resolve().parent / "api"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_fits_the_nodes_and_its_api_copy(comfy, path):
    workflow, prompt = json.loads(path.read_text()), json.loads((API / path.name).read_text())
    info = comfy.get("/object_info")
    links = {link[0]: link for link in workflow["links"]}
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        kind, copy = info[node["type"]], prompt[str(node["id"])]
        assert copy["class_type"] == node["type"]
        specs = kind["input"].get("required", {}) | kind["input"].get("optional", {})
        for socket in node["inputs"]:
            if socket.get("link") is not None:
                _, source, slot, _, _, kind_of = links[socket["link"]]
                assert copy["inputs"][socket["name"]] == [str(source), slot]
                # "*" and a match type are whatever is connected.
                assert kind_of in ("*", given := info[prompt[str(source)]["class_type"]]["output"][slot]) or "MATCHTYPE" in given
        values, linked = iter(node["widgets_values"]), {socket["name"] for socket in node["inputs"] if socket.get("link") is not None}
        for name, spec in specs.items():
            if name in copy["inputs"] and (name not in linked or widget(node, name)):
                value = next(values)
                assert name in linked or copy["inputs"][name] == value, f"widget {name} of {node['type']}"
                if (spec[1] if len(spec) > 1 else {}).get("control_after_generate"):
                    assert next(values) == "fixed", "a shared workflow must give everyone the same picture"


def test_the_workflows_are_numbered_and_have_a_picture_and_a_note(comfy):
    """ComfyUI's template browser shows the file's name, with the picture of the same name, and asks for it by URL."""
    assert [number(path) for path in WORKFLOWS] == list(range(1, len(WORKFLOWS) + 1))
    (listed,) = comfy.get("/workflow_templates").values()
    assert sorted(listed) == sorted(path.stem for path in WORKFLOWS)
    for path in WORKFLOWS:
        assert not set(path.stem) & set('?#%&"*:<>|')
        assert Image.open(path.with_suffix(".jpg")).width == 560
        (note,) = (node for node in json.loads(path.read_text())["nodes"] if node["type"] == "MarkdownNote")
        # Nodes 2.0 shows inline code in nearly the colour that lies behind it.
        assert "`" not in note["widgets_values"][0]
        assert "**Look at:**" in note["widgets_values"][0] and "**Change first:**" in note["widgets_values"][0]


def widget(node, name):
    return next("widget" in socket for socket in node["inputs"] if socket["name"] == name)


def test_every_node_is_documented(comfy):
    info = {name: node for name, node in comfy.get("/object_info").items() if name.startswith("ConceptKit") and name != "ConceptKitProbe"}
    texts = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text())
    assert info.keys() == texts.keys()
    for name, node in info.items():
        assert (ROOT / "web" / "docs" / f"{name}.md").is_file()
        assert node["description"] and node["search_aliases"] and node["category"].startswith("ConceptKit/")
        inputs = node["input"].get("required", {}) | node["input"].get("optional", {})
        assert all(spec[1].get("tooltip") for spec in inputs.values()), name
        assert all(node["output_tooltips"]), name
        assert (node["display_name"], node["description"]) == (texts[name]["display_name"], texts[name]["description"])
        assert inputs.keys() == texts[name]["inputs"].keys()
        for key, spec in inputs.items():
            assert spec[1]["tooltip"] == texts[name]["inputs"][key]["tooltip"].replace("{'{}'}", "{}")
        assert list(node["output_tooltips"]) == [output["tooltip"] for output in texts[name]["outputs"].values()]


def decompose(comfy, **inputs):
    given = {"concept": "bird", "template": "a photo of a {}", "words": 3, "seed": 0, "size": 0} | inputs
    node = {"class_type": "ConceptKitDecompose", "inputs": {"model": ["loader", 0], "clip": ["loader", 1]} | given}
    return comfy.loaders() | {"node": node, "show": {"class_type": "PreviewAny", "inputs": {"source": ["node", 3]}}}


@pytest.mark.parametrize("kind", ["ConceptKitDecompose", "ConceptKitConceptor"])
def test_a_bad_template_is_refused_before_anything_runs_and_reported_once(comfy, kind):
    graph = decompose(comfy, template="a photo")
    graph["node"]["class_type"] = kind
    with pytest.raises(AssertionError, match="custom_validation_failed") as refusal:
        comfy.queue(graph)
    (error,) = json.loads(str(refusal.value))["node_errors"]["node"]["errors"]
    assert "must contain {} once" in error["details"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"concept": " ,\n# bird"}, "the concept is empty: write a word or a phrase"),
        ({"concept": 'bird\n"a dog, running'}, "line 2, '\"a dog, running': put quotation marks around a whole phrase"),
        ({"concept": "bird -> fish"}, "line 1, 'bird -> fish': an arrow has no meaning in this list"),
        ({"exclude": "robin finch"}, "'robin finch' excludes none: separate its words by commas or lines"),
        ({"concept": "(bird:1.3)"}, "write plain words"),
        ({"concept": "embedding:bird"}, "write plain words"),
        ({"concept": "bird " * 80}, "tokens"),
    ],
)
def test_bad_concepts_fail_with_a_sentence(comfy, inputs, message):
    before = comfy.probe("state")
    assert message in comfy.fail(decompose(comfy, **inputs))
    assert comfy.probe("state") == before


@pytest.mark.parametrize("path", [path for path in WORKFLOWS if 2 <= number(path) <= 6], ids=lambda path: path.stem)
def test_the_examples_run(comfy, path):
    """By the method that takes a moment: the next test takes the one the examples ask for. Those that erase run in test_edit.py."""
    prompt = json.loads((API / path.name).read_text())
    prompt["1"]["inputs"]["ckpt_name"] = comfy.checkpoint
    for node in prompt.values():
        if node["class_type"] == "ConceptKitDecompose":
            node["inputs"] |= {"budget": "fast", "method": "text", "words": 3}
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 2
    outputs = comfy.run(prompt)
    drawn = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
    assert drawn
    assert all(outputs[key]["images"] for key in drawn)


def test_the_example_decomposes_bird_and_draws_it(comfy):
    prompt = json.loads((API / WORKFLOWS[0].name).read_text())
    prompt["1"]["inputs"]["ckpt_name"] = comfy.checkpoint
    before = comfy.probe("state")
    outputs = comfy.run(prompt, seconds=900)
    assert comfy.probe("state") == before
    text = outputs["13"]["text"][0]
    assert text.startswith("bird = ")
    assert "explains" in text
    pictures = {}
    for node in ("10", "11"):
        files = [comfy.base / "output" / image["subfolder"] / image["filename"] for image in outputs[node]["images"]]
        pictures[node] = np.stack([np.asarray(Image.open(file).convert("RGB"), dtype=np.float32) / 255 for file in files])
        assert pictures[node].shape == (4, 128, 128, 3)
    chart = outputs["12"]["images"][0]
    assert Image.open(comfy.base / "temp" / chart["filename"]).size[0] == 1200
    if comfy.weights.name == "shapes.safetensors":
        concept, words = pictures["10"], pictures["11"]
        assert min(concept.std(), words.std()) > 0.05, "random weights draw nothing; trained ones do"
        same = np.abs(concept - words).mean()
        other = np.mean([np.abs(concept - np.roll(words, shift, axis=0)).mean() for shift in (1, 2, 3)])
        assert same < other, "from the same noise the words must draw more alike than from another"
