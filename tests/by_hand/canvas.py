"""Every example workflow opened in the browser, in the classic renderer and in Nodes 2.0; run by hand, and the pictures looked at.

``python tests/by_hand/canvas.py OUT`` (ComfyUI is found as tests/comfy/conftest.py says; the browser is ``chromium``, or $CHROMIUM) writes
OUT/NAME.classic.png and OUT/NAME.vue.png at 100 %, and prints which nodes overlap, cut off their content, or grew while running.
``--run`` runs the workflows first; ``--only 1`` takes those whose name starts so; ``--renderer vue`` takes one renderer.

What the repository holds of the workflows is made anew, after a change to them or to what they find, by
``--api`` (tests/comfy/api, what the browser would queue), ``--thumbnails`` (workflows/*.jpg) and ``--canvas`` (docs/images/canvas.png).
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "comfy"))

from conftest import Comfy, serve  # noqa: E402
from PIL import Image  # noqa: E402

RENDERERS = {"classic": False, "vue": True}
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
FLAGS += " --disable-sync --hide-scrollbars --remote-debugging-pipe"
LEFT, TOP, AROUND = 70, 90, 40
"""Pixels of the browser's own panels, and about the graph."""

LOADED = "Boolean(window.app?.extensionManager?.command && window.app.graph && document.querySelector('canvas#graph-canvas'))"
OPEN = """(async (workflow, name) => {
    await app.loadGraphData(workflow, true, true, name);
    for (const toast of document.querySelectorAll('.p-toast-close-button')) toast.click();
    const boxes = app.graph.nodes.map((node) => node.boundingRect);
    const left = Math.min(...boxes.map((box) => box[0])), top = Math.min(...boxes.map((box) => box[1]));
    const right = Math.max(...boxes.map((box) => box[0] + box[2])), bottom = Math.max(...boxes.map((box) => box[1] + box[3]));
    const [width, height] = WINDOW ?? [Infinity, Infinity];
    const scale = Math.min(1, (width - 2 * LEFT) / (right - left), (height - TOP - AROUND) / (bottom - top));
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [LEFT / scale - left, TOP / scale - top];
    app.canvas.setDirty(true, true);
    return [right - left, bottom - top];
})"""
BOXES = """app.graph.nodes.map((node) => {
    const element = document.querySelector(`[data-node-id="${node.id}"]`);
    const box = element ? element.getBoundingClientRect() : null;
    const bounds = node.boundingRect, [x, y] = app.canvas.ds.offset;
    const cut = element ? [...element.querySelectorAll('*')].filter((part) =>
        part.clientHeight > 0 && part.scrollHeight > part.clientHeight + 2 && getComputedStyle(part).overflowY !== 'visible') : [];
    return {id: node.id, title: node.title, box: box ? [box.x - x, box.y - y, box.width, box.height] : [...bounds],
            cut: cut.map((part) => (part.innerText || part.value || part.className).toString().slice(0, 40))};
})"""


