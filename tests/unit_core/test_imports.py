"""The house rules that imports can break: arrows web -> nodes -> core, and nothing heavy before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
HOST = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "latent_preview", "node_helpers", "server"}
INSIDES = HOST - {"comfy_api", "folder_paths"}
ABOVE = {"bench", "cli", "demo", "hosts"}
"""What stands on the methods; no method may know of it."""
KNOW_THE_DEMO = {Path("core/demo"), Path("core/bench"), Path("core/cli"), Path("nodes/demo_model.py")}
COMFY = Path("nodes/comfy")
SLOW = {"diffusers", "matplotlib", "scipy", "transformers", "typer"}
MODULES = sorted(path.relative_to(ROOT) for top in ("core", "nodes") for path in (ROOT / top).rglob("*.py"))
METHODS = [m for m in MODULES if m.parts[0] == "core" and m.with_suffix("").parts[1] not in ABOVE]


FAMILIES = {m for m in MODULES if m.parent == Path("nodes") and "\nNODES = [" in (ROOT / m).read_text(encoding="utf-8")}
"""The files of nodes, each of which ends with a list of them."""


class Runtime(ast.NodeTransformer):
    """The tree without what only type checkers read."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" else node


def absolute(module: Path, *, top_level: bool = False, runtime: bool = False) -> Iterator[str]:
    """The absolute imports of a module, as dotted names."""
    tree = parse(module)
    tree = Runtime().visit(tree) if runtime else tree
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module


def relative(module: Path) -> Iterator[tuple[str, ...]]:
    """What a module imports relatively, as paths from the root: each imported name counts, since it may be a module."""
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = module.parts[: -node.level] + tuple((node.module or "").split(".") if node.module else ())
            yield from ((*base, alias.name) for alias in node.names)


def parse(module: Path) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"))


def first(names: Iterator[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_the_tree_is_read():
    assert Path("core/model.py") in METHODS
    assert Path("core/hosts/checkpoint.py") in MODULES


def test_neither_the_root_nor_the_tests_are_on_the_path():
    assert not {ROOT, ROOT / "tests"} & {Path(entry).resolve() for entry in sys.path}


@pytest.mark.parametrize("module", [Path("__init__.py"), *MODULES], ids=str)
def test_only_relative_imports_inside_the_pack(module):
    assert not first(absolute(module)) & {"conceptkit", "core", "nodes", "tests"}


@pytest.mark.parametrize("module", [m for m in MODULES if m.parts[0] == "core"], ids=str)
def test_core_knows_no_host_and_no_node(module):
    assert not first(absolute(module)) & HOST
    assert all(target[:1] == ("core",) for target in relative(module))


@pytest.mark.parametrize("module", METHODS, ids=str)
def test_methods_know_nothing_above_them(module):
    assert not [target for target in relative(module) if target[1] in ABOVE]


@pytest.mark.parametrize("module", [m for m in MODULES if not KNOW_THE_DEMO & {m, *m.parents}], ids=str)
def test_the_demo_is_a_model_like_any_other(module):
    assert not [target for target in relative(module) if target[:2] == ("core", "demo")]


@pytest.mark.parametrize("module", [m for m in MODULES if len(m.parts) > 3 and m.parts[:2] == ("core", "bench")], ids=str)
def test_no_benchmark_knows_another(module):
    bench = ROOT / "core" / "bench"
    others = {folder.name for folder in bench.iterdir() if folder.is_dir()} - {module.parts[2]}
    assert not [target for target in relative(module) if target[:2] == ("core", "bench") and target[2] in others]


@pytest.mark.parametrize("module", [m for m in MODULES if m.parts[:2] in (("core", "bench"), ("core", "cli"))], ids=str)
def test_benchmarks_and_commands_import_nothing_private(module):
    assert not [target for target in relative(module) if target[-1].startswith("_") and target[-1] != "__version__"]


@pytest.mark.parametrize("module", METHODS + [m for m in MODULES if m.parts[0] == "nodes"], ids=str)
def test_listing_nodes_loads_nothing_slow(module):
    assert not first(absolute(module, top_level=True)) & SLOW


def test_only_the_host_s_rooms_know_comfyui_s_insides():
    knows = {m for m in MODULES if m.parts[0] == "nodes" and first(absolute(m, runtime=True)) & INSIDES}
    assert {m for m in knows if m.parent != COMFY} <= {Path("nodes/demo_model.py")}


def test_every_family_of_nodes_is_listed():
    tree = parse(Path("nodes/__init__.py"))
    (listed,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "FAMILIES")
    assert {Path(f"nodes/{element.id}.py") for element in listed.elts} == FAMILIES


@pytest.mark.parametrize("module", [m for m in MODULES if m.parts[0] == "nodes" and m != Path("nodes/__init__.py")], ids=str)
def test_families_of_nodes_do_not_know_each_other(module):
    """What two of them share is a module of its own, which knows neither."""
    imported = {Path(*target[:depth]).with_suffix(".py") for target in relative(module) for depth in (2, 3)}
    assert not imported & FAMILIES


@pytest.mark.parametrize("module", [m for m in MODULES if m.parts[0] == "nodes"], ids=str)
def test_nodes_leave_other_modules_privates_alone(module):
    tree = parse(module)
    names = [alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    known = {alias.asname or alias.name for alias in names}
    assert not [alias.name for alias in names if alias.name.startswith("_")]
    assert not [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known and node.attr.startswith("_")
    ]


def test_the_root_holds_the_entry_alone():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    defined = {node.targets[0].id for node in tree.body if isinstance(node, ast.Assign)}
    defined |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    assert defined == {"WEB_DIRECTORY", "comfy_entrypoint"}
    assert first(absolute(Path("__init__.py"), top_level=True)) <= {"__future__", "typing"}


def test_importing_the_pack_costs_nothing():
    code = "import sys; before = set(sys.modules); import conceptkit; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / ".dev")}, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "conceptkit" in loaded
    assert {name.split(".")[0] for name in loaded} <= {"conceptkit", *sys.stdlib_module_names}


@pytest.mark.parametrize("module", [Path("__init__.py"), *MODULES], ids=str)
def test_sources_stay_within_windows_own_encoding(module):
    (ROOT / module).read_text(encoding="utf-8").encode("cp1252")


def test_pyproject_lists_every_package():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {Path(), *(module.parent for module in MODULES)}
    assert {".".join(("conceptkit", *folder.parts)) for folder in folders} == set(setup["packages"])
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)
