"""A decomposition as a thing: kept, changed, shown, and read from files nobody should trust."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conceptkit.core import __version__, artifact
from conceptkit.core.artifact import ArtifactError
from conceptkit.core.decompose import Decomposition, Fidelity, LevelR2, Restart
from conceptkit.core.model import Conditioning
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import Tensor

WORDS = ("red", "feather", "wing", "sky")
TABLES = {name: torch.randn(40, width, generator=torch.Generator().manual_seed(width)) for name, width in (("l", 6), ("g", 10))}


class Text:
    """Words are their place in the table; a prompt is its embeddings, each encoder's side by side."""

    def __init__(self, *names: str) -> None:
        self.vocabulary = {f"{word}</w>": index for index, word in enumerate(["a", "photo", "of", *WORDS, "beak", "claw"])}
        self.tables = {name: TABLES[name] for name in names}

    def encode(self, prompts: list[object]) -> Conditioning:
        (prompt,) = prompts
        rows = [torch.cat([part[name] if not isinstance(part, str) else self.rows(name, part) for part in prompt]) for name in self.tables]
        return Conditioning(torch.cat(rows, dim=1)[None])

    def rows(self, name: str, text: str) -> Tensor:
        return self.tables[name][[self.vocabulary[f"{word}</w>"] for word in text.split()]]


def example(*encoders: str, **changes: object) -> Decomposition:
    text = Text(*(encoders or ("l", "g")))
    ids = [text.vocabulary[f"{word}</w>"] for word in WORDS]
    found = Decomposition(
        concept="bird",
        template="a photo of a {}",
        words=WORDS,
        ids=tuple(ids),
        alpha=torch.tensor([0.4, 0.3, 0.2, 0.1]),
        importance=(0.3, 0.2, 0.1, -0.01),
        fidelity=Fidelity(0.97, 0.99, (LevelR2(3.0, 14.6, 0.98), LevelR2(0.03, 2.9, 0.91)), 0.975),
        embeddings={name: table[ids] for name, table in text.tables.items()},
        norms={name: float(table.norm(dim=1).mean()) for name, table in text.tables.items()},
        method="distilled",
        seed=2**63 - 1,
        seeds=(1, 2**31 - 1),
        heldout_seeds=(3,),
        settings={"steps": 12.0, "guidance": 4.1},
        candidates=500,
        restarts=(Restart("linearised", 0.9, False), Restart("descent", 0.97, True)),
        evals=1234,
        calls=99,
        model="tiny",
        budget="default",
        size=(128, 64),
        excluded="the concept itself",
        clusters=(("red", "sky"),),
        versions={"conceptkit": "0.1.0", "torch": "2"},
    )
    return replace(found, **changes)  # type: ignore[arg-type]


def same(first: Decomposition, second: Decomposition) -> bool:
    plain = [{n: v for n, v in vars(d).items() if n not in ("alpha", "embeddings")} for d in (first, second)]
    rows = [{"alpha": d.alpha, **d.embeddings} for d in (first, second)]
    return plain[0] == plain[1] and rows[0].keys() == rows[1].keys() and all(torch.equal(rows[0][n], rows[1][n]) for n in rows[0])


@pytest.mark.law
@pytest.mark.parametrize("found", [example(), example("l"), example(importance=None, fidelity=None, restarts=(), clusters=())])
def test_saved_and_loaded_it_is_the_same_bit_for_bit(found: Decomposition, tmp_path: Path) -> None:
    found.save(tmp_path / "bird.safetensors")
    loaded = Decomposition.load(tmp_path / "bird.safetensors")
    assert same(found, loaded) and loaded.content_hash() == found.content_hash()
    text = Text(*found.norms)
    assert torch.equal(loaded.apply(text).context, found.apply(text).context)  # type: ignore[arg-type]
    assert torch.equal(loaded.apply(text, "of {} a").context, found.apply(text, "of {} a").context)  # type: ignore[arg-type]
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "bird.safetensors").read_bytes()
    found.save(tmp_path / "again")
    replace(found, versions={"torch": "another"}, model="elsewhere").save(tmp_path / "again")  # equal, and made by another version
    assert (tmp_path / "again").read_bytes() == (tmp_path / "bird.safetensors").read_bytes()
    with pytest.raises(ArtifactError, match="other content"):
        replace(found, concept="cat").save(tmp_path / "again")


