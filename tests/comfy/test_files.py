"""What the nodes write: names as stock save nodes take them, sub-folders, what is refused before the graph runs, and disks that refuse."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from conceptkit.tests.comfy.graphs import decompose, node


def erase(concepts):
    given = {"keep": "", "method": "conceptkit", "strength": 1.0, "hard": False, "seed": 0}
    return {"erase": node("ConceptKitErase", model=["loader", 0], clip=["loader", 1], concepts=concepts, **given)}


def shown(comfy, **nodes):
    """A graph that shows what Decompose Concept (node) or Load Decomposition (load) says."""
    source = ["node", 3] if "node" in nodes else ["load", 2]
    return comfy.loaders() | nodes | {"show": node("PreviewAny", source=source)}


def kept(comfy, pattern="*"):
    return sorted((comfy.base / "models" / "conceptkit" / "decompositions").glob(pattern))


def saves(comfy, name):
    """The four nodes that save, each under ``name``, on a decomposition and an edit."""
    source = comfy.loaders() | {"node": decompose()} | erase(concepts="circle -> square")
    return {
        "decomposition": source | {"save": node("ConceptKitSaveDecomposition", decomposition=["node", 0], name=name)},
        "embedding": source | {"save": node("ConceptKitSaveEmbedding", decomposition=["node", 0], name=name, overwrite=True)},
        "edit": source | {"save": node("ConceptKitSaveEdit", edit=["erase", 1], name=name)},
        "lora": source | {"save": node("ConceptKitSaveEditLora", model=["loader", 0], edit=["erase", 1], name=name, precision="fp16")},
    }


FOLDERS = {"decomposition": "conceptkit/decompositions", "embedding": "embeddings", "edit": "conceptkit/edits", "lora": "loras"}
LOADERS = {
    "decomposition": ("ConceptKitLoadDecomposition", "file"),
    "edit": ("ConceptKitLoadEdit", "file"),
    "lora": ("LoraLoaderModelOnly", "lora_name"),
}


def saved(comfy, kind, name):
    """The file that a node wrote, and what it says about it."""
    said = comfy.run(saves(comfy, name)[kind])["save"]["text"][0]
    file = f"{said.removeprefix('embedding:')}.safetensors" if kind == "embedding" else said
    path = comfy.base / "models" / FOLDERS[kind] / file
    assert path.is_file(), said
    if kind in LOADERS:
        loader, key = LOADERS[kind]
        spec = comfy.get(f"/object_info/{loader}")[loader]["input"]["required"][key]
        assert file in (spec[0] if isinstance(spec[0], list) else spec[1]["options"])
    return path.relative_to(comfy.base / "models" / FOLDERS[kind]).as_posix()


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize(
    ("asked", "begins"),
    [
        ("birds/bird", "birds/bird"),
        ("birds\\bird", "birds/bird"),
        ("vögel/ein-Vögelchen", "vögel/ein-Vögelchen"),
        ("鳥", "鳥"),
        ("bird.safetensors", "bird"),
        ("v" * 232, "v" * 232),
        ("%year%/%date:yyyy-MM-dd%", time.strftime("%Y/%Y-%m-%d")),
        ("%KSampler.seed%", "%KSampler.seed%"),
    ],
)
def test_names_are_taken_as_stock_save_nodes_take_them(comfy, kind, asked, begins):
    found = saved(comfy, kind, asked)
    assert found.startswith(begins)
    assert len(found) == len(begins) + len(".safetensors") + (0 if kind == "embedding" else 11)


def test_nothing_asked_for_names_the_content(comfy):
    """What Decompose Concept keeps by itself and what is saved are one file."""
    found = {kind: saved(comfy, kind, "") for kind in FOLDERS}
    assert found["embedding"] == "bird-words.safetensors"
    assert found["edit"].startswith("circle-") and found["lora"].startswith("circle-")
    before = kept(comfy)
    assert found["decomposition"] in {path.name for path in before}
    comfy.run(shown(comfy, node=decompose(exclude=" , ")))
    assert kept(comfy) == before


REFUSED = [
    "../up",
    "a/../../b",
    "/etc/passwd",
    "\\\\server\\share",
    "C:\\x",
    "~/../x",
    ".hidden",
    "a/.b/c",
    "nul",
    "birds/COM1.txt",
    "a:b",
    "a?",
]
REFUSED += [
    "a*",
    'a"',
    "<a>",
    "a|b",
    "tab\there",
    "line\nbreak",
    "null\0",
    "turned\u202eround",
    "half\ud800",
    "dot./a",
    "v" * 300,
    "a/" + "ö" * 128 + "/b",
]


@pytest.mark.parametrize("name", REFUSED, ids=ascii)
def test_names_that_lead_elsewhere_or_are_none_everywhere_are_refused_before_anything_runs(comfy, name):
    for kind, graph in saves(comfy, name).items():
        with pytest.raises(AssertionError, match="custom_validation_failed") as refusal:
            comfy.queue(graph)
        details = json.loads(str(refusal.value))["node_errors"]["save"]["errors"][0]["details"]
        assert "write" in details, kind


@pytest.mark.parametrize("name", ["a bird", "bird(1)", "bird,", "[bird]"])
def test_an_embedding_has_a_name_that_a_prompt_can_hold(comfy, name):
    graphs = saves(comfy, name)
    with pytest.raises(AssertionError, match="as the end of the name: write - instead"):
        comfy.queue(graphs["embedding"])
    comfy.queue(graphs["decomposition"])


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_name_that_another_node_gives_is_checked_when_it_is_known(comfy, kind):
    graph = saves(comfy, "")[kind] | {"name": node("PrimitiveString", value="../up")}
    graph["save"]["inputs"]["name"] = ["name", 0]
    assert "leads out of the folder" in comfy.fail(graph)


def test_a_link_does_not_lead_out(comfy, tmp_path):
    (comfy.base / "models" / "conceptkit" / "edits" / "link").symlink_to(tmp_path)
    with pytest.raises(AssertionError, match="through a link: write a folder that lies in it"):
        comfy.queue(saves(comfy, "link/edit")["edit"])


def test_any_name_is_refused_or_is_a_file_in_its_folder(comfy, tmp_path):
    """Every accepted one is really written and listed."""
    rng = random.Random(0)
    alphabet = [
        "/",
        "\\",
        ".",
        "..",
        " ",
        "%",
        "%date:yy/MM%",
        "%day%",
        "-",
        "a",
        "ö",
        "鳥",
        "\u0301",
        "\u200d",
        "\u202e",
        "\n",
        "\0",
        ":",
        "nul",
        "C:",
        "~",
    ]
    alphabet += ["x" * 120, ".safetensors", "\ud83d"]
    names = ["".join(rng.choice(alphabet) for _ in range(rng.randint(1, 6))) for _ in range(2000)]
    found = comfy.probe("named", wires={"model": None, "clip": None, "vae": None}, names=names, folder=str(tmp_path))
    accepted = [name for name, said in zip(names, found, strict=True) if isinstance(said, list)]
    assert 200 < len(accepted) < 1800
    assert {path.parts[: len(tmp_path.parts)] for path in tmp_path.rglob("*")} == {tmp_path.parts}
    for name, said in zip(names, found, strict=True):
        if isinstance(said, list):
            path, listed = said
            assert Path(path).is_relative_to(tmp_path) and ".." not in Path(path).parts and listed
        else:
            assert "write" in said, name


def test_a_file_in_a_folder_is_loaded_and_says_what_it_was_made_with(comfy):
    file = saved(comfy, "decomposition", "birds/one")
    text = comfy.run(shown(comfy, load=node("ConceptKitLoadDecomposition", file=file)))["show"]["text"][0]
    assert text.splitlines()[-1] == "made with “a photo of a {}” on ConceptKitShapes by text (fast) at 128×128, seed 0"


def test_only_checkpoints_that_load_are_listed(comfy):
    shipped = {path.name for path in comfy.weights.parent.iterdir()} if comfy.weights.name == "shapes.safetensors" else set()
    for loader, key in (("CheckpointLoaderSimple", "ckpt_name"), ("ConceptKitLoadScorer", "checkpoint")):
        spec = comfy.get(f"/object_info/{loader}")[loader]["input"]["required"][key]
        options = spec[0] if isinstance(spec[0], list) else spec[1]["options"]
        assert shipped & set(options) == ({"shapes.safetensors"} if shipped else set())
        assert not any("second" in option for option in options)


@contextmanager
def refusing(comfy, *folders):
    """As though the folders lay on a disk that refuses: a file is where each was, so that not even root can write there."""
    places = [comfy.base / "models" / "conceptkit" / folder for folder in folders]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        place.rename(place.with_name(f"{place.name}.aside"))
        place.touch()
    try:
        yield
    finally:
        for place in places:
            assert place.is_file()
            place.unlink()
            place.with_name(f"{place.name}.aside").rename(place)


def test_a_result_goes_out_where_nothing_can_be_kept(comfy):
    first = comfy.run(shown(comfy, node=decompose(concept="moon")))["show"]["text"][0]
    before = kept(comfy)
    with refusing(comfy, "decompositions", "cache"):
        for concept, method in (("moon", "text"), ("moon", "distilled"), ("star", "text")):
            asked = decompose(concept=concept, method=method, exclude="\n ")
            text = comfy.run(shown(comfy, node=asked))["show"]["text"][0]
            assert text.startswith(f"{concept} = ")
            assert text == first or (concept, method) != ("moon", "text")
        graph = comfy.loaders() | erase(concepts="star") | {"show": node("PreviewAny", source=["erase", 3])}
        assert comfy.run(graph)["show"]["text"][0].startswith("star")
        with pytest.raises(AssertionError, match="is a file, so nothing can be saved in a folder of that name"):
            comfy.queue(saves(comfy, "")["decomposition"])
    log = comfy.log.read_text()
    assert "This result is not kept" in log and "the work goes on without it" in log
    assert kept(comfy) == before


def test_old_checkpoints_are_forgotten_and_others_stay(comfy):
    cache = comfy.base / "models" / "conceptkit" / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    for name, days in (("old", 15), ("newer", 13), ("running", 0)):
        (cache / f"{name}-0.checkpoint").touch()
        then = time.time() - days * 86400
        os.utime(cache / f"{name}-0.checkpoint", (then, then))
    comfy.run(shown(comfy, node=decompose(concept="tree")))
    assert [path.stem for path in sorted(cache.glob("*-0.checkpoint"))] == ["newer-0", "running-0"]
    for path in cache.glob("*-0.checkpoint"):
        path.unlink()


def test_what_was_kept_and_deleted_is_computed_again(comfy, tmp_path):
    graph = shown(comfy, node=decompose(concept="ring"))
    text = comfy.run(graph)["show"]["text"][0]
    (path,) = kept(comfy, "ring-*")
    whole = path.read_bytes()
    path.unlink()
    graph["node"]["inputs"]["exclude"] = " "
    assert comfy.run(graph)["show"]["text"][0] == text
    assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", ["cut", "other format", "leads out"])
def test_what_says_where_a_result_lies_is_believed_no_more_than_any_file(comfy, damage, tmp_path):
    from conceptkit.core import artifact

    cache = comfy.base / "models" / "conceptkit" / "cache"
    before = set(cache.glob("found-*"))
    graph = shown(comfy, node=decompose(concept="heart", seed=["cut", "other format", "leads out"].index(damage)))
    text = comfy.run(graph)["show"]["text"][0]
    (entry,) = set(cache.glob("found-*")) - before
    whole = entry.read_bytes()
    if damage == "cut":
        entry.write_bytes(whole[:-4])
    elif damage == "other format":
        artifact.write(entry, {}, {"format": "conceptkit-found", "version": 1, "file": 7}, overwrite=True)
    else:
        (path,) = kept(comfy, "bird-*")[:1]
        shutil.copy(path, comfy.base / "outside.safetensors")
        artifact.write(entry, {}, {"format": "conceptkit-found", "version": 1, "file": "../../../outside.safetensors"}, overwrite=True)
    graph["node"]["inputs"]["exclude"] = " "
    assert comfy.run(graph)["show"]["text"][0] == text
    assert entry.read_bytes() == whole
