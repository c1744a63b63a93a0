"""By hand: random weights of a real model's size load in ComfyUI and take one gradient step. Minutes, and up to 20 GiB.

pytest -c tests/pytest.ini -s tests/comfy/large_models.py -k SD15
"""

from __future__ import annotations

import json
import sys

import pytest

CELLS = {"SD15": 64, "SDXL": 64}
"""Latent cells along one side; SDXL's own 128 do not fit beside its weights in 24 GiB."""


@pytest.mark.parametrize("kind", ["SD15", "SDXL"])
def test_one_gradient_step(comfy, kind):
    file = comfy.base / "models" / "checkpoints" / f"{kind}.safetensors"
    made = comfy.run(comfy.probing("make_checkpoint", kind=kind, path=str(file)), seconds=1800)["probe"]["text"][0]
    assert json.loads(made)["unet"] > 8e8
    extra = {"large": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": file.name}}}
    wires = {"model": ["large", 0], "clip": ["large", 1], "vae": None}
    graph = comfy.probing("large", wires=wires, graph=extra, cells=CELLS[kind])
    result = json.loads(comfy.run(graph, seconds=3600)["probe"]["text"][0])
    sys.stderr.write(f"{kind}: {result}\n")
    assert result["family"] == {"SD15": "sd1", "SDXL": "sdxl"}[kind]
    assert all(norm > 0 for norm in result["norms"].values())
    assert result["unchanged"]