@pytest.mark.law
def test_tensors_have_the_layout_of_a_file_from_the_start(tmp_path: Path) -> None:
    rows = {name: table.T.contiguous().T for name, table in example().embeddings.items()}
    found = example(embeddings=rows, alpha=torch.cat([torch.zeros(1), example().alpha])[1:])
    found.save(tmp_path / "bird.safetensors")
    loaded = Decomposition.load(tmp_path / "bird.safetensors")
    for one, other in [(found.alpha, loaded.alpha), *((found.embeddings[name], loaded.embeddings[name]) for name in rows)]:
        assert (one.stride(), one.storage_offset()) == (other.stride(), 0)
        assert torch.equal(one, other)


def test_the_hash_follows_what_was_found_and_not_what_computed_it() -> None:
    found = example()
    assert found.content_hash() == example().content_hash() == example(versions={"torch": "3"}, model="renamed").content_hash()
    changes = [
        {"concept": "cat"}, {"seed": 1}, {"evals": 1}, {"alpha": found.alpha.flip(0)}, {"fidelity": None}, {"edits": ("x",)},
        {"fillers": ("red",)}, {"embeddings": {n: r + 1 for n, r in found.embeddings.items()}}, {"restarts": ()}, {"settings": {}},
        {"size": (64, 64)},
    ]  # fmt: skip
    assert len({found.content_hash(), *(example(**change).content_hash() for change in changes)}) == len(changes) + 1


def test_json_says_it_all_in_plain_values() -> None:
    found = example()
    said = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert said["r2"] == 0.97 and said["reliable"] is True and said["hash"] == found.content_hash()
    assert said["words"][0] == {"word": "red", "id": 3, "share": pytest.approx(0.4), "importance": 0.3, "fills_in": False}
    assert said["fidelity"] == asdict(found.fidelity) | {"levels": [asdict(level) for level in found.fidelity.levels]}  # type: ignore[arg-type,union-attr]
    assert said["clusters"] == [["red", "sky"]] and said["size"] == [128, 64] and said["versions"]["torch"] == "2"
    unknown = example(importance=None, fidelity=None).to_json()
    assert unknown["r2"] is None and unknown["fidelity"] is None and {w["importance"] for w in unknown["words"]} == {None}
    assert json.dumps(unknown, allow_nan=False)


def test_multipliers_move_weight_and_forget_what_was_measured() -> None:
    found = example()
    assert found.reweighted({}) is found and found.reweighted(dict.fromkeys(WORDS, 1)) is found
    more = found.reweighted({"sky": 5, "wing": 0, "red": 1})
    assert more.words == ("sky", "red", "feather") and more.ids == (6, 3, 4)
    assert more.shares == pytest.approx((0.5 / 1.2, 0.4 / 1.2, 0.3 / 1.2))
    assert torch.equal(more.embeddings["g"], found.embeddings["g"][[3, 0, 1]])
    direction = 0.4 * found.embeddings["l"][0] + 0.3 * found.embeddings["l"][1] + 0.5 * found.embeddings["l"][3]
    assert torch.allclose(more.token["l"][0], found.norms["l"] * direction / direction.norm(), atol=1e-6)
    assert more.fidelity is None and more.importance is None and math.isnan(more.r2) and not more.reliable
    assert more.edits == ("sky x 5", "wing x 0") and "changed by hand" in more.summary() and "pictures not fitted" not in more.summary()
    assert more.clusters == (("red", "sky"),) and found.reweighted({"sky": 0}).clusters == ()
    assert found.fidelity is not None and found.words == WORDS


