"""Where results lie: folders under models/conceptkit that ComfyUI's folder_paths knows, and files in them found by name."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

import folder_paths

DECOMPOSITIONS = "conceptkit_decompositions"
EDITS = "conceptkit_edits"
CACHE = "conceptkit_cache"
_FOLDERS = {DECOMPOSITIONS: "decompositions", EDITS: "edits", CACHE: "cache"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def register_folders() -> None:
    """Make the folders known under their keys, after any that extra_model_paths.yaml names. Does nothing the second time."""
    for key, folder in _FOLDERS.items():
        folder_paths.add_model_folder_path(key, str(Path(folder_paths.models_dir, "conceptkit", folder)))
        folder_paths.folder_names_and_paths[key][1].add(".safetensors")


def names(key: str) -> list[str]:
    """The files in a folder, for a combo."""
    return folder_paths.get_filename_list(key)


def locate(key: str, name: str) -> Path:
    """The path of a file. Raises FileNotFoundError saying where to put it."""
    path = folder_paths.get_full_path(key, name)
    if path is None:
        raise FileNotFoundError(missing(key, name))
    return Path(path)


def missing(key: str, name: str) -> str:
    """What to say about a file that is not there."""
    return f"{name or 'the file'} is missing: put it into {folder(key)}, or make it again on this machine"


def folder(key: str) -> Path:
    """Where files of this kind are written."""
    return Path(folder_paths.get_folder_paths(key)[0])


def writable(key: str, name: str) -> Path:
    """The path of a file to write, ``name`` being a plain name without a folder or ending. Raises ValueError for any other."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a file: use letters, digits, - and _, without a folder")
    return folder(key) / f"{name.removesuffix('.safetensors')}.safetensors"


def check(key: str, name: str | None) -> bool | str:
    """For ``validate_inputs``: True, or what to say about a file that is not there. None is a name that another node will give."""
    return True if name is None or name in names(key) else missing(key, name)


def stamp(key: str, name: str) -> str:
    """Changes when another file lies under the same name."""
    path = folder_paths.get_full_path(key, name)
    if path is None:
        return ""
    stat = Path(path).stat()
    return f"{path} {stat.st_mtime_ns} {stat.st_size}"


@cache
def code_hash(family: str) -> str:
    """A hash of the source of a family of methods, and of lists it reads, when first asked for: others may find something else."""
    nodes = Path(__file__).resolve().parent
    core = nodes.parent / "core"
    digest = hashlib.sha256()
    for path in sorted([*core.glob("*.py"), *core.glob(f"{family}/*.py"), *core.glob("data/*.txt"), nodes / "comfy_model.py"]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def stem(asked: str, subject: str, content_hash: str) -> str:
    """The name of a result's file: what was asked for, or what it is of, and a hash of the content."""
    return f"{asked.strip() or slug(subject)}-{content_hash[:10]}"


def place(path: Path) -> str:
    """What a node says of a file it wrote."""
    return f"{path.name}\nin {path.parent}"


def slug(text: str) -> str:
    """``text`` as part of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:40] or "concept"
