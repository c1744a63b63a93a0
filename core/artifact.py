"""Artifacts: what a method leaves behind, as one safetensors file with one metadata key of canonical JSON.

Equal content has an equal hash and equal bytes on disk, so headers hold no times, machines or paths. A file read is untrusted: size,
header, format, version, names, types, shapes and values are checked before a tensor is handed out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn, TypeAlias, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

logger = logging.getLogger(__name__)

T = TypeVar("T")
N = TypeVar("N", bound="Noun")

Setting: TypeAlias = float | str | bool
"""A value of a method's settings."""

KEY = "conceptkit"
"""The one metadata key."""

Header: TypeAlias = dict[str, Any]
"""JSON values under string keys. Holds ``format`` (text) and ``version`` (a whole number)."""

Spec: TypeAlias = tuple[torch.dtype, tuple[int | None, ...]]
"""A tensor's type and shape; None leaves that size free."""

Layout: TypeAlias = Callable[[Header], Mapping[str, Spec]]
"""The tensors a header promises: every one must be there, and nothing else."""

Migration: TypeAlias = Callable[[Header], Header]
"""The header of one version of a format as the next version writes it; ``version`` itself is set by the reader."""

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

_DIGITS = 300
"""Whole numbers of more do not become floating-point numbers."""
_TEXT, _LIST = 4096, 65536
"""The longest text and the longest list that a noun's header may hold."""


class ArtifactError(ValueError):
    """A file or its content cannot be used; the message names it and says what to do."""


def canonical(header: Mapping[str, Any]) -> str:
    """``header`` as JSON that is equal when the header is: sorted keys, no spaces, ASCII. ArtifactError for what JSON cannot hold."""
    try:
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
        same = json.loads(text) == _listed(header)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"the header is not JSON ({error}): use text, finite numbers, booleans, lists and mappings") from error
    if not same:
        raise ArtifactError("the header has keys that are not text: use text keys, so that it reads back as it was written")
    return text


