"""Charts: the right size, the same bytes every time, and no text outside the sheet or on another text."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conceptkit.core import chart
from PIL import Image

LABELS = ["seed 0", "anotherwordthatisfartoolong", "a red circle and a blue star on green"]
LONG = "pneumonoultramicroscopicsilicovolcanoconiosis"
CASES = {
    "one word": lambda: chart.share_bars(["robin"], [1.0], [0.9], title="bird", subtitle="R² = 0.93"),
    "thirty words": lambda: chart.share_bars([f"word{i}" for i in range(30)], [1 / 30] * 30, [0.01] * 30, title="many"),
    "fillers": lambda: chart.share_bars(["robin", "tiny", LONG], [0.4, 0.5, 0.1], [0.6, 0.01, 0.0], ["tiny", LONG], title="bird"),
    "only fillers but one": lambda: chart.share_bars(["a", "b"], [0.5, 0.5], [0.0, 0.0], ["b"], title="bird"),
    "long texts": lambda: chart.share_bars([LONG, "a"], [0.0, 1.0], [0.5, 0.5], title=LONG * 3, subtitle="with a long subtitle " * 20),
    "no importances": lambda: chart.share_bars(["a", LONG], [0.123, 0.877], title="bird"),
    "nothing": lambda: chart.share_bars(["a", "b"], [0.0, 0.0], [0.0, 0.0], title=""),
    "mathtext": lambda: chart.share_bars(["$x^{", "$$", "a_b \\frac"], [0.5, 0.3, 0.2], title="$\\bad{$"),
    "grid": lambda: chart.picture_grid(squares(2, 3), ["bird", LONG], LABELS, title="bird"),
    "bare grid": lambda: chart.picture_grid(squares(2, 3)),
    "many pictures": lambda: chart.picture_grid(squares(3, 7, 128), ["seed 7"] * 3, ["mixture", "robin 25%", *["a b"] * 5], title="bird"),
    "an edit": lambda: chart.edit_report(
        [("circle", 0.1, 0.8), (LONG, 1.0, 1.0)],
        [("keys", [0.1] * 9), ("values", [0.2] * 9)],
        [("ring", 0.02)],
        [(word, 0.2) for word in [LONG, *"abcdefghijk"]],
        title="circle -> square, red -> green, robin -> car",
        subtitle="with a long subtitle " * 20,
    ),
    "one small picture": lambda: chart.picture_grid(squares(1, 1, 16), ["row " * 40], ["column " * 40], title=LONG, subtitle=LONG),
}


def squares(rows: int, columns: int, size: int = 64) -> list[list[np.ndarray]]:
    return [[np.full((size, size, 3), (row + column) / 5) for column in range(columns)] for row in range(rows)]


@pytest.mark.parametrize("draw", CASES.values(), ids=CASES)
def test_texts_stay_on_the_sheet_and_apart(draw, monkeypatch):
    sheets = []
    render = chart._Sheet.render
    monkeypatch.setattr(chart._Sheet, "render", lambda self, height: (sheets.append(self), render(self, height))[1])
    picture = draw()
    (sheet,) = sheets
    boxes = [text.get_window_extent(sheet.canvas.get_renderer()) for text in sheet.axes.texts if text.get_text()]
    assert all(box.x0 >= 8 and box.y0 >= 8 and box.x1 <= picture.shape[1] - 8 and box.y1 <= picture.shape[0] - 8 for box in boxes)
    assert not [(a, b) for a, b in combinations(boxes, 2) if a.overlaps(b)]


@pytest.mark.parametrize("name", [name for name in CASES if "grid" not in name and "small" not in name])
def test_texts_are_read_on_a_node_400_pixels_wide(name, monkeypatch):
    sheets = []
    render = chart._Sheet.render
    monkeypatch.setattr(chart._Sheet, "render", lambda self, height: (sheets.append(self), render(self, height))[1])
    width = CASES[name]().shape[1]
    sizes = [text.get_fontsize() for text in sheets[0].axes.texts]
    assert min(sizes) * 400 / width >= 9


@pytest.mark.parametrize("draw", CASES.values(), ids=CASES)
def test_equal_input_gives_equal_bytes(draw):
    picture = draw()
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    assert np.array_equal(picture, draw())


def test_bars_are_as_long_as_the_shares():
    picture = chart.share_bars(["a", "b", "c"], [0.6, 0.3, 0.1], title="")
    colour = tuple(int(chart.ACCENT[i : i + 2], 16) for i in (1, 3, 5))
    lengths = (picture == colour).all(-1).sum(1)
    rows = [run.max() for run in np.split(lengths, np.flatnonzero(np.diff(lengths > 0)) + 1) if run.max()]
    assert len(rows) == 3
    assert rows[1] / rows[0] == pytest.approx(0.5, abs=0.01)
    assert rows[2] / rows[0] == pytest.approx(1 / 6, abs=0.01)


def test_thirty_words_make_a_higher_chart():
    one, thirty = CASES["one word"](), CASES["thirty words"]()
    assert one.shape[1] == thirty.shape[1] == 1200
    assert thirty.shape[0] - one.shape[0] > 28 * 50


def test_pictures_appear_pixel_for_pixel():
    picture = np.random.default_rng(0).integers(0, 256, (100, 120, 3), dtype=np.uint8)
    sheet = chart.picture_grid([[None, picture]], ["row"], ["a", "b"], title="t")
    views = np.lib.stride_tricks.sliding_window_view(sheet[..., 0], picture.shape[:2])
    corner = np.argwhere((views[..., 0, 0] == picture[0, 0, 0]) & (views[..., -1, -1] == picture[-1, -1, 0]))
    assert [1 for y, x in corner if np.array_equal(sheet[y : y + 100, x : x + 120], picture)] == [1]


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (lambda: chart.share_bars([], [], title=""), "at least one"),
        (lambda: chart.share_bars(["a"], [0.5, 0.5], title=""), "one each"),
        (lambda: chart.share_bars(["a"], [1.0], [], title=""), "one each"),
        (lambda: chart.share_bars(["a"], [float("nan")], title=""), "finite"),
        (lambda: chart.share_bars(["a"], [-0.1], title=""), "not negative"),
        (lambda: chart.share_bars(["a"], [0.1], [float("inf")], title=""), "finite"),
        (lambda: chart.share_bars(["a"], [0.1], [-0.1], title=""), "not negative"),
        (lambda: chart.picture_grid([]), "at least one image"),
        (lambda: chart.picture_grid([[None], [None, None]]), "equal length"),
        (lambda: chart.picture_grid([[None]], ["a", "b"]), "as many labels"),
        (lambda: chart.picture_grid([[np.zeros((3, 4, 4))]]), "height, width, 3"),
        (lambda: chart.picture_grid([[np.full((4, 4, 3), np.nan)]]), "finite floats"),
        (lambda: chart.picture_grid([[np.zeros((4, 4, 3), dtype=int)]]), "uint8"),
    ],
)
def test_bad_input_is_a_sentence(draw, says):
    with pytest.raises(ValueError, match=says):
        draw()


def test_fillers_stand_below_the_others_wherever_they_come():
    apart = chart.share_bars(["robin", "finch", "tiny"], [0.3, 0.2, 0.5], fillers=["tiny"], title="bird")
    assert np.array_equal(chart.share_bars(["tiny", "robin", "finch"], [0.5, 0.3, 0.2], fillers=["tiny"], title="bird"), apart)


def test_saving(tmp_path):
    picture = CASES["one word"]()
    for name in ("a/x.png", "b/x.png"):
        chart.save(tmp_path / name, picture)
    assert (tmp_path / "a/x.png").read_bytes() == (tmp_path / "b/x.png").read_bytes()
    assert np.array_equal(np.array(Image.open(tmp_path / "a/x.png")), picture)


def test_no_global_state_and_no_early_import(root: Path):
    code = """
import sys
from conceptkit.core import chart
assert "matplotlib" not in sys.modules
import matplotlib
before = matplotlib.rcParams.copy()
chart.share_bars(["a"], [1.0], [0.5], title="t")
assert matplotlib.rcParams.copy() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(root / ".dev"), "HOME": str(Path.home())}, check=True)