class Page:
    """One page of a headless Chromium, spoken to through a pipe by its debugging protocol."""

    def __init__(self, process: subprocess.Popen[bytes], send: int, receive: int) -> None:
        self._process, self._send, self._receive = process, os.fdopen(send, "wb"), os.fdopen(receive, "rb")
        self._number, self._session, self._rest = 0, "", b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command's result; RuntimeError when the browser refuses it."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._send.write(json.dumps(message).encode() + b"\0")
        self._send.flush()
        while True:
            while b"\0" not in self._rest:
                read = os.read(self._receive.fileno(), 1 << 20)
                if not read:
                    raise RuntimeError("the browser is gone")
                self._rest += read
            text, self._rest = self._rest.split(b"\0", 1)
            answer = json.loads(text)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited; RuntimeError when it throws."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"])[:2000])
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 120) -> None:
        """Until the expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(expression):
            if time.monotonic() > end:
                raise TimeoutError(expression)
            time.sleep(0.2)

    def size(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser() -> Iterator[Page]:
    """A page in a browser of its own, with an empty profile."""
    (child_in, send), (receive, child_out) = os.pipe(), os.pipe()
    # Above 10, so that making them 3 and 4 overwrites none.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (child_in, child_out)]

    def connect() -> None:
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    with tempfile.TemporaryDirectory() as profile:
        command = [os.environ.get("CHROMIUM", "chromium"), *FLAGS.split(), f"--user-data-dir={profile}"]
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(command, preexec_fn=connect, pass_fds=(3, 4), stdin=quiet, stdout=quiet, stderr=quiet)
        for end in (child_in, child_out, *ends):
            os.close(end)
        try:
            yield Page(process, send, receive)
        finally:
            process.terminate()
            process.wait(20)


def enter(page: Page, server: Comfy, vue: bool) -> None:
    """ComfyUI's page in one of its renderers."""
    settings = {"Comfy.VueNodes.Enabled": vue, "Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}
    server.post("/settings", settings)
    page.size(1800, 1050)
    page.call("Page.navigate", url=f"http://127.0.0.1:{server.port}/")
    page.wait(LOADED)
    time.sleep(2)


def show(page: Page, path: Path, window: tuple[int, int] | None = None) -> None:
    """Open a workflow at 100 % in a window as large as it needs, or smaller in ``window``."""
    opening = OPEN.replace("LEFT", str(LEFT + AROUND)).replace("TOP", str(TOP + AROUND))
    opening = opening.replace("WINDOW", json.dumps(window)).replace("AROUND", str(AROUND))
    width, height = page.evaluate(f"{opening}({path.read_text()}, {json.dumps(path.stem)})")
    page.size(*(window or (int(width) + LEFT + 2 * AROUND, int(height) + TOP + 2 * AROUND + 200)))
    time.sleep(2)


def boxes(page: Page) -> list[dict[str, Any]]:
    """Each node's id, title and place (x, y, width, height) as it is drawn."""
    found: list[dict[str, Any]] = page.evaluate(BOXES)
    return found


def faults(nodes: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[str]:
    """What is wrong with places: nodes that overlap, cut off content, or grew since ``before``."""
    found = []
    for index, one in enumerate(nodes):
        x, y, width, height = one["box"]
        found += [f"{one['title']} scrolls: {text!r}" for text in one["cut"]]
        for other in nodes[index + 1 :]:
            left, top, wide, high = other["box"]
            if x < left + wide and left < x + width and y < top + high and top < y + height:
                found.append(f"{one['title']} and {other['title']} overlap")
        earlier = next((node["box"] for node in before if node["id"] == one["id"]), one["box"])
        if height > earlier[3] + 2:
            found.append(f"{one['title']} grew by {height - earlier[3]:.0f}")
    return found


def run(page: Page, server: Comfy) -> dict[str, Any]:
    """Run what is open, wait for its pictures, and return its outputs."""
    before = server.get("/history").keys()
    assert page.evaluate("app.queuePrompt(0)"), "the graph was refused"
    (prompt_id,) = until(lambda: server.get("/history").keys() - before, server)
    history = server.wait(prompt_id, 900)
    assert history["status"]["status_str"] == "success", history["status"]
    time.sleep(3)
    outputs: dict[str, Any] = history["outputs"]
    return outputs


def until(found: Callable[[], Collection[str]], server: Comfy, seconds: float = 900) -> Collection[str]:
    """What is found, as soon as it is something."""
    end = time.monotonic() + seconds
    while not (result := found()):
        if time.monotonic() > end:
            raise TimeoutError(f"the server's log ends: {server.log.read_text()[-3000:]}")
        time.sleep(0.5)
    return result


def thumbnail(path: Path, outputs: dict[str, Any], server: Comfy) -> Image.Image:
    """What a workflow saved, a row for each node from top to bottom, and under it as many of its charts as fit."""
    side, gap = 560, 6
    nodes = sorted(json.loads(path.read_text())["nodes"], key=lambda node: (node["pos"][1], node["pos"][0]))
    rows = []
    for kind in ("SaveImage", "PreviewImage"):
        for node in nodes:
            pictures = [picture(server, image) for image in outputs.get(str(node["id"]), {}).get("images", [])]
            if node["type"] == kind and pictures:
                rows += [pictures] if kind == "SaveImage" else [[chart] for chart in pictures]
    sheet, top = Image.new("RGB", (side, 4 * side), "#fbfaf7"), 0
    for row in rows:
        width = (side - gap * (len(row) + 1)) // len(row)
        height = max(round(width * image.height / image.width) for image in row)
        if top and top + height + 2 * gap > 1.1 * side:
            break
        for column, image in enumerate(row):
            sheet.paste(image.resize((width, height), Image.Resampling.LANCZOS), (gap + column * (width + gap), top + gap))
        top += height + gap
    return sheet.crop((0, 0, side, top + gap))


def picture(server: Comfy, image: dict[str, str]) -> Image.Image:
    """A picture that a node saved or showed."""
    return Image.open(server.base / image["type"] / image["subfolder"] / image["filename"]).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", help="where the pictures of the canvas go")
    parser.add_argument("--run", action="store_true", help="run each workflow before its picture is taken")
    parser.add_argument("--only", default="", help="how the names of the workflows to open start")
    parser.add_argument("--renderer", choices=RENDERERS, action="append", help="one renderer instead of both")
    parser.add_argument("--api", action="store_true", help="write tests/comfy/api")
    parser.add_argument("--thumbnails", action="store_true", help="run, and write workflows/*.jpg")
    parser.add_argument("--canvas", action="store_true", help="run the first workflow, and write docs/images/canvas.png")
    given = parser.parse_args()
    paths = sorted(path for path in (ROOT / "workflows").glob("*.json") if path.stem.startswith(given.only))
    with tempfile.TemporaryDirectory() as base, serve(Path(base)) as server, browser() as page:
        for renderer in given.renderer or RENDERERS if given.out else ():
            enter(page, server, RENDERERS[renderer])
            for path in paths:
                show(page, path)
                before = boxes(page)
                if given.run:
                    run(page, server)
                page.screenshot(given.out / f"{path.stem}.{renderer}.png")
                for fault in faults(boxes(page), before):
                    sys.stdout.write(f"{path.stem}, {renderer}: {fault}\n")
        enter(page, server, vue=False)
        for path in paths if given.api or given.thumbnails else ():
            show(page, path)
            if given.api:
                prompt = page.evaluate("app.graphToPrompt().then((prompt) => prompt.output)")
                (ROOT / "tests" / "comfy" / "api" / path.name).write_text(json.dumps(prompt, indent=1, ensure_ascii=False) + "\n")
            if given.thumbnails:
                thumbnail(path, run(page, server), server).save(path.with_suffix(".jpg"), quality=85)
        if given.canvas:
            size = 1800, 1050
            page.size(*size)
            show(page, next(path for path in paths if path.stem.startswith("1 ")), size)
            run(page, server)
            page.screenshot(ROOT / "docs" / "images" / "canvas.png")


if __name__ == "__main__":
    main()
