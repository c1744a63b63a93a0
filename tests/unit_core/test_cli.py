"""The command line: files written, one sentence and exit code 1 for failures, 2 for usage, nothing heavy before it is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conceptkit.core import cli, decompose
from conceptkit.core.bench import frame, verify
from conceptkit.core.decompose import Decomposition
from conceptkit.core.demo.world import shapes_world
from PIL import Image

Run = Callable[..., int]


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


@pytest.fixture
def little(thrifty: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Decompositions that spend next to nothing."""
    whole = decompose.decompose_concept

    def less(*given: object, **options: object) -> Decomposition:
        return whole(*given, **options | {"settings": thrifty, "words": 2, "limit": 8})

    monkeypatch.setattr(decompose, "decompose_concept", less)
    monkeypatch.setattr(verify, "decompose_concept", less)
    monkeypatch.setattr(verify, "POOL", 8)


@pytest.mark.usefixtures("little")
def test_decompose(run: Run, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--model", checkpoint, "--size", 64, "--steps", 2, "--seeds", 1)
    out, pool = tmp_path / "out", tmp_path / "pool.txt"
    pool.write_text("red\ngreen, raven, robin # birds\nfinch\n", "utf-8")
    assert run("decompose", "bird", *common, "--words", 2, "--candidates", pool, "--out", out) == 0
    files = {"chart.png", "decomposition.json", "decomposition.safetensors", "bird-words.safetensors", "pictures.png", "words.png"}
    assert {path.name for path in out.iterdir()} == files
    numbers = json.loads((out / "decomposition.json").read_text("utf-8"))
    assert {word["word"] for word in numbers["words"]} <= {"red", "green", "raven", "robin", "finch"}
    assert numbers["concept"] == "bird" and 1 <= len(numbers["words"]) <= 2
    assert sum(word["share"] for word in numbers["words"]) == pytest.approx(1)
    assert numbers["evals"] > numbers["calls"] > 0
    loaded = Decomposition.load(out / "decomposition.safetensors")
    assert [word["word"] for word in numbers["words"]] == list(loaded.words)
    assert f"{numbers['words'][0]['word']}: share" in capsys.readouterr().out
    assert run("decompose", "bird", *common, "--template", "a photo", "--out", tmp_path) == 1
    assert "must contain {} once" in capsys.readouterr().err
    pool.write_text("red, zzqqzz", "utf-8")
    assert run("decompose", "bird", *common, "--candidates", pool, "--out", tmp_path) == 1
    assert "zzqqzz" in capsys.readouterr().err
    pool.write_text("red green", "utf-8")
    assert run("decompose", "bird", *common, "--exclude", pool, "--out", tmp_path) == 1
    assert "separate its words by commas or lines" in capsys.readouterr().err
    assert run("decompose", " ,", *common, "--out", tmp_path) == 1
    assert "the concept is empty: give a word or a phrase" in capsys.readouterr().err


def test_several_concepts_get_a_folder_each(run: Run, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--model", checkpoint, "--size", 64, "--steps", 2, "--seeds", 1, "--method", "text", "--budget", "fast", "--words", 1)
    assert run("decompose", "bird, red circle", "Bird", *common, "--out", tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"bird", "red-circle"}
    assert Decomposition.load(tmp_path / "red-circle" / "decomposition.safetensors").concept == "red circle"
    assert (tmp_path / "bird" / "bird-words.safetensors").is_file()
    for wrong, message in ((("bird, joy", "--checkpoint", tmp_path / "c"), "one concept"), (("a b, a-b",), "two results would be written")):
        assert run("decompose", *wrong, *common, "--out", tmp_path / "new") == 1
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("little")
def test_nothing_is_replaced_unless_asked_for(run: Run, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is computed: what lies there stays as it is."""
    few = ("--model", checkpoint, "--size", 64, "--steps", 1, "--seeds", 1)
    commands = {
        "sheet.png": ("sample", "a bird", *few),
        "decomposition.json": ("decompose", "bird", *few),
        "verify.md": ("verify", *few, "--draws", 0, "--concept", "bird"),
    }
    for name, command in commands.items():
        out = tmp_path / command[0]
        out.mkdir()
        (out / name).write_text("mine", "utf-8")
        assert run(*command, "--out", out) == 1
        assert f"{name} exists: write to another place, or add --overwrite" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text("utf-8") == "mine"
        assert run(*command, "--out", out, "--overwrite") == 0
        assert (out / name).read_bytes() != b"mine"


@pytest.mark.usefixtures("little")
def test_verify_writes_a_page(run: Run, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--model", checkpoint, "--size", 64, "--steps", 2, "--seeds", 1)
    assert run("verify", *common, "--draws", 2, "--concept", "bird", "--out", tmp_path / "new") == 0
    page = (tmp_path / "new" / "verify.md").read_text("utf-8")
    assert "| recall of the planted words |" in page and "## bird" in page and "(verify.png)" in page
    assert page.count("of memory") + page.count(" minutes.") >= 1
    assert (tmp_path / "new" / "verify.png").is_file() and page in capsys.readouterr().out


def test_bench(run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        frame, "run", lambda suite, parts, **asked: {"rows": [], "bars": [], "asked": [suite.name, asked["processes"], *asked["shard"]]}
    )
    path = tmp_path / "new" / "rows.json"
    assert run("bench", "decompose", "--json", path, "--model", checkpoint, "--processes", 0, "--shard", "2/3") == 0
    assert json.loads(path.read_text("utf-8"))["asked"] == ["decompose", 0, 1, 3]
    assert run("bench", "decompose", "--json", path, "--shard", "3/2") == 1
    assert "write 2/4 for the second of four" in capsys.readouterr().err
    assert run("bench", "decompose", "--json", path, "--methods", "distilled,magic") == 1
    assert "there is no method magic" in capsys.readouterr().err


def test_world(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("world", "--per-word", 1, "--out", tmp_path) == 0
    assert json.loads((tmp_path / "world.json").read_text("utf-8")) == shapes_world().describe()
    assert Image.open(tmp_path / "world.png").height > 1000
    lines = capsys.readouterr().out.splitlines()
    shares = {spec["kind"]: share for share, spec in shapes_world().words["bird"].make_up}
    bird = ", ".join(f"{share:.0%} {kind}" for kind, share in sorted(shares.items(), key=lambda item: -item[1]))
    assert {f"bird (category): {bird}", "crane (double): finch + truck", "robin (exemplar)"} <= set(lines)


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


def test_every_family_of_commands_is_listed() -> None:
    modules = {path.stem for path in Path(cli.__file__).parent.glob("*.py")}
    assert modules == {"__init__", "__main__", "frame", *cli.FAMILIES}


def test_the_module_runs_as_the_script_does() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "conceptkit.core.cli", "bench", "edit", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "Measure edits where the answer is known" in done.stdout


def test_starts_without_anything_heavy() -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'matplotlib', 'scipy'}"
    code = f"import sys; from conceptkit.core import cli; print(sorted({heavy} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
