"""Where results lie: folders under models/conceptkit that ComfyUI's folder_paths knows, and files in them found by name."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import folder_paths

DECOMPOSITIONS = "conceptkit_decompositions"
EDITS = "conceptkit_edits"
CACHE = "conceptkit_cache"
LORAS = "loras"
EMBEDDINGS = "embeddings"

NAME = (
    "A name, in a folder if you like (`birds/bird`), with placeholders as in Save Image (`%date:yyyy-MM-dd%`); "
    "a short hash of the content follows."
)
"""The tooltip of a save node's name."""

_FOLDERS = {DECOMPOSITIONS: "decompositions", EDITS: "edits", CACHE: "cache"}
_ENDING = ".safetensors"
_HASH = 10  # digits of a content hash in a file's name: 2^40 of them
_LONGEST = 255  # bytes in the name of a file or folder, on all common file systems
_SUBJECT = 80  # bytes of a name that is made of what a file holds
_LARGEST_HEADER = 100_000_000  # bytes; the format allows no more
_DATE = re.compile(r"dd?|MM?|hh?|mm?|ss?|yyy?y?")
# What names a device on Windows, with any ending: a workflow gives the same file everywhere.
_DEVICE = re.compile(r"(con|prn|aux|nul|com[\d¹²³]|lpt[\d¹²³])(\..*)?", re.IGNORECASE)
_JOINERS = "\u200c\u200d"  # not printable, but part of words in several scripts


def register_folders() -> None:
    """Make the folders known under their keys, after any that extra_model_paths.yaml names. Does nothing the second time."""
    for key, folder in _FOLDERS.items():
        folder_paths.add_model_folder_path(key, str(Path(folder_paths.models_dir, "conceptkit", folder)))
        folder_paths.folder_names_and_paths[key][1].add(_ENDING)


def names(key: str) -> list[str]:
    """The files in a folder and the folders in it, for a combo."""
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


def target(key: str, asked: str, subject: str, content_hash: str = "") -> Path:
    """The path of a file to write: ``asked`` as a save node reads it, or ``subject`` where nothing is asked for, and a short hash.

    Raises ValueError, saying what to write instead, for a name that cannot be one everywhere or leads out of the folder.
    """
    tail = f"-{content_hash[:_HASH]}" if content_hash else ""
    *folders, name = _parts(asked, len(tail)) or [subject]
    path = folder(key).joinpath(*folders, f"{name}{tail}{_ENDING}")
    if not folder_paths.is_within_directory(str(folder(key)), str(path)):
        raise ValueError(f"{asked!r} leads out of {folder(key)} through a link: write a folder that lies in it")
    return path


def check_name(key: str, asked: str | None, *, hashed: bool = True) -> bool | str:
    """For ``validate_inputs``: True, or what to write instead of a name, or that its folder cannot be written. None is not known yet."""
    if asked is None:
        return True
    try:
        path = target(key, asked, "name", "0" * _HASH if hashed else "")
    except ValueError as error:
        return str(error)
    there = next(above for above in path.parents if os.path.exists(above))
    if not there.is_dir():
        return f"{there} is a file, so nothing can be saved in a folder of that name: write another name"
    return True if os.access(there, os.W_OK) else unwritable(there, "read-only, or no permission")


def unwritable(place: Path, reason: str) -> str:
    """What to say about a folder that cannot be written."""
    return f"{place} cannot be written ({reason}): let ComfyUI write there, or put another folder first in extra_model_paths.yaml"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system says about a file that cannot be written into a sentence (OSError)."""
    try:
        yield
    except OSError as error:
        raise OSError(unwritable(path.parent, error.strerror or str(error))) from error


def listed(key: str, path: Path) -> str:
    """A file's name as loaders list it: below its folder."""
    return str(path.relative_to(folder(key)))


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


def holds(key: str, name: str, prefix: str) -> bool:
    """Whether a safetensors file has a tensor whose name begins with ``prefix``. Only its header is read, once until the file changes."""
    path = folder_paths.get_full_path(key, name)
    return path is not None and _named(path, prefix, stamp(key, name))


