"""What a node shows while it runs: its progress bar, previews, and the text under it."""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Mapping

import comfy.model_management as management
import comfy.utils
import latent_preview
from comfy.model_patcher import ModelPatcher
from torch import Tensor


class Progress:
    """An ``OnStep`` that moves a node's progress bar, previews what is sampled, writes under the node, and raises on interrupt.

    node_id: None outside of a graph. model: what samples; without it there are no previews. label: what comes before the numbers.
    """

    EVERY = 0.25
    """Seconds between two messages, however many steps there are."""

    def __init__(self, node_id: str | None, model: ModelPatcher | None = None, label: str = "") -> None:
        self._node, self._label = node_id, label
        self._previewer = None if model is None else latent_preview.get_previewer(model.load_device, model.model.latent_format)
        self._bar: comfy.utils.ProgressBar | None = None
        self._latent: Tensor | None = None
        self._first: tuple[float, int] | None = None
        self._sent, self._ended = 0.0, False

    def show(self, denoised: Tensor) -> None:
        """Take x0 (batch, channels, h, w) for the next preview."""
        self._latent = denoised

    def __call__(self, step: int, total: int, metrics: Mapping[str, float], /) -> None:
        management.throw_exception_if_processing_interrupted()
        now = time.monotonic()
        # A resumed method begins with what was done before, which says nothing about its pace.
        self._first = self._first or (now, step)
        ends = step >= total and not self._ended
        if now - self._sent < self.EVERY and not ends:
            return
        self._sent, self._ended = now, self._ended or ends
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(total, node_id=self._node)
        preview = None
        if self._previewer is not None and self._latent is not None:
            preview = self._previewer.decode_latent_to_preview_image("JPEG", self._latent[:1].float())
        self._bar.update_absolute(step, total, preview)
        done = f"{step}/{total}{_remaining(now - self._first[0], step - self._first[1], total - step)}"
        figures = "  ".join(f"{name} {value:.3g}" for name, value in metrics.items())
        head = f"{self._label}  {done}".strip()
        parts = [head] if len(head) <= LINE else [self._label, done]
        send_text(self._node, "\n".join([*parts, figures]))


def _remaining(seconds: float, done: int, left: int) -> str:
    """How long the rest will take at the pace so far; nothing before the pace can be told, or when little is left."""
    if done <= 0 or seconds < 2:
        return ""
    expected = seconds * left / done
    if expected < 2:
        return ""
    return f", {expected:.0f} s left" if expected < 100 else f", {expected / 60:.0f} min left"


LINE, LINES = 40, 4
"""Characters and lines of a text under a node: the classic renderer breaks longer lines within words, and more lines need a taller node."""


def send_text(node_id: str | None, text: str) -> None:
    """Show ``text`` under a node, as much of it as fits; nothing happens without a server or a node."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(fold(text), node_id)


def fold(text: str) -> str:
    """``text`` in at most ``LINES`` lines of ``LINE`` characters, broken between words; an ellipsis stands for what is left out.

    Each of its own lines is begun, so that a long first one leaves room for the others.
    """
    lines: list[str] = []
    parts = text.splitlines()[:LINES]
    for later, part in zip(reversed(range(len(parts))), parts, strict=True):
        own, room = _wrapped(part, LINE), LINES - len(lines) - later
        lines += own if len(own) <= room else [*(cut := _wrapped(part, LINE - 2))[: room - 1], f"{cut[room - 1]} …"]
    # Nodes 2.0 reads it as Markdown: two spaces end a line, and a sign before an ordinary space would begin a list.
    return "  \n".join(re.sub(r"^([-+*#>]|\d+[.)]) ", "\\1\N{NO-BREAK SPACE}", line) for line in lines)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)
