"""The nodes around a decomposition: found once and found again, adjusted, kept, exported and drawn, beside stock nodes."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conceptkit.core.demo.world import shapes_world
from conceptkit.tests.comfy.graphs import decompose, node
from PIL import Image


def shown(comfy, source, **nodes):
    """A graph that shows a text."""
    return comfy.loaders() | nodes | {"show": node("PreviewAny", source=list(source))}


def drawing(comfy, steps=3, **positives):
    """A graph that draws each CONDITIONING from the same noise, with stock nodes."""
    graph = comfy.loaders() | {
        "negative": node("CLIPTextEncode", clip=["loader", 1], text=""),
        "empty": node("EmptyLatentImage", width=128, height=128, batch_size=1),
    }
    fixed = {"seed": 5, "steps": steps, "cfg": 3.0, "sampler_name": "dpmpp_2m", "scheduler": "normal", "denoise": 1.0}
    for name, positive in positives.items():
        wires = {"model": ["loader", 0], "positive": list(positive), "negative": ["negative", 0], "latent_image": ["empty", 0]}
        graph[f"{name} latent"] = node("KSampler", **wires, **fixed)
        graph[f"{name} pixels"] = node("VAEDecode", samples=[f"{name} latent", 0], vae=["loader", 2])
        graph[name] = node("PreviewImage", images=[f"{name} pixels", 0])
    return graph


def pixels(comfy, output, index=0):
    return np.asarray(Image.open(comfy.base / "temp" / output["images"][index]["filename"]).convert("RGB"), dtype=int)


UNCACHED = {"exclude": " "}
"""The same question, for which ComfyUI has nothing in its cache."""


def kept(comfy, pattern="*.safetensors"):
    return sorted((comfy.base / "models" / "conceptkit" / "decompositions").glob(pattern))


def unfinished(comfy, pattern):
    return sorted((comfy.base / "models" / "conceptkit" / "cache").glob(f"{pattern}.checkpoint"))


@pytest.fixture(scope="module")
def bird(comfy):
    """The text of a decomposition, and the file it is kept in."""
    for path in kept(comfy, "*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    state = comfy.probe("state")
    text = comfy.run(shown(comfy, ("node", 3), node=decompose()))["show"]["text"][0]
    assert comfy.probe("state") == state
    (path,) = kept(comfy, "*")
    return text, path


def loading(bird):
    return {"load": node("ConceptKitLoadDecomposition", file=bird[1].name)}


def test_it_is_found_again_when_the_cache_was_dropped(comfy, bird, tmp_path):
    """What lies under the name is what is returned, so nothing was computed."""
    text, path = bird
    assert path.name.startswith(f"bird-{first_word(text)}-")
    nodes = {"adjust": adjusted(bird, f"{first_word(text)}: 0"), "save": saving("adjust", "changed")}
    outputs = comfy.run(shown(comfy, ("adjust", 3), **loading(bird), **nodes))
    other, name = outputs["show"]["text"][0], outputs["save"]["text"][0].splitlines()[0]
    shutil.copy(path, tmp_path / "kept")
    try:
        shutil.copy(path.with_name(name), path)
        assert comfy.run(shown(comfy, ("node", 3), node=decompose(**UNCACHED)))["show"]["text"][0] == other
        assert comfy.run(shown(comfy, ("node", 3), node=decompose(**UNCACHED, reuse=False)))["show"]["text"][0] == text
    finally:
        shutil.copy(tmp_path / "kept", path)


def first_word(text):
    return text.splitlines()[1].split(":")[0].strip()


def adjusted(bird, adjustments, source=("load", 0)):
    return node("ConceptKitAdjustWords", decomposition=list(source), clip=["loader", 1], adjustments=adjustments)


def saving(source, name=""):
    return node("ConceptKitSaveDecomposition", decomposition=[source, 0], name=name)


def test_twenty_seeds_decompose_once(comfy, bird):
    """Queued together, each a picture of its own."""
    before = kept(comfy)
    prompts = []
    for seed in range(20):
        graph = drawing(comfy, steps=1, picture=("node", 1)) | {"node": decompose()}
        graph["picture latent"]["inputs"]["seed"] = seed
        prompts.append(comfy.queue(graph))
    histories = [comfy.wait(prompt) for prompt in prompts]
    assert all(history["status"]["status_str"] == "success" for history in histories)
    assert len({pixels(comfy, history["outputs"]["picture"]).tobytes() for history in histories}) == 20
    assert kept(comfy) == before
    cached = [data["nodes"] for history in histories for kind, data in history["status"]["messages"] if kind == "execution_cached"]
    assert sum("node" in nodes for nodes in cached) >= 19


def test_adjusting_by_one_saving_and_exporting_change_nothing(comfy, bird):
    """To the pixel: the loaded file, factors of 1, and the embedding in a stock prompt, against the node's own conditioning."""
    text, _ = bird
    nodes = loading(bird) | {
        "node": decompose(),
        "again": node("ConceptKitDecompositionToConditioning", decomposition=["load", 0], clip=["loader", 1], template=""),
        "ones": adjusted(bird, f"{first_word(text)}: 1"),
        "save": node("ConceptKitSaveEmbedding", decomposition=["load", 0], name="bird-words", overwrite=False),
        "prompt": node("CLIPTextEncode", clip=["loader", 1], text=["save", 0]),
        "none": adjusted(bird, f"{first_word(text)}: 0"),
    }
    positives = {"concept": ("node", 1), "loaded": ("again", 0), "same": ("ones", 1), "embedding": ("prompt", 0), "without": ("none", 1)}
    outputs = comfy.run(drawing(comfy, **positives) | nodes)
    drawn = {name: pixels(comfy, outputs[name]) for name in positives}
    assert drawn["concept"].std() > 0
    for name in ("loaded", "same"):
        assert (drawn[name] == drawn["concept"]).all(), name
    assert abs(drawn["embedding"] - drawn["concept"]).max() <= 1
    assert abs(drawn["without"] - drawn["concept"]).max() > 8
    assert outputs["save"]["text"] == ["embedding:bird-words"]
    assert (comfy.base / "models" / "embeddings" / "bird-words.safetensors").is_file()


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("A photo of a {}.", "beside"),
        ("{}'s face", "birds/beside"),
        ('"{}"', "Gefieder\\vögel"),
        ("a {}-shaped thing", "v1.5-%date:yy%"),
    ],
)
def test_the_embedding_is_read_whatever_stands_beside_it(comfy, bird, template, name):
    nodes = {
        "node": decompose(template=template),
        "save": node("ConceptKitSaveEmbedding", decomposition=["node", 0], name=name, overwrite=True),
        "prompt": node("CLIPTextEncode", clip=["loader", 1], text=["save", 0]),
        "none": node("CLIPTextEncode", clip=["loader", 1], text=template.replace("{}", "")),
    }
    positives = {"concept": ("node", 1), "embedding": ("prompt", 0), "without": ("none", 0)}
    outputs = comfy.run(drawing(comfy, **positives) | nodes)
    drawn = {name: pixels(comfy, outputs[name]) for name in positives}
    assert abs(drawn["embedding"] - drawn["concept"]).max() <= 1
    assert abs(drawn["without"] - drawn["concept"]).max() > 8