def content_hash(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the header and of every tensor's name, type, shape and values, in order of name.

    Independent of device, strides and insertion order, and of how a file lays its content out.
    """
    digest = hashlib.sha256()
    for part in _parts(tensors, header):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def write(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Write an artifact, completely or not at all.

    Writing what is already there changes nothing. Raises ArtifactError for a header without format and version or not JSON, for NaN or
    infinity, for a tensor type artifacts do not hold, and, unless ``overwrite``, for a path that holds something else.
    """
    _identity(header, "the header")
    for name, tensor in tensors.items():
        if name == "__metadata__" or not (name.isascii() and name.isprintable()):
            raise ArtifactError(f"{name!r} cannot name a tensor: use printable ASCII")
        if tensor.dtype not in _DTYPES.values():
            raise ArtifactError(f"tensor {name!r} is {tensor.dtype}: convert it to float32, float16, bfloat16, int64 or bool")
        _finite(name, tensor, "nothing was written: look for the step that produced it")
    content = save({name: _owned(tensor) for name, tensor in tensors.items()}, {KEY: canonical(header)})
    write_bytes(path, content, overwrite=overwrite)


def write_bytes(path: str | Path, content: bytes, *, overwrite: bool = False) -> None:
    """Write a file completely or not at all; ArtifactError for a path that holds something else, unless ``overwrite``."""
    path = Path(path)
    if not overwrite and path.exists():
        if path.read_bytes() == content:
            return
        raise ArtifactError(f"{path} exists with other content: choose another name, or delete it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def beside(path: Path) -> Path:
    """A fresh name in the same folder, for a file that is to be moved to ``path``; however long that name is, this one is short."""
    return path.with_name(f".{secrets.token_hex(8)}.tmp")


def write_spare(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bool:
    """Like ``write`` with ``overwrite``, for what can be computed again: a disk that refuses it is a warning in the log, and False."""
    try:
        write(path, tensors, header, overwrite=True)
    except OSError as error:
        logger.warning("%s cannot be written (%s): the work goes on without it", path, error.strerror or error)
        return False
    return True


def discard(path: Path) -> bool:
    """Delete a file that is no longer needed, if it is there; a disk that refuses is a warning in the log, and False."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be deleted (%s)", path, error.strerror or error)
        return False
    return True


def row_major(tensor: Tensor) -> Tensor:
    """``tensor`` as a file would give it back: row-major, from the start of its storage, with the strides a new tensor has.

    Matrix products take another path through the BLAS for other strides and other alignments, and then differ in the last bit. Strides of
    dimensions of size 1 count there, too, which ``Tensor.contiguous`` leaves as they are.
    """
    usual = torch.empty(tensor.shape, device="meta").stride()
    return tensor if tensor.stride() == usual and tensor.storage_offset() == 0 else tensor.clone(memory_format=torch.contiguous_format)


def read(
    path: str | Path, format: str, version: int, layout: Layout, migrations: Mapping[int, Migration] | None = None
) -> tuple[dict[str, Tensor], Header]:
    """Tensors (CPU, owning their memory) and header of an artifact of this format, the header as ``version`` writes it.

    path: the file, which is untrusted.
    format, version: what it must be. A newer version is refused.
    layout: the tensors that its header promises. A file with any other, or without one of them, is refused.
    migrations: per older version that can be read, the step to the version after it. They run in turn, before ``layout`` reads the header;
        a version without one is refused.

    Raises ArtifactError for a missing, truncated or hostile file, another format, a newer version or an older one without a migration,
    a header that ``layout`` or a migration cannot make sense of, a tensor that is missing, unexpected or of another type or shape, and
    NaN or infinity. Memory is bounded by the file's real length, whatever its header says.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path} is not a file: check the name, or make the artifact again")
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(path, file.metadata())
            header = _expect(path, header, format, version, migrations or {})
            return _tensors(path, file, _understood(path, layout, header)), header
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is damaged or no safetensors file ({error}): copy it again, or make it again") from error


@dataclass(frozen=True, eq=False, kw_only=True)
class Provenance:
    """Where a result comes from: all that is needed to make it again.

    model: the name of the model, or the hash of the weights that were read. method, settings: as the verb was called, with every default
    filled in. seed: of all randomness. evals: model evaluations spent (a forward and backward counts 3), calls: batched forwards.
    """

    model: str = ""
    method: str = ""
    seed: int = 0
    settings: Mapping[str, Setting] = field(default_factory=dict)
    evals: int = 0
    calls: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class Noun(Provenance, ABC):
    """Base of what verbs return: a frozen dataclass that saves, loads, moves and hashes itself.

    A noun names its ``FORMAT``, ``VERSION`` and ``MIGRATIONS`` (as `read` takes them), and in ``TENSORS`` the fields that hold tensors: one
    tensor, a mapping of them, a dataclass of them, or None. These are row-major from the start, as a file gives them back. ``UNHASHED``
    are header entries that make no other result, with what the hash takes for them.
    """

    FORMAT: ClassVar[str]
    VERSION: ClassVar[int]
    MIGRATIONS: ClassVar[Mapping[int, Migration]] = MappingProxyType({})
    TENSORS: ClassVar[tuple[str, ...]]
    UNHASHED: ClassVar[Header] = {}

    def __post_init__(self) -> None:
        for name in self.TENSORS:
            object.__setattr__(self, name, _each(row_major, getattr(self, name)))

    @abstractmethod
    def _content(self) -> Header:
        """The header but for format and version."""

    @classmethod
    @abstractmethod
    def _layout(cls, header: Header) -> Mapping[str, Spec]:
        """The tensors that go with an untrusted header."""

    @classmethod
    @abstractmethod
    def _from(cls: type[N], header: Header, tensors: Mapping[str, Tensor]) -> N:
        """The noun of an untrusted header, read by ``as_text`` and its like; raises as those do."""

    def _header(self) -> Header:
        return {"format": self.FORMAT, "version": self.VERSION, **self._content()}

    def _tensors(self) -> dict[str, Tensor]:
        """Tensors under the names of their fields and, after a dot, of what is in these."""
        return {name: tensor for held in self.TENSORS for name, tensor in _named(held, getattr(self, held)).items()}

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write it as an artifact; ``load`` gives it back bit for bit. Raises ArtifactError as `write` does.

        An equal result that is there already stays as it is, whatever versions made it.
        """
        if overwrite or not self._lies_at(Path(path)):
            write(path, self._tensors(), self._header(), overwrite=overwrite)

    def _lies_at(self, path: Path) -> bool:
        if not path.is_file():
            return False
        try:
            return type(self).load(path).content_hash() == self.content_hash()
        except ArtifactError:
            return False

    @classmethod
    def load(cls: type[N], path: str | Path) -> N:
        """Read what ``save`` wrote, on the CPU. The file is untrusted: raises ArtifactError, naming it, for anything amiss in it."""
        tensors, header = read(path, cls.FORMAT, cls.VERSION, cls._layout, cls.MIGRATIONS)
        found = _understood(Path(path), lambda header: cls._from(header, tensors), header)
        unknown = header.keys() ^ found._header().keys()
        if unknown:
            names = ", ".join(repr(name[:80]) for name in sorted(unknown)[:4])
            raise ArtifactError(
                f"{path} has entries that {cls.FORMAT} version {cls.VERSION} has not, or lacks some ({names}): make it again"
            )
        return found

    def content_hash(self) -> str:
        """SHA-256 (hex) of all that it is, but for ``UNHASHED``: equal results have equal hashes."""
        return content_hash(self._tensors(), {**self._header(), **self.UNHASHED})

    def to(self: N, device: torch.device | str) -> N:
        """The same with its tensors on ``device``."""
        return replace(self, **{name: _each(lambda tensor: tensor.to(device), getattr(self, name)) for name in self.TENSORS})


class Checkpoint:
    """A file in which a verb keeps what it has paid for, so that a stopped run goes on from it to the result it would have had.

    path: None keeps nothing. tensors, asked: what the run was made from; a file of other inputs is refused.
    """

    def __init__(self, path: Path | None, format: str, version: int, tensors: Mapping[str, Tensor], asked: Header) -> None:
        self.path, self._format, self._version = path, format, version
        self._tensors, self._asked = tensors, asked

    @cached_property
    def _key(self) -> str:
        return content_hash(self._tensors, self._asked)

    def save(self, tensors: Mapping[str, Tensor], header: Header) -> None:
        """Keep the state of the run, in place of any before. A disk that refuses it is a warning in the log."""
        if self.path is not None:
            write_spare(self.path, tensors, {**header, "format": self._format, "version": self._version, "key": self._key})

    def load(self, layout: Layout) -> tuple[dict[str, Tensor], Header] | None:
        """The state of a stopped run, or None. Raises ArtifactError for a file that cannot be read or is another run's."""
        if self.path is None or not self.path.exists():
            return None
        tensors, header = read(self.path, self._format, self._version, layout)
        if header.get("key") != self._key:
            raise ArtifactError(f"{self.path} belongs to a run with other inputs: delete it, or give this run another checkpoint")
        return tensors, header

    def discard(self) -> None:
        """Delete the file: the run is done."""
        if self.path is not None:
            discard(self.path)


def as_text(value: Any) -> str:
    """``value``, of an untrusted header, as a text of bounded length. This and the following raise TypeError or ValueError otherwise."""
    if len(_typed(value, str)) > _TEXT:
        raise ValueError(f"a text of {len(value)} characters is too long")
    return value


def as_flag(value: Any) -> bool:
    """True or false."""
    return _typed(value, bool)


def as_whole(value: Any, largest: int = 2**64 - 1) -> int:
    """A whole number from 0 to ``largest``."""
    if not 0 <= _typed(value, int) <= largest:
        raise ValueError(f"a whole number is not between 0 and {largest}")
    return value


def as_number(value: Any) -> float:
    """A number that can be computed with."""
    if type(value) not in (int, float) or not abs(value) <= 1e300:
        raise TypeError(f"{str(value)[:40]!r} is no finite number")
    return float(value)


def as_list(value: Any) -> list[Any]:
    """A list of bounded length."""
    if len(_typed(value, list)) > _LIST:
        raise ValueError(f"a list of {len(value)} entries is too long")
    return value


def as_texts(value: Any) -> tuple[str, ...]:
    """A list of texts."""
    return tuple(as_text(text) for text in as_list(value))


def as_mapping(value: Any) -> dict[str, Any]:
    """A mapping of bounded size."""
    if len(_typed(value, dict)) > _LIST or any(len(name) > _TEXT for name in value):
        raise ValueError("a mapping is too large")
    return value


def as_settings(value: Any) -> dict[str, Setting]:
    """The settings of a method, of the types they were stored in."""
    found = as_mapping(value)
    for setting in found.values():
        if not isinstance(setting, bool):
            as_text(setting) if isinstance(setting, str) else as_number(setting)
    return found


def as_provenance(header: Header) -> dict[str, Any]:
    """Of the fields of `Provenance`, those that a format stores."""
    readers: dict[str, Callable[[Any], Any]] = {
        "model": as_text,
        "method": as_text,
        "seed": as_whole,
        "settings": as_settings,
        "evals": as_whole,
        "calls": as_whole,
    }
    return {name: reader(header[name]) for name, reader in readers.items() if name in header}


def _typed(value: Any, kind: type[T]) -> T:
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:40]!r} is no {kind.__name__}")
    return value


def _each(function: Callable[[Tensor], Tensor], held: Any) -> Any:
    """What a noun's field holds with ``function`` applied to each tensor."""
    if held is None or isinstance(held, Tensor):
        return None if held is None else function(held)
    moved = {name: function(tensor) for name, tensor in _parts_of(held).items()}
    return moved if isinstance(held, Mapping) else replace(held, **moved)


def _named(name: str, held: Any) -> dict[str, Tensor]:
    if held is None or isinstance(held, Tensor):
        return {} if held is None else {name: held}
    return {f"{name}.{part}": tensor for part, tensor in _parts_of(held).items()}


def _parts_of(held: Any) -> Mapping[str, Tensor]:
    return held if isinstance(held, Mapping) else vars(held)


def _header(path: Path, metadata: Mapping[str, str] | None) -> Header:
    if metadata is None or set(metadata) != {KEY}:
        raise ArtifactError(f"{path} is not a ConceptKit artifact: its metadata is not the one key {KEY!r}; choose a file this pack wrote")
    try:
        header = json.loads(metadata[KEY], parse_constant=_not_a_number, parse_float=_finite_number, parse_int=_whole_number)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} has a header that is not JSON ({error}): make it again") from error
    if not isinstance(header, dict):
        raise ArtifactError(f"{path} has a header that is no mapping: make it again")
    _identity(header, str(path))
    return header


