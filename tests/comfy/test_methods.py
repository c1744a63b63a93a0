"""Every method runs inside ComfyUI and finds there what it finds through diffusers; none touches or reads global random states."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers", reason="the other host needs diffusers in the environment that runs the tests")

from conceptkit.core.decompose import METHODS as DECOMPOSE
from conceptkit.core.decompose import Decomposition, decompose_concept
from conceptkit.core.edit import METHODS as EDIT
from conceptkit.core.edit import Concept, ContextEdit, solve_edit
from conceptkit.core.hosts.diffusers import load_model

TOLERANCE = 1e-3
"""Of shares, and relative for edits: what design.md promises of the two hosts."""

SHORT = {"pictures": 4, "references": 2, "sampler_steps": 4, "steps": 6, "batch": 2, "every": 3, "heldout": 1, "measured_steps": 4}
"""The published training cut short: its first steps alone."""


@pytest.fixture(scope="module")
def headless(comfy):
    return load_model(comfy.weights)


@pytest.mark.parametrize("method", DECOMPOSE)
def test_same_decomposition(comfy, headless, method):
    given = {"concept": "bird", "method": method, "words": 3, "seed": 3, "height": 128, "width": 128, "budget": "fast"}
    given |= {"settings": SHORT, "select": "r2"} if method == "conceptor" else {}
    path = comfy.base / f"{method}.safetensors"
    comfy.probe("verb", path=str(path), kind="decompose", given=given)
    theirs, mine = Decomposition.load(path), decompose_concept(headless, **given)
    assert theirs.words == mine.words
    assert theirs.shares == pytest.approx(mine.shares, abs=TOLERANCE)
    assert theirs.r2 == pytest.approx(mine.r2, abs=TOLERANCE, nan_ok=True)


@pytest.mark.parametrize("method", EDIT)
def test_same_edit(comfy, headless, method):
    shares = [["square", 0.5], ["star", 0.5]] if EDIT[method].balances else []
    path = comfy.base / f"{method}.safetensors"
    given = {"keep": "ring, moon", "method": method, "seed": 3}
    comfy.probe("verb", kind="edit", path=str(path), wires={"vae": None}, given=given | {"concepts": [["circle", shares]]})
    theirs, mine = ContextEdit.load(path), solve_edit(headless, [Concept("circle", attributes=tuple(map(tuple, shares)))], **given)

    def change(edit):
        return edit.context.u @ edit.context.v.T

    assert change(mine).norm() > 0
    assert (change(theirs) - change(mine)).norm() < TOLERANCE * change(mine).norm()
    assert (theirs.gains or {}).keys() == (mine.gains or {}).keys()


@pytest.fixture(scope="module")
def words(comfy):
    """A decomposition's file."""
    folder = comfy.base / "models" / "conceptkit" / "decompositions"
    folder.mkdir(parents=True, exist_ok=True)
    given = {"concept": "bird", "method": "text", "words": 2, "height": 64, "width": 64}
    comfy.probe("verb", kind="decompose", path=str(folder / "words.safetensors"), given=given)
    return {"load": {"class_type": "ConceptKitLoadDecomposition", "inputs": {"file": "words.safetensors"}}}


@pytest.mark.parametrize(
    "what", ["decompose text", "decompose distilled", "erase conceptkit", "erase rece", "erase speed", "erase mist", "adjust", "pictures"]
)
def test_global_random_states_are_neither_read_nor_written(comfy, words, what):
    """Of random, NumPy and torch: the result is the same whatever they are, and they are afterwards what they were."""
    (first, same), (second, again) = comfy.probe("random_state", wires={"decomposition": ["load", 0]}, graph=words, what=what)
    assert first == second
    assert same and again
