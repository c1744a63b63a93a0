"""Artifacts: equal content has equal bytes, writing is all or nothing, and a reader believes no file."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from conceptkit.core import artifact
from conceptkit.core.artifact import ArtifactError, Checkpoint, Noun
from conceptkit.core.decompose import Decomposition
from conceptkit.core.edit import ContextEdit
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

HEADER = {"format": "test", "version": 1, "words": ["robin", "finch"], "share": 0.1}
TENSORS = {"alpha": torch.tensor([0.25, 0.75]), "ids": torch.tensor([3, 1]), "row": torch.arange(6.0).reshape(2, 3).half()}


def layout(header):
    return {
        "alpha": (torch.float32, (len(header["words"]),)),
        "ids": (torch.int64, (len(header["words"]),)),
        "row": (torch.float16, (2, None)),
    }


def read(path):
    return artifact.read(path, "test", 1, layout)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    artifact.write(tmp_path / "a.safetensors", TENSORS, HEADER)
    return tmp_path / "a.safetensors"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
headers = st.dictionaries(st.text(), json_values, max_size=4).map(lambda extra: {**extra, "format": "test", "version": 1})
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool])
tensors = st.dictionaries(
    st.text("abc.", min_size=1, max_size=5),
    st.builds(
        lambda dtype, shape, seed: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
        dtypes,
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
        st.integers(0, 9),
    ),
    max_size=4,
)


@given(tensors, headers)
def test_reads_back_what_was_written(tmp_path_factory, written, header):
    path = tmp_path_factory.mktemp("artifact") / "a.safetensors"
    artifact.write(path, written, header)
    found, found_header = artifact.read(path, "test", 1, lambda _: {n: (t.dtype, tuple(t.shape)) for n, t in written.items()})
    assert found_header == header
    assert found.keys() == written.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in written.items())
    assert artifact.content_hash(found, found_header) == artifact.content_hash(written, header)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@given(tensors, headers)
def test_equal_content_has_equal_hash_and_bytes(tmp_path_factory, written, header):
    folder = tmp_path_factory.mktemp("artifact")
    strided = {n: torch.stack([t, t], -1)[..., 0] for n, t in reversed(written.items())}
    turned = dict(reversed(header.items()))
    artifact.write(folder / "a", written, header)
    artifact.write(folder / "b", strided, turned)
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    assert artifact.content_hash(written, header) == artifact.content_hash(strided, turned)


@pytest.mark.parametrize(
    "change",
    [
        lambda t, h: ({**t, "alpha": torch.tensor([0.75, 0.25])}, h),
        lambda t, h: ({**t, "alpha": t["alpha"].double()}, h),
        lambda t, h: ({**t, "row": t["row"].reshape(3, 2)}, h),
        lambda t, h: ({"beta" if n == "alpha" else n: v for n, v in t.items()}, h),
        lambda t, h: (t, {**h, "share": 0.2}),
        lambda t, h: (t, {**h, "version": 2}),
    ],
)
def test_other_content_has_another_hash(change):
    assert artifact.content_hash(*change(TENSORS, HEADER)) != artifact.content_hash(TENSORS, HEADER)


def test_tensors_may_share_memory_and_need_gradients(tmp_path):
    base = torch.ones(2, 2, requires_grad=True)
    artifact.write(tmp_path / "a", {"x": base, "y": base[0]}, HEADER)
    found, _ = artifact.read(tmp_path / "a", "test", 1, lambda _: {"x": (torch.float32, (2, 2)), "y": (torch.float32, (2,))})
    assert torch.equal(found["y"], torch.ones(2))


@pytest.mark.parametrize(
    ("tensors", "header", "says"),
    [
        ({"a": torch.tensor([1.0, float("nan")])}, HEADER, "NaN"),
        ({"a": torch.tensor(float("inf"))}, HEADER, "infinity"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, HEADER, "complex64"),
        ({"__metadata__": torch.ones(1)}, HEADER, "cannot name a tensor"),
        ({}, {"format": "test"}, "version"),
        ({}, {"format": "test", "version": True}, "version"),
        ({}, {**HEADER, "x": float("nan")}, "not JSON"),
        ({}, {**HEADER, "x": {1: 2}}, "text keys"),
        ({}, {**HEADER, "x": torch.ones(1)}, "not JSON"),
    ],
)
def test_refuses_to_write(tmp_path, tensors, header, says):
    with pytest.raises(ArtifactError, match=says):
        artifact.write(tmp_path / "a", tensors, header)
    assert list(tmp_path.iterdir()) == []


def test_writing_again_changes_nothing_and_other_content_is_never_lost(path):
    before = path.stat().st_mtime_ns
    artifact.write(path, TENSORS, HEADER)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ArtifactError, match="exists with other content"):
        artifact.write(path, TENSORS, {**HEADER, "share": 0.3})
    assert read(path)[1] == HEADER
    artifact.write(path, TENSORS, {**HEADER, "share": 0.3}, overwrite=True)
    assert read(path)[1]["share"] == 0.3


def test_a_failed_write_leaves_nothing(path, monkeypatch):
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        artifact.write(path, TENSORS, {**HEADER, "share": 0.3}, overwrite=True)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_name_may_be_as_long_as_file_systems_take(tmp_path):
    path = tmp_path / ("v" * 243 + ".safetensors")
    artifact.write(path, TENSORS, HEADER)
    assert read(path)[1] == HEADER


def refusing(number: int):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_what_can_be_computed_again_need_not_be_written(tmp_path, monkeypatch, caplog, number):
    monkeypatch.setattr(artifact.os, "fsync", refusing(number))
    assert not artifact.write_spare(tmp_path / "a", TENSORS, HEADER)
    assert os.strerror(number) in caplog.text and str(tmp_path / "a") in caplog.text
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ArtifactError, match="NaN"):  # which is no matter of the disk
        artifact.write_spare(tmp_path / "a", {"alpha": torch.tensor(math.nan)}, HEADER)


def test_a_folder_that_is_none_is_a_warning(path, caplog):
    assert not artifact.write_spare(path / "below" / "a", TENSORS, HEADER)
    assert "the work goes on without it" in caplog.text


def test_discarding(path, monkeypatch, caplog):
    monkeypatch.setattr(Path, "unlink", refusing(errno.EROFS))
    assert not artifact.discard(path)
    assert f"{path} cannot be deleted" in caplog.text
    monkeypatch.undo()
    assert artifact.discard(path) and not path.exists()
    assert artifact.discard(path)


@pytest.mark.parametrize(
    "strided",
    [
        torch.arange(6.0).reshape(2, 3).T,
        torch.arange(6.0).reshape(1, 6).T,
        torch.arange(6.0).reshape(6, 1).T,
        torch.arange(8.0).reshape(4, 2)[1:],
        torch.arange(8.0).reshape(4, 2)[:, :1],
        torch.zeros(0, 3).T,
        torch.tensor(1.0),
    ],
)
def test_a_tensor_has_the_layout_that_a_file_gives_it(tmp_path, strided):
    laid_out = artifact.row_major(strided)
    artifact.write(tmp_path / "a", {"x": strided}, HEADER)
    found, _ = artifact.read(tmp_path / "a", "test", 1, lambda _: {"x": (torch.float32, tuple(strided.shape))})
    assert torch.equal(laid_out, strided)
    assert (laid_out.stride(), laid_out.storage_offset()) == (found["x"].stride(), 0)
    assert artifact.row_major(laid_out) is laid_out


def test_older_versions_are_migrated_step_by_step(path):
    """Version 2 calls words names, too, and version 3 counts them."""
    steps = {
        1: lambda header: {**header, "names": header["words"]},
        2: lambda header: {**header, "count": len(header["names"])},
    }
    tensors, header = artifact.read(path, "test", 3, lambda header: layout({"words": range(header["count"])}), steps)
    assert header == {**HEADER, "version": 3, "names": HEADER["words"], "count": 2}
    assert torch.equal(tensors["alpha"], TENSORS["alpha"])
    with pytest.raises(ArtifactError, match=r"version 1, older than 3: make it again"):
        artifact.read(path, "test", 3, layout, {2: steps[2]})
    with pytest.raises(ArtifactError, match=r"version 2, older than 3: make it again"):
        artifact.read(path, "test", 3, layout, {1: steps[1]})
    with pytest.raises(ArtifactError, match=r"incomplete header \(KeyError: 'lost'\)"):
        artifact.read(path, "test", 2, layout, {1: lambda header: {"words": header["lost"]}})


def test_what_was_read_outlives_the_file(path):
    found, _ = read(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(found["alpha"], TENSORS["alpha"])


@pytest.mark.parametrize(
    ("format", "version", "says"),
    [("other", 1, "not a 'other'"), ("test", 0, "newer than 0: update"), ("test", 2, "older than 2: make it again")],
)
def test_another_format_or_version(path, format, version, says):
    with pytest.raises(ArtifactError, match=says) as caught:
        artifact.read(path, format, version, layout)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("promised", "says"),
    [
        ({"alpha": (torch.float32, (2,))}, "has others"),
        ({**layout(HEADER), "beta": (torch.float32, (2,))}, "lacks"),
        ({**layout(HEADER), "alpha": (torch.float64, (2,))}, "'alpha'"),
        ({**layout(HEADER), "alpha": (torch.float32, (3,))}, "'alpha'"),
        ({**layout(HEADER), "alpha": (torch.float32, ())}, "'alpha'"),
    ],
)
def test_other_tensors_than_promised(path, promised, says):
    with pytest.raises(ArtifactError, match=says) as caught:
        artifact.read(path, "test", 1, lambda _: promised)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("words", [None, 3, {}, "robins"])
def test_a_header_the_layout_cannot_use(tmp_path, words):
    header = {"format": "test", "version": 1} if words is None else {**HEADER, "words": words}
    artifact.write(tmp_path / "a", TENSORS, header)
    with pytest.raises(ArtifactError, match="make it again"):
        read(tmp_path / "a")


def test_nan_on_disk(tmp_path):
    save_file({**TENSORS, "alpha": torch.tensor([0.0, float("nan")])}, tmp_path / "a", {"conceptkit": json.dumps(HEADER)})
    with pytest.raises(ArtifactError, match="NaN"):
        read(tmp_path / "a")


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"other": "{}"},
        {"conceptkit": json.dumps(HEADER), "other": ""},
        {"conceptkit": "{"},
        {"conceptkit": "[]"},
        {"conceptkit": "{}"},
        {"conceptkit": '{"format": "test", "version": NaN}'},
        {"conceptkit": '{"format": "test", "version": 1.0}'},
        {"conceptkit": '{"format": 1, "version": 1}'},
        {"conceptkit": "[" * 100_000},
        {"conceptkit": '{"format": "test", "version": ' + "9" * 10_000 + "}"},
        {"conceptkit": json.dumps(HEADER)[:-1] + ', "x": ' + "9" * 400 + "}"},
        {"conceptkit": json.dumps(HEADER)[:-1] + ', "x": [-1e999]}'},
    ],
)
def test_strange_headers(tmp_path, metadata):
    save_file(TENSORS, tmp_path / "a", metadata)
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        read(tmp_path / "a")


def test_not_a_file(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ArtifactError, match="not a file"):
            read(path)


def raw(table: object, data: bytes = b"") -> bytes:
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


META = {"__metadata__": {"conceptkit": json.dumps(HEADER)}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\0" * 64,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 90_000_000) + b"{}",
        raw([]),
        raw({**META, "alpha": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        raw({**META, "alpha": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}),
        raw({**META, "alpha": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, b"\0" * 8),
        raw({**META, "alpha": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"\0" * 8),
        raw({**META, "alpha": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
        raw({**META, "alpha": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, b"\0" * 8),
        raw({**META, "alpha": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 9),
        raw({**META, **{n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in ("alpha", "ids", "row")}}, b"\0" * 8),
    ],
)
def test_hostile_files_cost_no_memory(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match=str(tmp_path)):
            read(tmp_path / "a")
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@settings(max_examples=400)
@given(st.data())
def test_mutated_bytes_raise_nothing_else(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    artifact.write(folder / "whole", TENSORS, HEADER)
    content = bytearray((folder / "whole").read_bytes())
    for position, byte in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)):
        content[position] = byte
    cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    (folder / "mutated").write_bytes(content[:cut] + data.draw(st.binary(max_size=8)))
    try:
        found, header = read(folder / "mutated")
    except ArtifactError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert str(folder / "mutated") in refusal
    else:
        assert {n: (t.dtype, t.shape[0]) for n, t in found.items()} == {n: (t.dtype, t.shape[0]) for n, t in TENSORS.items()}
        assert header["version"] == 1


STORED = Path(__file__).parent / "data"
NOUNS: list[tuple[type[Noun], str, str]] = [
    (Decomposition, "decomposition-version-2", "ed1732e4514a4b051a581b42374def4c506cc9bde6ba0511cb45231caa9693fe"),
    (ContextEdit, "edit-version-2", "7d0277998c8320c1efaa2daef29ee1a33b30b4c9d4929034d6d1f668a5a013c6"),
]
"""Nouns, with a file that was written before they had a common base, and the hash they had then."""


@pytest.mark.parametrize(("noun", "name", "hashed"), NOUNS)
def test_files_written_before_read_and_write_as_they_are(tmp_path, noun, name, hashed):
    stored = STORED / f"{name}.safetensors"
    found = noun.load(stored)
    assert found.content_hash() == hashed == found.to("cpu").content_hash()
    found.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == stored.read_bytes()
    for tensor in found._tensors().values():
        assert tensor is artifact.row_major(tensor)


@pytest.mark.parametrize(("noun", "name", "hashed"), NOUNS)
def test_provenance_is_read_whatever_of_it_a_format_stores(noun, name, hashed):
    found = noun.load(STORED / f"{name}.safetensors")
    assert found.method in ("distilled", "conceptkit") and found.model
    assert found.seed == (0 if noun is Decomposition else found.settings["seed"]) and (found.evals > 0) == (noun is Decomposition)


@pytest.mark.parametrize(("noun", "name", "hashed"), NOUNS)
def test_entries_that_a_format_has_not_are_refused(tmp_path, noun, name, hashed):
    tensors = load_file(STORED / f"{name}.safetensors")
    with safe_open(STORED / f"{name}.safetensors", "pt") as file:
        header = json.loads(file.metadata()[artifact.KEY])
    for change in ({"colour": "red"}, {"method": None}):
        artifact.write(tmp_path / "a", tensors, {**header, **change}, overwrite=True)
        with pytest.raises(ArtifactError, match="'colour'" if "colour" in change else "make it again"):
            noun.load(tmp_path / "a")
    artifact.write(tmp_path / "a", tensors, {key: value for key, value in header.items() if key != "method"}, overwrite=True)
    with pytest.raises(ArtifactError, match="'method'"):
        noun.load(tmp_path / "a")


@pytest.mark.parametrize("noun", [Decomposition, ContextEdit])
def test_every_format_can_be_migrated_from_its_first_version(noun):
    assert set(noun.MIGRATIONS) == set(range(1, noun.VERSION))


def test_a_checkpoint_is_continued_by_the_same_run_alone(tmp_path):
    def checkpoint(path: Path | None, seed: int) -> Checkpoint:
        return Checkpoint(path, "run", 1, {"given": torch.ones(2)}, {"seed": seed})

    def state(header: artifact.Header) -> dict[str, artifact.Spec]:
        return {"x": (torch.float32, (header["step"],))}

    mine = checkpoint(tmp_path / "run", 0)
    assert mine.load(state) is None
    mine.save({"x": torch.ones(3)}, {"step": 3})
    again = checkpoint(tmp_path / "run", 0).load(state)
    assert again is not None and torch.equal(again[0]["x"], torch.ones(3)) and again[1]["step"] == 3
    with pytest.raises(ArtifactError, match="other inputs"):
        checkpoint(tmp_path / "run", 1).load(state)
    mine.discard()
    assert mine.load(state) is None and not list(tmp_path.iterdir())
    nowhere = checkpoint(None, 0)
    nowhere.save({"x": torch.ones(3)}, {"step": 3})
    nowhere.discard()
    assert nowhere.load(state) is None
