"""Every chart and contact sheet, in one look.

Drawn with matplotlib's object API on the Agg canvas, in the font that matplotlib ships: the same input gives the same bytes, and no
global state is changed. matplotlib is imported when something is drawn, not before.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.font_manager import FontProperties

Picture: TypeAlias = NDArray[np.uint8]
"""(height, width, 3)."""

PAPER, INK, SOFT, RULE = "#fbfaf7", "#14181f", "#6a7280", "#d9d5cc"
ACCENT, SECOND, EMPTY = "#3a86c8", "#e4572e", "#efece5"

_WIDTH, _MARGIN = 1200, 48
# Sizes of text that are still read when a sheet is shown 400 pixels wide, as on a node.
_TITLE, _TEXT, _SMALL = 46, 33, 30
_ROW = 60
_STRIP = 50


def share_bars(
    words: Sequence[str],
    shares: Sequence[float],
    importances: Sequence[float] | None = None,
    fillers: Sequence[str] = (),
    *,
    title: str,
    subtitle: str = "",
) -> Picture:
    """A decomposition: one bar a word, as long as its importance, and its share beside it; without importances, of its share.

    words: at least one, in the order in which they stand on the chart, but for fillers.
    shares: of the mixture, 0 or more, one a word.
    importances: 0 or more, one a word; without them the bars are the shares.
    fillers: those of the words that stand apart, pale, below the others.
    title, subtitle: above the bars.

    Returns an image 1200 pixels wide, as high as the words need. Raises ValueError for other lengths or values.
    """
    if not words:
        raise ValueError("there is no word to draw: give at least one")
    if len(shares) != len(words) or (importances is not None and len(importances) != len(words)):
        raise ValueError(f"{len(words)} words need as many shares and importances: give one each")
    if not np.isfinite([*shares, *(importances or [])]).all() or min([*shares, *(importances or [])]) < 0:
        raise ValueError("shares and importances must be finite and not negative")
    order = sorted(range(len(words)), key=lambda row: words[row] in fillers)
    words, shares = [words[row] for row in order], [shares[row] for row in order]
    importances = None if importances is None else [importances[row] for row in order]
    sheet = _Sheet()
    left = _MARGIN + min(max(sheet.measure(word, _TEXT) for word in words), 330) + 20
    right = _WIDTH - _MARGIN if importances is None else 800
    top = sheet.heading(title, subtitle) + 44
    sheet.text(left, top - 14, "share" if importances is None else "importance (\N{GREEK CAPITAL LETTER DELTA}R²)", _SMALL, SOFT)
    lengths = shares if importances is None else importances
    values = [_percent(share) for share in shares] if importances is None else [f"{importance:.3f}" for importance in importances]
    scale = (right - left - 24 - max(sheet.measure(value, _SMALL) for value in values)) / (max(lengths) or 1)
    apart = len(words) - len(fillers)
    middles = [top + _ROW * (row + 0.5) + (_ROW if fillers and row >= apart else 0) for row in range(len(words))]
    bottom = middles[-1] + _ROW / 2
    sheet.line(left, top, left, bottom, RULE)
    if fillers:
        sheet.text(left + 12, top + _ROW * (apart + 0.5), "fill in: next to nothing is lost without", _SMALL, SOFT, va="center_baseline")
    for row, (word, middle) in enumerate(zip(words, middles, strict=True)):
        ink, colour = (INK, ACCENT) if row < apart else (SOFT, RULE)
        sheet.text(left - 20, middle, word, _TEXT, ink, ha="right", va="center_baseline", room=left - 20 - _MARGIN)
        sheet.box(left, middle - 16, lengths[row] * scale, 32, colour)
        sheet.text(left + lengths[row] * scale + 12, middle, values[row], _SMALL, ink, va="center_baseline")
    if importances is not None:
        _shares(sheet, shares, middles, right + 30, top)
    return sheet.render(int(bottom) + _MARGIN)


def _shares(sheet: _Sheet, shares: Sequence[float], middles: Sequence[float], left: float, top: float) -> None:
    """Shares of the mixture as dots on stems."""
    sheet.text(left + 8, top - 14, "share of the mixture", _SMALL, SOFT)
    right = _WIDTH - _MARGIN - sheet.measure("100%", _SMALL)
    scale = (right - left - 40) / (max(shares) or 1)
    sheet.line(left + 8, top, left + 8, middles[-1] + _ROW / 2, RULE)
    for share, middle in zip(shares, middles, strict=True):
        sheet.line(left + 8, middle, left + 8 + share * scale, middle, SECOND, 4)
        sheet.dot(left + 8 + share * scale, middle, 9, SECOND)
        sheet.text(_WIDTH - _MARGIN, middle, _percent(share), _SMALL, INK, ha="right", va="center_baseline")


def picture_grid(
    pictures: Sequence[Sequence[NDArray[Any] | None]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    *,
    title: str = "",
    subtitle: str = "",
) -> Picture:
    """A contact sheet: rows of pictures with a label before each row and above each column, shown pixel for pixel.

    pictures: rows of images (height, width, 3), uint8 or float in [0, 1], smaller ones centred in their cell; None leaves a cell empty.
        Images that are all below 96 pixels are enlarged by a whole factor.
    row_labels, column_labels: one a row and one a column, or none.
    title, subtitle: above the sheet.

    Raises ValueError for an empty grid, rows of unequal length, labels that do not match, or something that is no image.
    """
    columns = len(pictures[0]) if pictures else 0
    if not columns or any(len(row) != columns for row in pictures):
        raise ValueError("a contact sheet needs rows of equal length with at least one image each")
    if (row_labels and len(row_labels) != len(pictures)) or (column_labels and len(column_labels) != columns):
        raise ValueError(f"{len(pictures)} rows of {columns} images need as many labels, or none")
    cells = [[None if picture is None else _bytes(picture) for picture in row] for row in pictures]
    sizes = [picture.shape[:2] for row in cells for picture in row if picture is not None] or [(96, 96)]
    zoom = max(1, -(-96 // max(max(size) for size in sizes)))
    height, width = (zoom * max(side) for side in zip(*sizes, strict=True))
    gap = 10
    sheet = _Sheet(max((columns * (width + gap) - gap) / (_WIDTH - 4 * _MARGIN), 0.5))
    # As large as the longest word over a column allows.
    longest = max((sheet.measure(word, _SMALL) for label in column_labels for word in label.split()), default=0)
    size = max(15 / sheet.scale, min(_SMALL, 0.97 * _SMALL * width / (longest or 1)))
    line = round(1.35 * size * sheet.scale)
    label_room = min(max((sheet.measure(label, size) for label in row_labels), default=0), 240 * sheet.scale + 120)
    left = _MARGIN + (label_room + 18 if row_labels else 0)
    # Few small pictures would leave a sheet narrower than its title: the paper keeps a least width, the pictures keep theirs.
    sheet.width = max(left + columns * (width + gap) - gap + _MARGIN, 480)
    top = sheet.heading(title, subtitle) if title or subtitle else _MARGIN
    if column_labels:
        wrapped = [sheet.wrap(label, size, width, 3) for label in column_labels]
        top += line * max(len(lines) for lines in wrapped) + 4
        for column, lines in enumerate(wrapped):
            for number, text in enumerate(reversed(lines)):
                sheet.text(left + column * (width + gap) + width / 2, top - 8 - line * number, text, size, INK, ha="center")
    for row, label in enumerate(row_labels):
        lines = sheet.wrap(label, size, label_room, max(1, height // line))
        for number, text in enumerate(lines):
            middle = top + row * (height + gap) + height / 2 + line * (number - (len(lines) - 1) / 2)
            sheet.text(left - 18, middle, text, size, INK, ha="right", va="center_baseline")
    picture = sheet.render(top + len(cells) * (height + gap) - gap + _MARGIN)
    empty = np.array([int(EMPTY[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.uint8)
    for row, line_of in enumerate(cells):
        for column, cell in enumerate(line_of):
            y, x = round(top) + row * (height + gap), round(left) + column * (width + gap)
            picture[y : y + height, x : x + width] = empty
            if cell is not None:
                enlarged = cell.repeat(zoom, 0).repeat(zoom, 1)
                y, x = y + (height - enlarged.shape[0]) // 2, x + (width - enlarged.shape[1]) // 2
                picture[y : y + enlarged.shape[0], x : x + enlarged.shape[1]] = enlarged
    return picture


def edit_report(
    concepts: Sequence[tuple[str, float, float]],
    layers: Sequence[tuple[str, Sequence[float]]],
    kept: Sequence[tuple[str, float]],
    neighbours: Sequence[tuple[str, float]],
    *,
    title: str,
    subtitle: str = "",
) -> Picture:
    """What an edit reaches and what it costs.

    concepts: each with what is left of it and what an embedding could bring back, both 1 for all and 0 (or below) for nothing.
    layers: labelled strips of what is left from layer to layer, a cell each, as dark as it is left.
    kept, neighbours: words and how far they moved, 0 or more, in the order given: the first 8 of each kind, and the rest counted.
    title, subtitle: above the chart.

    Raises ValueError for an empty strip, or values that are not finite or, of words that moved, negative.
    """
    moved = [value for _, value in (*kept, *neighbours)]
    values = [value for _, strip in layers for value in strip] + [value for _, left, back in concepts for value in (left, back)]
    if not all(len(strip) for _, strip in layers) or not np.isfinite([*values, *moved]).all() or min(moved, default=0) < 0:
        raise ValueError("an edit's figures must be finite, every strip have a layer, and no distance be negative")
    sheet = _Sheet()
    top = sheet.heading(title, subtitle)
    left = _MARGIN + max((sheet.measure(label, _TEXT) for label, _ in layers), default=0) + 20
    right = _WIDTH - _MARGIN - 14 - sheet.measure("9.9%", _SMALL)
    strips: list[tuple[float, Sequence[float]]] = []
    if layers:
        top += 44
        sheet.text(left, top - 14, "what is left, from the first layer to the last", _SMALL, SOFT)
        for label, strip in layers:
            middle = top + _STRIP / 2
            sheet.text(left - 20, middle, label, _TEXT, INK, ha="right", va="center_baseline")
            sheet.text(right + 14, middle, _percent(max(round(float(np.mean(strip)), 3), 0.0)), _SMALL, INK, va="center_baseline")
            strips.append((top, strip))
            top += _STRIP
    rows = (
        (
            ("what is left of it", [(text, max(value, 0.0)) for text, value, _ in concepts], ACCENT),
            ("what an embedding could bring back", [(text, max(value, 0.0)) for text, _, value in concepts], ACCENT),
        ),
        (("kept words: how far they moved", kept, SECOND), ("nearest words: how far they moved", neighbours, SECOND)),
    )
    for row in rows:
        columns = [column for column in row if column[1]]
        if columns:
            # One scale for a row, so that its columns compare.
            longest = max(max(value for _, words, _ in columns for _, value in words), 1e-3)
            width = (_WIDTH - 2 * _MARGIN - 40 * (len(columns) - 1)) / len(columns)
            labels = [sheet.wrap(label, _SMALL, width, 2) for label, _, _ in columns]
            top += 46 + 38 * max(map(len, labels))
            top = max(
                _bars(sheet, label, words, colour, longest, _MARGIN + i * (width + 40), width, top)
                for i, (label, (_, words, colour)) in enumerate(zip(labels, columns, strict=True))
            )
    picture = sheet.render(top + _MARGIN)
    full, empty = (np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) for colour in (ACCENT, EMPTY))
    for y, strip in strips:
        edges = np.linspace(left, right, len(strip) + 1).round().astype(int)
        for start, end, value in zip(edges[:-1], edges[1:], strip, strict=True):
            shade = np.round(empty + min(max(value, 0.0), 1.0) * (full - empty))
            picture[round(y) + 6 : round(y) + _STRIP - 6, start : max(end - 1, start + 1)] = shade
    return picture


def _bars(
    sheet: _Sheet,
    label: Sequence[str],
    words: Sequence[tuple[str, float]],
    colour: str,
    longest: float,
    start: float,
    width: float,
    top: float,
) -> float:
    """Bars under a label's lines in a column that begins at ``start``, the first 8; returns where they end."""
    shown = words[:8]
    left = start + min(max(sheet.measure(word, _TEXT) for word, _ in shown), width / 2.2) + 16
    scale = (start + width - left - 10 - sheet.measure("9.9%", _SMALL)) / longest
    for number, line in enumerate(reversed(label)):
        sheet.text(start, top - 16 - 38 * number, line, _SMALL, SOFT)
    sheet.line(left, top, left, top + _STRIP * len(shown), RULE)
    for row, (word, value) in enumerate(shown):
        middle = top + _STRIP * row + _STRIP / 2
        sheet.text(left - 16, middle, word, _TEXT, INK, ha="right", va="center_baseline", room=left - 16 - start)
        sheet.box(left, middle - 14, value * scale, 28, colour)
        sheet.text(left + value * scale + 10, middle, _percent(round(value, 3)), _SMALL, INK, va="center_baseline")
    bottom = top + _STRIP * len(shown)
    if len(words) > len(shown):
        bottom += 36
        sheet.text(left, bottom, f"and {len(words) - len(shown)} more", _SMALL, SOFT)
    return bottom