def _identity(header: Mapping[str, Any], of: str) -> None:
    if not isinstance(header.get("format"), str) or type(header.get("version")) is not int:
        raise ArtifactError(f"{of} names no format (text) and version (a whole number): use a header that has both")


def _expect(path: Path, header: Header, format: str, version: int, migrations: Mapping[int, Migration]) -> Header:
    if header["format"] != format:
        raise ArtifactError(f"{path} is a {header['format'][:80]!r}, not a {format!r}: connect or choose a file of that kind")
    if header["version"] > version:
        raise ArtifactError(f"{path} is {format} version {header['version']}, newer than {version}: update ConceptKit to read it")
    for older in range(header["version"], version):
        if older not in migrations:
            raise ArtifactError(f"{path} is {format} version {older}, older than {version}: make it again with this ConceptKit")
        header = {**_understood(path, migrations[older], header), "version": older + 1}
    return header


def _understood(path: Path, reader: Callable[[Header], T], header: Header) -> T:
    try:
        return reader(header)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ArtifactError(f"{path} has an incomplete header ({type(error).__name__}: {error}): make it again") from error


def _tensors(path: Path, file: Any, promised: Mapping[str, Spec]) -> dict[str, Tensor]:
    present = set(file.keys())
    if present != set(promised):
        names = ", ".join(repr(name[:80]) for name in sorted(present ^ set(promised))[:4])
        raise ArtifactError(f"{path} lacks tensors its header promises, or has others ({names}): make it again")
    tensors = {}
    for name, (dtype, shape) in sorted(promised.items()):
        piece = file.get_slice(name)
        found = tuple(piece.get_shape())
        fits = len(found) == len(shape) and all(s in (None, f) for s, f in zip(shape, found, strict=True))
        if _DTYPES.get(piece.get_dtype()) != dtype or not fits:
            expected = "x".join("?" if s is None else str(s) for s in shape) or "a number"
            raise ArtifactError(f"{path}: tensor {name!r} is {piece.get_dtype()} {list(found)}, not {dtype} {expected}: make it again")
        # A copy, so that nothing keeps the file mapped: it may be replaced while the artifact is in use.
        tensors[name] = _finite(name, file.get_tensor(name).clone(), f"{path} cannot be used: make it again")
    return tensors


def _finite(name: str, tensor: Tensor, advice: str) -> Tensor:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ArtifactError(f"tensor {name!r} holds NaN or infinity; {advice}")
    return tensor


def _owned(tensor: Tensor) -> Tensor:
    """A copy in row-major memory of its own, which safetensors asks for."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _parts(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> list[bytes]:
    parts = [canonical(header).encode()]
    for name in sorted(tensors):
        tensor = _owned(tensors[name])
        parts += [f"{name}\0{tensor.dtype}\0{list(tensor.shape)}".encode(), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()]
    return parts


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def _not_a_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is no JSON number")


def _finite_number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _not_a_number(text)


def _whole_number(text: str) -> int:
    return int(text) if len(text) <= _DIGITS else _not_a_number(text)