def test_an_embedding_of_that_name_is_not_replaced_silently(comfy, bird):
    text, _ = bird
    graph = comfy.loaders() | loading(bird) | {"adjust": adjusted(bird, f"{first_word(text)}: 0")}
    for overwrite, source in ((False, "load"), (True, "load")):
        comfy.run(graph | {"save": node("ConceptKitSaveEmbedding", decomposition=[source, 0], name="taken", overwrite=overwrite)})
    again = node("ConceptKitSaveEmbedding", decomposition=["adjust", 0], name="taken", overwrite=False)
    assert "exists with other content" in comfy.fail(graph | {"save": again})
    comfy.run(graph | {"save": again | {"inputs": again["inputs"] | {"overwrite": True}}})


def test_words_are_added_and_replaced_by_lines_of_text(comfy, bird):
    text, _ = bird
    word = first_word(text)
    outputs = comfy.run(
        shown(comfy, ("adjust", 3), **loading(bird), adjust=adjusted(bird, f"{word} -> flame # hot\n\n+crow: 25%"), save=saving("adjust"))
    )
    found = outputs["show"]["text"][0]
    assert "flame" in found and "25% crow" in found and f"{word}:" not in found
    name = outputs["save"]["text"][0].splitlines()[0]
    assert (comfy.base / "models" / "conceptkit" / "decompositions" / name).is_file()
    assert comfy.run(shown(comfy, ("load", 2), load=node("ConceptKitLoadDecomposition", file=name)))["show"]["text"][0].startswith(
        f"{found}\nmade with"
    )