@cache
def _named(path: str, prefix: str, _: str) -> bool:
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(size) if size <= _LARGEST_HEADER else b""
        # Most files are told by a look at the bytes: that of a large checkpoint takes longer to parse than to read.
        return f'"{prefix}'.encode() in header and any(tensor.startswith(prefix) for tensor in json.loads(header))
    except (OSError, ValueError):
        return False


@cache
def code_hash(family: str) -> str:
    """A hash of the source of a family of methods, and of lists it reads, when first asked for: others may find something else."""
    nodes = Path(__file__).resolve().parent
    core = nodes.parent / "core"
    digest = hashlib.sha256()
    for path in sorted([*core.glob("*.py"), *core.glob(f"{family}/*.py"), *core.glob("data/*.txt"), *nodes.glob("comfy/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def slug(*texts: str) -> str:
    """Texts as part of a file's name: their letters and digits, of any script, joined by hyphens."""
    words = [word for text in texts for word in re.split(r"[\W_]+", text) if word]
    return "-".join(words).encode()[:_SUBJECT].decode("utf-8", "ignore").strip("-") or "concept"


def _parts(asked: str, tail: int) -> list[str]:
    """The folders and the name in what was asked for, [] for nothing; ``tail``: how many bytes will follow before the ending."""
    asked = asked.strip()
    # As stock save nodes do, so that `birds/` is the name birds; a backslash is what Windows writes for a slash.
    parts = [part for part in _dated(asked).replace("\\", "/").split("/") if part not in ("", ".")]
    if not parts:
        return []
    if parts[-1].lower().endswith(_ENDING):
        parts[-1] = parts[-1][: -len(_ENDING)]
    wrong = "it begins with a slash" if asked[0] in "/\\" else next(filter(None, map(_wrong, parts)), "")
    over = max(len(part.encode("utf-8", "replace")) - _LONGEST + (part is parts[-1]) * (tail + len(_ENDING)) for part in parts)
    if not wrong and over > 0:
        wrong = f"it is {over} bytes too long"
    if wrong:
        raise ValueError(f"{asked[:80]!r} cannot name a file ({wrong}): write a name such as bird, or birds/bird for one in a folder")
    return parts


def _wrong(part: str) -> str:
    """Why a part of a path cannot be the name of a file or folder on every system; nothing where it can."""
    if part == "..":
        return "`..` leads out of the folder"
    if part[:1] in ("", "."):
        return "a name begins with a dot"
    if part[-1] in ". ":
        return "a name ends with a dot or a space"
    if any(not (character.isprintable() or character in _JOINERS) for character in part):
        return "it holds characters that cannot be seen"
    if found := set(part) & set('<>:"|?*'):
        return f"it holds {min(found)}"
    return f"{part} is the name of a device on Windows" if _DEVICE.fullmatch(part) else ""


def _dated(name: str) -> str:
    """``name`` with the placeholders for the time replaced that stock save nodes know, on the server (`%year%`) or in the browser
    (`%date:yyyy-MM-dd%`); others, such as `%KSampler.seed%`, are the browser's to replace."""
    if "%" not in name:
        return name
    now = time.localtime()
    numbers = {"d": now.tm_mday, "M": now.tm_mon, "h": now.tm_hour, "m": now.tm_min, "s": now.tm_sec}
    years = {"yy": f"{now.tm_year % 100:02}", "yyyy": str(now.tm_year)}

    def part(match: re.Match[str]) -> str:
        asked = match[0]
        return years.get(asked, asked) if asked[0] == "y" else str(numbers[asked[0]]).zfill(len(asked))

    name = re.sub(r"%date:([^%]*)%", lambda match: _DATE.sub(part, match[1]), name)
    named = {"year": "yyyy", "month": "MM", "day": "dd", "hour": "hh", "minute": "mm", "second": "ss"}
    return re.sub(f"%({'|'.join(named)})%", lambda match: _DATE.sub(part, named[match[1]]), name)
