"""``conceptkit erase`` and ``conceptkit report``: files that load, figures that fit, a sentence for what cannot be; the report's chart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conceptkit.core import chart
from conceptkit.core.cli import app
from conceptkit.core.edit import ContextEdit, solve_edit
from conceptkit.core.edit.picture import report_picture
from conceptkit.core.hosts.diffusers import load_model
from safetensors.torch import load_file
from typer.testing import CliRunner


def test_erase_writes_a_lora_and_report_reads_the_edit(tmp_path: Path) -> None:
    lora, edit = tmp_path / "lora.safetensors", tmp_path / "edit.safetensors"
    asked = ["erase", "circle -> square", "red", "--keep", "ring, moon", "--method", "uce-2025", "--out", str(lora), "--edit", str(edit)]
    said = CliRunner().invoke(app, asked)
    assert said.exit_code == 0, said.output
    assert "circle -> square, red: method uce-2025" in said.output
    tensors = load_file(lora)
    assert len(tensors) % 3 == 0 and all(name.startswith("lora_unet_") and "attn2_to_" in name for name in tensors)
    assert ContextEdit.load(edit).keep == ("ring", "moon")
    said = CliRunner().invoke(app, ["report", str(edit), "--out", str(tmp_path / "report")])
    assert said.exit_code == 0, said.output
    figures = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [concept["text"] for concept in figures["concepts"]] == ["circle", "red"]
    assert (tmp_path / "report" / "report.png").is_file()
    for command in (asked, ["report", str(edit), "--out", str(tmp_path / "report")]):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
        said = CliRunner().invoke(app, command)
        assert "exists: write to another place, or add --overwrite to replace it" in str(said.exception)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    said = CliRunner().invoke(app, ["erase", "red", "--method", "uce-2025", "--out", str(lora), "--overwrite"])
    assert said.exit_code == 0 and load_file(lora).keys() == tensors.keys()
    assert any(not torch.equal(row, tensors[name]) for name, row in load_file(lora).items())


def test_one_argument_may_list_several(tmp_path: Path) -> None:
    """What the issue of a comma was: "circle, square" used to be one phrase that erases nothing."""
    edit = tmp_path / "edit.safetensors"
    asked = ["erase", "circle -> ring, square", "--keep", "Moon; moon, star # far", "--method", "uce-2025", "--edit", str(edit)]
    said = CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "lora.safetensors")])
    assert said.exit_code == 0, said.output
    found = ContextEdit.load(edit)
    assert list(map(str, found.concepts)) == ["circle -> ring", "square"] and found.keep == ("Moon", "star")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["circle", "--keep", "circle"], "to be erased and kept"),
        (["circle", "--method", "nothing"], "choose one of conceptkit"),
        ([""], "the edit changes nothing"),
    ],
)
def test_what_cannot_be_erased_is_said(tmp_path: Path, asked: list[str], message: str) -> None:
    said = CliRunner().invoke(app, ["erase", *asked, "--out", str(tmp_path / "lora.safetensors")])
    assert said.exit_code != 0 and isinstance(said.exception, ValueError) and message in str(said.exception)
    assert not list(tmp_path.iterdir())


def test_the_chart_draws_what_is_left() -> None:
    small = chart.edit_report([("circle", 0.0, 0.5)], [("keys", [0.0, 0.0])], [], [("disk", 0.1)], title="circle")
    large = chart.edit_report([("circle", 0.0, 0.5)], [("keys", [1.0, 1.0])], [("ring", 0.2)], [("disk", 0.1)], title="circle")
    assert small.shape[1] == large.shape[1] == 1200
    accent = [int(chart.ACCENT[i : i + 2], 16) for i in (1, 3, 5)]
    assert (large == accent).all(-1).sum() > (small == accent).all(-1).sum() + 10_000
    for wrong in ([("keys", [])], [("keys", [float("nan")])]):
        with pytest.raises(ValueError, match="finite"):
            chart.edit_report([], wrong, [], [], title="x")
    with pytest.raises(ValueError, match="negative"):
        chart.edit_report([], [], [("ring", -0.1)], [], title="x")


def test_any_edit_has_a_picture() -> None:
    model = load_model("demo")
    edit = solve_edit(model, ["circle"], method="uce-2025", keep=["ring"])
    for without_report in (edit.scale(0.5), ContextEdit.identity("sd1", edit.width)):
        assert report_picture(edit).shape[0] > report_picture(without_report).shape[0]