def test_a_word_is_added_or_replaced() -> None:
    found, text = example(), Text("l", "g")
    added = found.with_words(text, {" Beak ": 0.25})  # type: ignore[arg-type]
    assert dict(zip(added.words, added.shares, strict=True)) == pytest.approx(
        {"red": 0.3, "beak": 0.25, "feather": 0.225, "wing": 0.15, "sky": 0.075}
    )
    assert torch.equal(added.embeddings["l"][added.words.index("beak")], TABLES["l"][7]) and added.ids[added.words.index("beak")] == 7
    known = found.with_words(text, {"wing": 0.6})  # type: ignore[arg-type]
    assert known.words[0] == "wing" and known.shares == pytest.approx((0.6, 0.2, 0.15, 0.05))
    several = found.with_words(text, {"beak": 0.2, "wing": 0.2, "claw": 0.2})  # type: ignore[arg-type]
    assert dict(zip(several.words, several.shares, strict=True)) == pytest.approx(
        {"beak": 0.2, "wing": 0.2, "claw": 0.2, "red": 0.2, "feather": 0.15, "sky": 0.05}
    )
    assert found.with_words(text, {}) is found  # type: ignore[arg-type]
    swapped = found.replaced(text, "red", "claw")  # type: ignore[arg-type]
    assert swapped.words == ("claw", *WORDS[1:]) and swapped.shares == pytest.approx(found.shares)
    assert torch.equal(swapped.embeddings["g"], torch.cat([TABLES["g"][8:9], found.embeddings["g"][1:]]))
    merged = found.replaced(text, "red", "wing")  # type: ignore[arg-type]
    assert merged.words == ("wing", "feather", "sky") and merged.shares == pytest.approx((0.6, 0.3, 0.1))
    assert found.replaced(text, "red", "red") is found  # type: ignore[arg-type]
    for changed in (added, known, swapped, merged):
        assert changed.fidelity is None and len(changed.edits) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t: d.reweighted({"cat": 1}), "not among the words"),
        (lambda d, t: d.reweighted({"red": -1}), "0 or more"),
        (lambda d, t: d.reweighted({"red": math.nan}), "0 or more"),
        (lambda d, t: d.reweighted({"red": math.inf}), "0 or more"),
        (lambda d, t: d.reweighted(dict.fromkeys(WORDS, 0)), "no word is left"),
        (lambda d, t: d.with_words(t, {"flamingo": 0.5}), "not a single token"),
        (lambda d, t: d.with_words(t, {"beak": 1}), "a share lies between 0 and 1"),
        (lambda d, t: d.with_words(t, {"beak": math.nan}), "a share lies between 0 and 1"),
        (lambda d, t: d.with_words(t, {"beak": 0.5, "claw": 0.5}), "all of them together below 1"),
        (lambda d, t: d.reweighted(dict.fromkeys(WORDS[1:], 0)).with_words(t, {"red": 0.5}), "no other word is left"),
        (lambda d, t: d.replaced(t, "cat", "beak"), "not among the words"),
        (lambda d, t: d.replaced(t, "red", "flamingo"), "not a single token"),
        (lambda d, t: d.with_words(Text("l"), {"beak": 0.5}), "another kind"),
        (lambda d, t: d.apply(t, "of bird"), "must contain"),
    ],
)
def test_changes_that_make_no_sense_are_named(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change(example(), Text("l", "g"))


def test_the_summary_says_how_far_to_trust_it() -> None:
    assert "explains 97.0%" in example().summary() and "red, sky say nearly the same" in example().summary()
    assert "left out: the concept itself" in example().summary()
    poor = example(fidelity=replace(example().fidelity, heldout=0.3))  # type: ignore[type-var]
    assert not poor.reliable and "do not explain" in poor.summary()
    unmeasured = example(fidelity=None, importance=None, method="text", selected="R2")
    assert "was not measured (text method)" in unmeasured.summary() and "selected by R2" in unmeasured.summary()


def test_the_embedding_file_is_what_other_programs_read(tmp_path: Path) -> None:
    found = example("l", concept="red bird")
    found.save_embedding(tmp_path / "one.safetensors")
    (entry,) = load_file(tmp_path / "one.safetensors").items()
    assert entry[0] == "<red-bird>" and torch.equal(entry[1], found.token["l"]) and entry[1].shape == (1, 6)
    both = example()
    both.save_embedding(tmp_path / "both.safetensors")
    tensors = load_file(tmp_path / "both.safetensors")
    assert tensors.keys() == {"clip_l", "clip_g"} and torch.equal(tensors["clip_g"], both.token["g"])
    both.save_embedding(tmp_path / "both.safetensors")
    with pytest.raises(ArtifactError, match="other content"):
        found.save_embedding(tmp_path / "both.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"words": ()}, {"words": ("red", "red", "a", "b")}, {"words": ("", "x", "a", "b")}, {"words": ("red",)}, {"ids": (1,)},
        {"alpha": torch.tensor([0.5, 0.5, 0.5, -0.5])}, {"alpha": torch.tensor([0.5, 0.5, 0.5, 0.5])},
        {"alpha": torch.full((4,), math.nan)}, {"alpha": torch.full((4, 1), 0.25)}, {"importance": (1.0,)},
        {"template": "bird"}, {"norms": {"l": 1.0}}, {"norms": {}},
        {"norms": {"l": 1.0, "g": 0.0}}, {"norms": {"l": 1.0, "g": math.inf}}, {"clusters": (("red", "cat"),)},
        {"clusters": (("red", "sky"), ("sky", "wing"))}, {"norms": {"x": 1.0}, "embeddings": {"x": torch.ones(4, 2)}},
    ],
)  # fmt: skip
def test_an_impossible_decomposition_cannot_be_made(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        example(**changes)


VALUES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
JSON = st.recursive(
    VALUES | st.just("x" * 5000) | st.just(10**400), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v)
)


