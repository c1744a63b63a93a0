"""A report on an edit as a chart."""

from __future__ import annotations

from collections.abc import Mapping

from ..chart import Picture, edit_report
from .context_edit import ContextEdit
from .report import Report


def report_picture(edit: ContextEdit, report: Report | None = None) -> Picture:
    """The chart of ``report``, or of the edit's own; an edit without a report is drawn as its title alone."""
    report = report or edit.report
    title = ", ".join(map(str, edit.concepts)) or "no edit"
    if edit.is_identity or report is None:
        return edit_report([], [], [], [], title=title, subtitle=edit.headline())
    return edit_report(
        [(concept.text, concept.trace, concept.regenerable_plausible) for concept in report.concepts],
        _strips(report.layers),
        [(word.word, word.shift) for word in report.kept],
        [(word.word, word.shift) for word in report.neighbours],
        title=title,
        subtitle=f"method {edit.method}, rank {edit.rank}; captions change by {report.distortion:.2%}, "
        f"the empty prompt by {report.null_drift:.2%}",
    )


def _strips(layers: Mapping[str, float]) -> list[tuple[str, list[float]]]:
    """Layers that make keys and layers that make values, each in the network's order."""
    found = {
        label: [value for path, value in layers.items() if path.endswith(end)] for label, end in (("keys", "to_k"), ("values", "to_v"))
    }
    return [(label, values) for label, values in found.items() if values]
