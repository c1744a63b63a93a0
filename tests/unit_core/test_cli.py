"""The command line: files written, one sentence and exit code 1 for failures, 2 for usage, nothing heavy before it is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conceptkit.core import cli, decompose
from conceptkit.core.demo.architecture import AUTOENCODER, TEXT, UNET, build_autoencoder, build_text_encoder, build_unet
from conceptkit.core.hosts.checkpoint import to_single_file
from PIL import Image
from safetensors.torch import save_file

Run = Callable[..., int]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint in the demo's layout."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = [network.state_dict() for network in (build_unet(), build_text_encoder(), build_autoencoder())]
    header = {"format": "conceptkit-demo", "version": 1, "unet": UNET, "text": TEXT, "autoencoder": AUTOENCODER}
    tensors = {key: value.half().contiguous() for key, value in to_single_file(*parts).items()}
    save_file(tensors, path, metadata={"conceptkit": json.dumps(header)})
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["conceptkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return int(exit.value.code or 0)

    return run


def test_sample(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "pictures"
    common = ("--model", checkpoint, "--steps", 2, "--size", 64)
    assert run("sample", "a red circle", *common, "--seeds", 2, "--out", out) == 0
    assert {path.name for path in out.iterdir()} == {"seed-0.png", "seed-1.png", "sheet.png"}
    assert Image.open(out / "seed-1.png").size == (64, 64)
    assert run("sample", "a red circle", *common, "--seeds", 1, "--seed", 1, "--out", tmp_path) == 0
    assert (tmp_path / "seed-1.png").read_bytes() == (out / "seed-1.png").read_bytes()


def test_decompose(run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    quick = dict(pictures=1, heldout=1, steps=2, judged=2, rows=4, pursuits=1, screened=4, probed=1, refined=2, descent=1, batch=2)
    whole = decompose.decompose_concept
    monkeypatch.setattr(
        decompose, "decompose_concept", lambda *given, **options: whole(*given, **options | {"settings": quick, "limit": 8})
    )
    common = ("--model", checkpoint, "--size", 64, "--steps", 2, "--seeds", 1)
    out, pool = tmp_path / "out", tmp_path / "pool.txt"
    pool.write_text("red\ngreen raven robin finch\n", "utf-8")
    assert run("decompose", "bird", *common, "--words", 2, "--candidates", pool, "--out", out) == 0
    assert {path.name for path in out.iterdir()} == {"chart.png", "decomposition.json", "pictures.png"}
    numbers = json.loads((out / "decomposition.json").read_text("utf-8"))
    assert {word["word"] for word in numbers["words"]} <= set(pool.read_text("utf-8").split())
    assert numbers["concept"] == "bird" and 1 <= len(numbers["words"]) <= 2
    assert sum(word["share"] for word in numbers["words"]) == pytest.approx(1)
    assert numbers["evals"] > numbers["calls"] > 0
    assert f"{numbers['words'][0]['word']}: share" in capsys.readouterr().out
    assert run("decompose", "bird", *common, "--template", "a photo", "--out", tmp_path) == 1
    assert "must contain {} once" in capsys.readouterr().err
    pool.write_text("red zzqqzz", "utf-8")
    assert run("decompose", "bird", *common, "--candidates", pool, "--out", tmp_path) == 1
    assert "zzqqzz" in capsys.readouterr().err


def test_world(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("world", "--per-word", 1, "--out", tmp_path) == 0
    assert Image.open(tmp_path / "world.png").height > 1000
    lines = capsys.readouterr().out.splitlines()
    assert {"bird (category): 50% robin, 30% finch, 20% raven", "crane (double): finch + truck", "robin (exemplar)"} <= set(lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sample", "x", "--model", "nowhere"), "there is no nowhere"),
        (("sample", "cat " * 80), "80 tokens"),
        (("sample", "x", "--size", "60"), "multiple of 64"),
        (("sample", "x", "--device", "abacus"), "abacus"),
    ],
)
def test_failures_are_one_sentence(
    run: Run, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    given = arguments if "--model" in arguments else (*arguments, "--model", checkpoint)
    assert run(*given, "--out", tmp_path / "out") == 1
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors
    assert sum(line.startswith("conceptkit: ") for line in errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [("sample",), ("sample", "x"), ("decompose", "x", "--out", "y", "--steps", "0"), ("dance",)])
def test_wrong_usage(run: Run, arguments: tuple[str, ...]) -> None:
    assert run(*arguments) == 2


def test_starts_without_anything_heavy() -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'matplotlib', 'scipy'}"
    code = f"import sys; from conceptkit.core import cli; print(sorted({heavy} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