@pytest.mark.parametrize(
    ("adjustments", "message"),
    [
        ("\nbird 2", "line 2, 'bird 2': write `word: factor`"),
        ("bird: many", "line 1, 'bird: many': 'many' is not a number"),
        ("bird: -1", "write 0 to remove one"),
        ("+crow: 120%", "a share lies between 0 and 1"),
        ("bird: nan", "'nan' is not a number that can be used"),
        ("+crow: 60%, +star: 40%", "line 1, '+star: 40%': the added words take 100% of the whole"),
    ],
)
def test_lines_that_cannot_be_read_are_refused_before_anything_runs(comfy, bird, adjustments, message):
    with pytest.raises(AssertionError, match="custom_validation_failed") as refusal:
        comfy.queue(shown(comfy, ("adjust", 3), **loading(bird), adjust=adjusted(bird, adjustments)))
    assert message in json.loads(str(refusal.value))["node_errors"]["adjust"]["errors"][0]["details"]


@pytest.mark.parametrize(
    ("adjustments", "message"),
    [
        ("flame: 1\nzebra: 2", "line 1, 'flame: 1': 'flame' is none of the words"),
        ("+qqqqqq: 0.5", "line 1, '+qqqqqq: 0.5': 'qqqqqq' is not a single token"),
    ],
)
def test_words_that_are_not_there_are_named_with_their_line(comfy, bird, adjustments, message):
    assert message in comfy.fail(shown(comfy, ("adjust", 3), **loading(bird), adjust=adjusted(bird, adjustments)))


def test_a_missing_file_is_named_with_the_folder_it_belongs_to(comfy):
    with pytest.raises(AssertionError) as refusal:
        comfy.queue(shown(comfy, ("load", 2), load=node("ConceptKitLoadDecomposition", file="gone.safetensors")))
    assert "gone.safetensors is missing: put it into" in str(refusal.value)
    assert str(Path("models", "conceptkit", "decompositions")) in str(refusal.value)


@pytest.mark.parametrize("file", ["../../../shapes.safetensors", "/etc/passwd"])
def test_a_path_is_no_file_name(comfy, file):
    with pytest.raises(AssertionError, match="custom_validation_failed"):
        comfy.queue(shown(comfy, ("load", 2), load=node("ConceptKitLoadDecomposition", file=file)))