@given(st.data())
def test_any_other_header_is_refused_or_still_a_decomposition(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever stands in a header, a reader gets an ArtifactError naming the file, or a decomposition that holds together."""
    found = example("l")
    header = found._header()
    for name in data.draw(st.lists(st.sampled_from(sorted(set(header) - {"format", "version"})), min_size=1, max_size=2, unique=True)):
        header[name] = data.draw(JSON, label=name)
    header |= data.draw(st.just({}) | st.dictionaries(st.text(max_size=3), JSON, max_size=1))
    path = tmp_path_factory.getbasetemp() / "hostile"
    path.write_bytes(save(found._tensors(), {artifact.KEY: json.dumps({**header, "format": "conceptkit-decomposition", "version": 1})}))
    check(path)


@given(st.data())
def test_damaged_files_are_refused_or_still_a_decomposition(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    found = example("l")
    content = bytearray(save(found._tensors(), {artifact.KEY: artifact.canonical(found._header())}))
    for position, byte in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=3)):
        content[position] = byte
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    check(path)


def check(path: Path) -> None:
    try:
        found = Decomposition.load(path)
    except ArtifactError as error:
        refusal = str(error)
    else:
        refusal = str(path)
        assert found.summary() and json.dumps(found.to_json(), allow_nan=False)
        assert torch.isfinite(found.token["l"]).all()
    assert str(path) in refusal


def test_a_file_of_version_1_loads_without_what_it_measured_otherwise(tmp_path: Path) -> None:
    found = example()
    header = {name: value for name, value in found._header().items() if name != "fillers"}
    artifact.write(tmp_path / "old", found._tensors(), {**header, "version": 1})
    loaded = Decomposition.load(tmp_path / "old")
    assert loaded.words == found.words and torch.equal(loaded.alpha, found.alpha) and loaded.fidelity == found.fidelity
    assert loaded.importance is None and loaded.fillers == ()


def test_words_stand_in_order_of_importance_and_those_that_fill_in_apart() -> None:
    found = example(importance=(0.001, 0.3, 0.0, 0.2)).by_importance()
    assert found.words == tuple(example().words[i] for i in (1, 3, 0, 2)) and found.importance == (0.3, 0.2, 0.001, 0.0)
    assert found.fillers == found.words[2:] and "fill in:" in found.summary()
    assert torch.equal(found.token["l"], example().token["l"]) or torch.allclose(found.token["l"], example().token["l"], atol=1e-6)
    # What a word is worth in another mixture was not measured.
    assert found.reweighted({found.words[0]: 2}).fillers == ()
    nothing = example(importance=(0.0, 0.0, 0.0, 0.0)).by_importance()
    assert len(nothing.fillers) == 3  # never all
    assert example(importance=None).by_importance().words == example().words


def test_other_versions_and_kinds_are_refused(tmp_path: Path) -> None:
    found = example()
    for change, message in (({"version": 3}, "newer"), ({"version": 0}, "older"), ({"format": "conceptkit-edit"}, "not a")):
        artifact.write(tmp_path / "a", found._tensors(), {**found._header(), **change}, overwrite=True)
        with pytest.raises(ArtifactError, match=message):
            Decomposition.load(tmp_path / "a")


def test_the_version_is_the_package_s(root: Path) -> None:
    assert f'\nversion = "{__version__}"\n' in (root / "pyproject.toml").read_text("utf-8")
