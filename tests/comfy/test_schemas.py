"""The nodes' faces: ids, inputs in their order with types and defaults, and outputs are what shared workflows were made with."""

from __future__ import annotations

import json
import os
from pathlib import Path

SNAPSHOT = Path(__file__).resolve().parent / "schemas.json"


def face(node):
    """What a workflow stores or relies on; the files that a combo lists, and the one it begins with, are left out."""
    inputs = {}
    for need, specs in node["input"].items():
        for name, (kind, *rest) in specs.items() if need != "hidden" else ():
            options = rest[0] if rest else {}
            kept = {key: options[key] for key in ("default", "min", "max", "step", "advanced", "control_after_generate") if key in options}
            choices = options.get("options", kind if isinstance(kind, list) else None)
            if any(str(choice).endswith(".safetensors") for choice in choices or ()):
                kept.pop("default", None)
            elif choices:
                kept["options"] = choices
            inputs[name] = [need, "COMBO" if isinstance(kind, list) else kind, kept]
    return {"inputs": inputs, "outputs": list(map(list, zip(node["output_name"], node["output"], node["output_is_list"], strict=True)))}


def test_the_nodes_faces_are_as_they_were(comfy):
    """A difference breaks workflows: append inputs and outputs, never reorder or rename. For an addition, run with UPDATE_SCHEMAS=1."""
    nodes = {name: node for name, node in comfy.get("/object_info").items() if name.startswith("ConceptKit") and name != "ConceptKitProbe"}
    found = {name: face(nodes[name]) for name in sorted(nodes)}
    if os.environ.get("UPDATE_SCHEMAS"):
        rows = ",\n".join(f" {json.dumps(name)}: {rows_of(value)}" for name, value in found.items())
        SNAPSHOT.write_text("{\n" + rows + "\n}\n")
    kept = json.loads(SNAPSHOT.read_text())
    assert found.keys() == kept.keys()
    for name, node in kept.items():
        assert list(found[name]["inputs"]) == list(node["inputs"]), name
        assert found[name] == node, name


def test_the_methods_and_budgets_offered_are_the_cores(comfy):
    from conceptkit.core.decompose import METHODS, distilled

    inputs = comfy.get("/object_info/ConceptKitDecompose")["ConceptKitDecompose"]["input"]["optional"]
    assert set(inputs["method"][1]["options"]) == METHODS.keys()
    assert list(inputs["budget"][1]["options"]) == list(distilled.BUDGETS)


def rows_of(value):
    inputs = ",\n".join(f"   {json.dumps(name)}: {json.dumps(spec)}" for name, spec in value["inputs"].items())
    return '{\n  "inputs": {\n' + inputs + '\n  },\n  "outputs": ' + json.dumps(value["outputs"]) + "\n }"