def test_a_damaged_file_is_refused_by_load_and_computed_again_by_decompose(comfy, bird):
    text, path = bird
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[: len(whole) // 2])
        assert "damaged" in comfy.fail(shown(comfy, ("load", 2), **loading(bird)))
        assert comfy.run(shown(comfy, ("node", 3), node=decompose(exclude="\n")))["show"]["text"][0] == text
        assert path.read_bytes() == whole
    finally:
        path.write_bytes(whole)


def test_word_pictures_show_what_a_ksampler_draws(comfy, bird):
    text, _ = bird
    words = 1 + text.splitlines()[0].count("+")
    given = {"pictures": 2, "seed": 5, "steps": 3, "cfg": 3.0, "size": 0}
    wires = {"model": ["loader", 0], "clip": ["loader", 1], "vae": ["loader", 2], "decomposition": ["load", 0]}
    nodes = loading(bird) | {
        "words": node("ConceptKitWordPictures", **wires, **given),
        "sheet": node("PreviewImage", images=["words", 0]),
        "each": node("PreviewImage", images=["words", 1]),
        "plain": node("CLIPTextEncode", clip=["loader", 1], text="a photo of a bird"),
        "mixed": node("ConceptKitDecompositionToConditioning", decomposition=["load", 0], clip=["loader", 1], template=""),
    }
    before = comfy.probe("state")
    outputs = comfy.run(drawing(comfy, concept=("plain", 0), mixture=("mixed", 0)) | nodes)
    assert comfy.probe("state") == before
    assert len(outputs["each"]["images"]) == 2 * (2 + words)
    assert abs(pixels(comfy, outputs["each"]) - pixels(comfy, outputs["concept"])).max() <= 2
    assert abs(pixels(comfy, outputs["each"], 2) - pixels(comfy, outputs["mixture"])).max() <= 2
    height, width, _ = pixels(comfy, outputs["sheet"]).shape
    assert width > 128 * (2 + words) and height > 2 * 128


def test_the_node_shows_what_the_model_draws(comfy):
    assert comfy.probe("previews") == [[step, 3, [16, 16], "7"] for step in (1, 2, 3)]


def test_many_steps_are_few_short_messages(comfy):
    """Ten a second at most, whatever the number of steps; each says how long the rest takes, and no line is broken by the browser."""
    *sent, end, long = comfy.probe("messages", wires={"vae": None}, steps=20000, seconds=60.0, label="a bird of prey in a tree")
    assert 60 < len(sent) <= 600
    assert not any("left" in text for text in sent[:2])
    assert re.fullmatch(r"a bird of prey in a tree  \n\d+/20000, (29|30|31) s left  \nr2 0.812", sent[len(sent) // 2])
    assert end == "a bird of prey in a tree  20000/20000  \nr2 0.812"
    # Nodes 2.0 reads the text as Markdown, where "+ finch" would begin a list.
    lines = ["bird = 28% tiny + 25% constructionally", "+\N{NO-BREAK SPACE}17% finch + 13% raven + 12%"]
    lines += ["impressionistic + 28% tiny + 25% …", "bird-tiny-construction-finch-856bc0f39f.safetensors"]
    assert long.split("  \n") == lines
    assert max(len(line.rstrip()) for text in [*sent, end] for line in text.splitlines()) <= 40


def test_a_list_of_concepts_gives_lists(comfy):
    graph = comfy.loaders() | {
        "a": node("PrimitiveString", value="bird"),
        "b": node("PrimitiveString", value="star"),
        "list": node("CreateList", **{"inputs.input0": ["a", 0], "inputs.input1": ["b", 0]}),
        "node": decompose(concept=["list", 0]),
        "text": node("PreviewAny", source=["node", 3]),
        "chart": node("PreviewImage", images=["node", 2]),
    }
    outputs = comfy.run(graph)
    assert [text.split(" =")[0] for text in outputs["text"]["text"]] == ["bird", "star"]
    assert len(outputs["chart"]["images"]) == 2


def test_several_concepts_in_one_text_give_lists(comfy):
    """Each as it is alone, to the pixel, and every node after it runs once for each; a list of texts adds up."""
    graph = drawing(comfy, steps=1, picture=("node", 1), bird=("only bird", 1), phrase=("only phrase", 1)) | {
        "a": node("PrimitiveString", value="bird, Bird"),
        "b": node("PrimitiveString", value='# none\n"bird, star"\n'),
        "list": node("CreateList", **{"inputs.input0": ["a", 0], "inputs.input1": ["b", 0]}),
        "both": decompose(concept=["list", 0]),
        "node": decompose(concept='bird\n\n"bird, star" # a phrase\nBIRD; bird'),
        "only bird": decompose(concept="bird"),
        "only phrase": decompose(concept='"bird, star"'),
        "text": node("PreviewAny", source=["node", 3]),
        "other text": node("PreviewAny", source=["both", 3]),
        "chart": node("PreviewImage", images=["node", 2]),
        "adjust": adjusted(None, "+flame: 20%, +crow: 20%", ("node", 0)),
        "adjusted": node("PreviewAny", source=["adjust", 3]),
        "save": node("ConceptKitSaveDecomposition", decomposition=["node", 0], name="several"),
        "file": node("PreviewAny", source=["save", 0]),
    }
    outputs = comfy.run(graph)
    assert [text.split(" =")[0] for text in outputs["text"]["text"]] == ["bird", "bird, star"]
    assert outputs["other text"] == outputs["text"]
    assert len(outputs["chart"]["images"]) == 2 and len(set(outputs["file"]["text"])) == 2
    for text in outputs["adjusted"]["text"]:
        assert "20% flame" in text and "20% crow" in text
    assert len(outputs["picture"]["images"]) == 2
    for index, alone in enumerate(("bird", "phrase")):
        assert (pixels(comfy, outputs["picture"], index) == pixels(comfy, outputs[alone])).all()


def test_conceptor_has_a_node_of_its_own_that_asks_the_same(comfy):
    """Its settings are hidden on the other node, where older workflows store them, and read there still."""
    spec = comfy.get("/object_info/ConceptKitDecompose")["ConceptKitDecompose"]["input"]["optional"]["select"][1]
    assert spec["hidden"]
    own = {key: value for key, value in decompose()["inputs"].items() if key not in ("model", "clip", "method")}
    for inputs, message in ((own, "VAE"), (own | {"vae": ["loader", 2]}, "scorer")):
        assert message in comfy.fail(
            shown(comfy, ("node", 3), node=node("ConceptKitConceptor", model=["loader", 0], clip=["loader", 1], **inputs))
        )


def test_what_identifies_a_model(comfy):
    """The same model has one identity, whatever was loaded in between; another wiring has another, and code has none."""
    vae = {"vae": None}
    first = comfy.probe("identity", wires=vae)["identity"]
    found = {"plain": first}
    model, clip = ["loader", 0], ["loader", 1]
    half = node("ModelMergeSimple", model1=["v", 0], model2=["loader", 0], ratio=0.5)
    wirings = {
        "skip": ({"skip": node("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=-2)}, model, ["skip", 0]),
        "v": ({"v": node("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=False)}, ["v", 0], clip),
        "zsnr": ({"v": node("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=True)}, ["v", 0], clip),
        "merge": ({"v": node("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=False), "m": half}, ["m", 0], clip),
    }
    for name, (graph, wired, text) in wirings.items():
        found[name] = comfy.probe("identity", wires=vae | {"model": wired, "clip": text}, graph=graph)["identity"]
        assert comfy.probe("identity", wires=vae)["identity"] == first, f"after {name}"
    assert None not in found.values()
    assert len(set(found.values())) == len(found)
    free = {"free": node("FreeU_V2", model=model, b1=1.3, b2=1.4, s1=0.9, s2=0.2)}
    assert comfy.probe("identity", wires=vae | {"model": ["free", 0]}, graph=free)["identity"] is None


def test_another_model_or_setting_is_another_question(comfy):
    """Whose answer is kept, under the name of its content: what is asked again is found, and equal answers are one file."""

    def asked(**inputs):
        graph = {"skip": node("CLIPSetLastLayer", clip=["loader", 1], stop_at_clip_layer=-2), "node": decompose(**inputs)}
        before = set(cache.glob("found-*"))
        comfy.run(shown(comfy, ("node", 3), **graph))
        return len(set(cache.glob("found-*")) - before)

    cache = comfy.base / "models" / "conceptkit" / "cache"
    moon = {"concept": "moon"}
    assert asked(**moon) == 1
    for change in ({"words": 2}, {"exclude": "star, ring"}, {"template": "a {}"}, {"clip": ("skip", 0)}):
        before = kept(comfy)
        assert asked(**moon | change) == 1 and len(kept(comfy)) == len(before) + 1, change
    before = kept(comfy)
    assert asked(**moon, exclude_unsafe=False) == 1  # there is nothing unsafe among the demo's words
    assert asked(**moon, exclude=" \n,") == 0
    assert asked(**moon, seed=9, reuse=False) == 0
    assert kept(comfy) == before


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"concept": "?!"}, "is known to the text encoder: check the spelling"),
        ({"concept": "a bird of prey in a tree " * 12}, "tokens, the text encoder reads 75: shorten it"),
        ({"method": "conceptor"}, "connect a VAE and a scorer, or use Decompose with Conceptor"),
        ({"method": "conceptor", "vae": ["loader", 2]}, "connect a VAE and a scorer"),
        ({"exclude": ",".join(shapes_world().words)}, "no candidate words are left"),
    ],
)
def test_what_cannot_be_done_says_what_to_do_and_the_queue_goes_on(comfy, inputs, message):
    before = comfy.probe("state"), kept(comfy, "*")
    assert message in comfy.fail(shown(comfy, ("node", 3), node=decompose(**inputs)))
    assert (comfy.probe("state"), kept(comfy, "*")) == before


def test_another_models_words_are_refused(comfy, bird):
    """Whatever is done with them."""
    assert "the decomposition was made with another text encoder (l of width 96) than this CLIP (l of width 64)" in comfy.fail(
        comfy.probing("other_clip", wires={"decomposition": ["load", 0]}, graph=loading(bird))
    )


def test_an_interrupted_run_leaves_no_half_result_and_goes_on_where_it_stopped(comfy):
    state, before = comfy.probe("state"), kept(comfy, "*")
    graph = shown(comfy, ("node", 3), node=decompose(concept="fish", method="distilled"))
    prompt_id = comfy.queue(graph)
    for _ in range(1200):
        if unfinished(comfy, "fish-*"):
            break
        time.sleep(0.05)
    comfy.post("/interrupt", {})
    history = comfy.wait(prompt_id)
    assert any(kind == "execution_interrupted" for kind, _ in history["status"]["messages"]), history["status"]
    assert kept(comfy, "*") == before
    (checkpoint,) = unfinished(comfy, "fish-*")
    assert comfy.probe("state") == state
    damaged = checkpoint.read_bytes()[:-8]
    resumed = comfy.run(graph)["show"]["text"][0]
    (path,) = set(kept(comfy, "*")) - set(before)
    whole = path.read_bytes()
    path.unlink()
    checkpoint.write_bytes(damaged)  # in a graph there is no other file to choose
    graph["node"]["inputs"] |= UNCACHED
    assert comfy.run(graph)["show"]["text"][0] == resumed
    assert path.read_bytes() == whole and not checkpoint.exists()
    assert comfy.probe("state") == state
