"""The wheel: built from the tree as it stands, installed where nothing of ours is, it carries all it needs and no more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

SHIPPED = {"core", "nodes", "web", "locales", "workflows", "__init__.py", "py.typed"}


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"  # a copy, since setuptools builds beside the sources
    tree.mkdir()
    for name in (*SHIPPED, "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        if (root / name).is_dir():
            shutil.copytree(root / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (root / name).is_file():
            shutil.copy(root / name, tree / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, tree]
    subprocess.run(command, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory) -> Path:
    """An environment with the wheel alone, which sees this one's torch but not its editable install."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    purelib = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
    ).stdout.strip()
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    (Path(purelib) / "beside.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_what_the_wheel_holds(wheel, root):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert {name.split("/")[1] for name in names if name.startswith("conceptkit/")} <= SHIPPED
    shipped = [path for top in SHIPPED for path in [root / top, *(root / top).rglob("*")] if path.is_file()]
    expected = {f"conceptkit/{path.relative_to(root).as_posix()}" for path in shipped if path.suffix != ".pyc"}
    assert expected <= names
    assert "Requires-Dist: matplotlib" in metadata
    assert "torch" not in {line.split()[1] for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line}


def test_it_is_the_installed_copy_that_is_imported(installed, tmp_path):
    code = "import conceptkit, conceptkit.core.progress; print(conceptkit.core.progress.__file__)"
    found = subprocess.run([installed, "-c", code], cwd=tmp_path, env=clean(), capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(installed.parents[1])


def test_it_samples(installed, tmp_path):
    command = [installed.with_name("conceptkit"), "sample", "a red circle", "--steps", "2", "--seeds", "1", "--out", tmp_path]
    subprocess.run(command, cwd=tmp_path, env=clean() | {"OMP_NUM_THREADS": "1"}, check=True)
    assert (tmp_path / "seed-0.png").is_file()


def clean() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