def save(path: str | Path, picture: Picture) -> None:
    """Write a picture as the file type its name says (.png, .jpg); equal pictures give equal files."""
    from PIL import Image

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_bytes(picture)).save(path, quality=92)


class _Sheet:
    """Paper with pixel coordinates, the origin at the top left, that grows to what is put on it.

    scale: what sizes of text are multiplied by, being stated for a sheet of ``_WIDTH``.
    """

    def __init__(self, scale: float = 1.0) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width: float = _WIDTH
        self.scale = scale
        self.figure = Figure(dpi=72, facecolor=PAPER)  # at 72 dpi a point is a pixel
        self.canvas = FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()

    def measure(self, text: str, size: float, *, bold: bool = False) -> float:
        """The width of ``text`` in pixels."""
        return float(self.canvas.get_renderer().get_text_width_height_descent(text, _font(size * self.scale, bold), False)[0])

    def fit(self, text: str, size: float, room: float, *, bold: bool = False) -> str:
        """``text``, shortened with an ellipsis until it fits."""
        if self.measure(text, size, bold=bold) <= room:
            return text
        kept = bisect_right(range(1, len(text)), room, key=lambda length: self.measure(text[:length] + "…", size, bold=bold))
        return text[:kept].rstrip() + "…"

    def wrap(self, text: str, size: float, room: float, most: int) -> list[str]:
        """``text`` in at most ``most`` lines that fit, broken between words; what is left over is shortened."""
        lines: list[str] = []
        for word in text.split():
            if lines and (len(lines) == most or self.measure(f"{lines[-1]} {word}", size) <= room):
                lines[-1] += f" {word}"
            else:
                lines.append(word)
        return [self.fit(line, size, room) for line in lines]

    def heading(self, title: str, subtitle: str) -> float:
        """Title and subtitle; returns where the rest may begin."""
        room = self.width - 2 * _MARGIN
        y = float(_MARGIN)
        if title:
            size = max(_TEXT, min(_TITLE, 0.98 * _TITLE * room / self.measure(title, _TITLE, bold=True)))
            y += 0.85 * _TITLE * self.scale
            self.text(_MARGIN, y, title, size, INK, bold=True, room=room)
        for line in self.wrap(subtitle, _SMALL, room, 3):
            y += 1.5 * _SMALL * self.scale
            self.text(_MARGIN, y, line, _SMALL, SOFT)
        return y + 24

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        colour: str,
        *,
        ha: Literal["left", "center", "right"] = "left",
        va: Literal["baseline", "center_baseline"] = "baseline",
        bold: bool = False,
        room: float | None = None,
    ) -> None:
        """One line of text, taken literally; shortened to ``room`` if given."""
        shown = text if room is None else self.fit(text, size, room, bold=bold)
        font = _font(size * self.scale, bold)
        self.axes.text(x, y, shown, color=colour, fontproperties=font, ha=ha, va=va, parse_math=False, usetex=False)

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        from matplotlib.patches import FancyBboxPatch

        corner = min(4.0, width / 2)
        style = f"round,pad=0,rounding_size={corner}"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, style, facecolor=colour, edgecolor="none"))

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: str, width: float = 1.5) -> None:
        from matplotlib.lines import Line2D

        # The patches' zorder: what is drawn later lies above.
        self.axes.add_line(Line2D([x0, x1], [y0, y1], color=colour, linewidth=width, solid_capstyle="butt", zorder=1))

    def dot(self, x: float, y: float, radius: float, colour: str) -> None:
        from matplotlib.patches import Circle

        self.axes.add_patch(Circle((x, y), radius, facecolor=colour, edgecolor="none"))

    def render(self, height: float) -> Picture:
        """The finished sheet."""
        pixels = round(self.width), round(height)
        self.figure.set_size_inches(pixels[0] / 72, pixels[1] / 72)
        self.axes.set_xlim(0, pixels[0])
        self.axes.set_ylim(pixels[1], 0)
        self.canvas.draw()
        return np.array(self.canvas.buffer_rgba())[..., :3].copy()


def _font(size: float, bold: bool) -> FontProperties:
    from matplotlib.font_manager import FontProperties

    return FontProperties(family="DejaVu Sans", size=size, weight="bold" if bold else "normal")


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 or share == 0 else f"{share:.1%}"


def _bytes(picture: NDArray[Any]) -> Picture:
    if picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise ValueError(f"an image has shape (height, width, 3), not {picture.shape}")
    if picture.dtype == np.uint8:
        return picture
    if not np.issubdtype(picture.dtype, np.floating) or not np.isfinite(picture).all():
        raise ValueError("an image is uint8, or finite floats in [0, 1]")
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
