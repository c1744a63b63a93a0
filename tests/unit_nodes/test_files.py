"""What ComfyUI serves for the nodes is complete; without ComfyUI, from the sources alone."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import pytest

NODES = Path(__file__).resolve().parents[2] / "nodes"


def node_ids(root):
    sources = [path.read_text("utf-8") for path in (root / "nodes").glob("*.py")]
    return {name for source in sources for name in re.findall(r'node_id="(\w+)"', source)}


def test_every_node_has_a_help_page_and_texts_and_the_packs_prefix(root):
    ids = node_ids(root)
    assert ids
    assert all(name.startswith("ConceptKit") for name in ids)
    assert {path.stem for path in (root / "web" / "docs").glob("*.md")} == ids
    assert json.loads((root / "locales" / "en" / "nodeDefs.json").read_text("utf-8")).keys() == ids


def test_workflows_have_an_api_copy_and_keep_their_seeds(root):
    workflows = sorted((root / "workflows").glob("*.json"))
    assert workflows
    for path in workflows:
        copy = json.loads((root / "tests" / "comfy" / "api" / path.name).read_text("utf-8"))
        nodes = {str(node["id"]): node for node in json.loads(path.read_text("utf-8"))["nodes"] if node["type"] != "MarkdownNote"}
        assert {name: node["class_type"] for name, node in copy.items()} == {name: node["type"] for name, node in nodes.items()}
        values = [value for node in nodes.values() for value in node["widgets_values"] if isinstance(value, str)]
        assert not {"randomize", "increment", "decrement"} & set(values)


@pytest.mark.parametrize("name", sorted(path.stem for path in NODES.glob("*.py")))
def test_listing_a_node_imports_nothing_that_comfyui_has_not_loaded(name):
    """Start-up pays for these modules; the core, its charts and the model's insides are imported when a node runs."""
    tree = ast.parse((NODES / f"{name}.py").read_text("utf-8"))
    checking = {id(node) for branch in tree.body if isinstance(branch, ast.If) for node in ast.walk(branch)}
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in checking]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom) and not node.level}
    within = {node.module or alias.name for node in imports if isinstance(node, ast.ImportFrom) and node.level == 1 for alias in node.names}
    allowed = {"comfy.latent_formats", "comfy.sd1_clip", "comfy.supported_models", "comfy.supported_models_base", "torch", "folder_paths"}
    allowed |= {"comfy_api.v0_0_2"} if name == "api" else set()
    assert {module for module in names if module.split(".")[0] not in sys.stdlib_module_names} <= allowed
    assert within <= {path.stem for path in NODES.glob("*.py")}
    assert not [node.module for node in imports if isinstance(node, ast.ImportFrom) and node.level > 1]


def test_every_node_that_saves_shows_the_name_in_the_browser(root):
    listed = re.search(r"SAVES = new Set\(\[(.*?)\]\)", (root / "web" / "saves.js").read_text("utf-8"))
    assert set(re.findall(r'"(\w+)"', listed[1])) == {name for name in node_ids(root) if name.startswith("ConceptKitSave")}


def test_checkpoint_lists_show_only_what_they_can_load(root):
    """ComfyUI lists every file with one of these endings in a registered folder."""
    endings = {".ckpt", ".pt", ".pt2", ".bin", ".pth", ".safetensors", ".pkl", ".sft"}
    files = [path for path in (root / "core" / "demo" / "data").rglob("*") if path.suffix in endings]
    assert [path.name for path in files] in ([], ["shapes.safetensors"])


def test_v3_alone(root):
    """A module that also defines the old mappings would have its entry point ignored."""
    assert not any("NODE_CLASS_MAPPINGS" in path.read_text("utf-8") for path in [root / "__init__.py", *(root / "nodes").glob("*.py")])


def test_validation_names_one_input_since_comfyui_reports_it_once_for_each(root):
    checks = [
        (path.name, [argument.arg for argument in function.args.args])
        for path in (root / "nodes").glob("*.py")
        for function in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(function, ast.FunctionDef) and function.name == "validate_inputs"
    ]
    assert checks
    assert all(len(arguments) == 2 for _, arguments in checks), checks
