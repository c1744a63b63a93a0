"""One real ComfyUI for the whole suite: a server in a process of its own, on a free port, with its own base directory.

The checkout is $COMFYUI_PATH, ~/ComfyUI, or the folder above custom_nodes; the Python that runs it is $COMFYUI_PYTHON, the checkout's
own environment, .venv-comfyui here, or the Python that runs the tests. Without a checkout every test here is skipped. $COMFYUI_ARGS says
how it runs ("--cpu"; on a GPU "", or "--bf16-unet" for large models).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PACK = Path(__file__).resolve().parents[2]
SHIPPED = PACK / "core" / "demo" / "data" / "shapes.safetensors"


def find_checkout() -> Path | None:
    above = PACK.parent.parent if PACK.parent.name == "custom_nodes" else None
    for path in (os.environ.get("COMFYUI_PATH"), Path.home() / "ComfyUI", above):
        if path and (Path(path) / "main.py").is_file() and (Path(path) / "comfy").is_dir():
            return Path(path).resolve()
    return None


def find_python(checkout: Path) -> str:
    inside = [checkout / "venv" / "bin" / "python", checkout / ".venv" / "bin" / "python", PACK / ".venv-comfyui" / "bin" / "python"]
    return os.environ.get("COMFYUI_PYTHON") or next((str(path) for path in inside if path.is_file()), sys.executable)


def environment(python: str, folder: Path) -> dict[str, str]:
    """The server's environment; with stand-ins for the kernels of torchvision and torchaudio where builds for CUDA cannot load them."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    if subprocess.run([python, "-c", "import torchvision, torchaudio"], env=env, capture_output=True).returncode == 0:
        return env
    (folder / "sitecustomize.py").write_text(
        "import torch\n"
        'library = torch.library.Library("torchvision", "DEF")\n'
        'for name in ("nms", "qnms"):\n'
        '    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")\n'
    )
    where = "import importlib.util as i; print(i.find_spec('torchaudio').submodule_search_locations[0])"
    installed = Path(subprocess.run([python, "-c", where], env=env, capture_output=True, text=True, check=True).stdout.strip())
    # The same package without its compiled libraries, which it can do without.
    for source in installed.rglob("*.py"):
        link = folder / "torchaudio" / source.relative_to(installed)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(source)
    return env | {"PYTHONPATH": str(folder)}


class Comfy:
    """A running ComfyUI server."""

    def __init__(self, base: Path, checkpoint: str, port: int, log: Path) -> None:
        self.base, self.checkpoint, self.port, self.log = base, checkpoint, port, log

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as response:
            return json.loads(response.read())

    def post(self, path: str, data: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            body = response.read()
        return json.loads(body) if body else None

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue an API-format graph; raises AssertionError with the server's answer when it is refused."""
        try:
            return self.post("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def wait(self, prompt_id: str, seconds: float = 240) -> dict[str, Any]:
        """The history of a finished prompt."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            history = self.get(f"/history/{prompt_id}").get(prompt_id)
            if history and history.get("status", {}).get("messages"):
                return history
            time.sleep(0.05)
        raise AssertionError(f"the prompt took more than {seconds} s; the server's log ends: {self.log.read_text()[-3000:]}")

    def run(self, prompt: dict[str, Any], seconds: float = 240) -> dict[str, Any]:
        """The outputs of a graph by node id; AssertionError with the exception's message when it fails."""
        history = self.wait(self.queue(prompt), seconds)
        status = history["status"]
        assert status["status_str"] == "success", exception(history)
        return history["outputs"]

    def fail(self, prompt: dict[str, Any]) -> str:
        """The exception message of a graph that must fail."""
        history = self.wait(self.queue(prompt))
        assert history["status"]["status_str"] == "error", "the graph was expected to fail"
        return exception(history)

    @property
    def weights(self) -> Path:
        """The demo model's file."""
        return SHIPPED if self.checkpoint == SHIPPED.name else self.base / "models" / "checkpoints" / self.checkpoint

    def loaders(self) -> dict[str, Any]:
        return {"loader": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": self.checkpoint}}}

    def probe(self, name: str, *, wires: dict[str, Any] | None = None, graph: dict[str, Any] | None = None, **arguments: Any) -> Any:
        """Run a function of tests/comfy/probes inside a node, on the demo model or on what ``wires`` connects, and return its result."""
        return json.loads(self.run(self.probing(name, wires=wires, graph=graph, **arguments))["probe"]["text"][0])

    def probing(
        self, name: str, *, wires: dict[str, Any] | None = None, graph: dict[str, Any] | None = None, **arguments: Any
    ) -> dict[str, Any]:
        """The graph that ``probe`` runs."""
        inputs = {"model": ["loader", 0], "clip": ["loader", 1], "vae": ["loader", 2]} | (wires or {})
        # The nonce keeps ComfyUI from answering out of its cache.
        inputs |= {"name": name, "arguments": json.dumps(arguments), "nonce": uuid.uuid4().hex}
        probe = {"class_type": "ConceptKitProbe", "inputs": {key: value for key, value in inputs.items() if value is not None}}
        return self.loaders() | (graph or {}) | {"probe": probe}


def exception(history: dict[str, Any]) -> str:
    for kind, data in history["status"]["messages"]:
        if kind in ("execution_error", "execution_interrupted"):
            return data.get("exception_message", kind)
    return str(history["status"])


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    with serve(tmp_path_factory.mktemp("comfyui")) as server:
        yield server


@contextmanager
def serve(base: Path) -> Iterator[Comfy]:
    """A server with the pack and the probes, whose models, output and settings lie in the empty folder ``base``."""
    checkout = find_checkout()
    if checkout is None:
        pytest.skip("no ComfyUI checkout: set COMFYUI_PATH")
    python = find_python(checkout)
    if subprocess.run([python, "-c", "import aiohttp, comfyui_frontend_package, torch"], capture_output=True).returncode != 0:
        pytest.skip(f"{python} lacks ComfyUI's requirements: set COMFYUI_PYTHON to one that has them")
    for folder in ("custom_nodes", "models/checkpoints", "models/loras", "models/embeddings", "input", "output", "shim"):
        (base / folder).mkdir(parents=True)
    (base / "custom_nodes" / "conceptkit").symlink_to(PACK)
    (base / "custom_nodes" / "conceptkit_probes").symlink_to(Path(__file__).parent / "probes")
    checkpoint = SHIPPED.name if SHIPPED.is_file() else random_checkpoint(base / "models" / "checkpoints" / "random.safetensors")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        python,
        "main.py",
        *os.environ.get("COMFYUI_ARGS", "--cpu").split(),
        "--listen",
        "127.0.0.1",
        "--port",
        str(port),
        "--base-directory",
        str(base),
    ]
    command += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
    log = base / "log.txt"
    with log.open("w") as sink:
        process = subprocess.Popen(command, cwd=checkout, env=environment(python, base / "shim"), stdout=sink, stderr=subprocess.STDOUT)
    server = Comfy(base, checkpoint, port, log)
    try:
        for _ in range(2400):
            if process.poll() is not None:
                raise AssertionError(f"ComfyUI did not start; its log ends: {log.read_text()[-4000:]}")
            try:
                server.get("/system_stats")
                break
            except OSError:
                time.sleep(0.25)
        yield server
    finally:
        process.terminate()
        process.wait(20)


def random_checkpoint(path: Path) -> str:
    """A file in the demo model's layout with seeded random weights, for a checkout without the trained ones."""
    pytest.importorskip("diffusers", reason="the demo model's weights are absent, and making random ones needs diffusers")
    import torch
    from conceptkit.core.demo import architecture
    from conceptkit.core.hosts.checkpoint import to_single_file
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = [
            architecture.build_unet(),
            architecture.build_text_encoder(),
            architecture.build_autoencoder(),
            architecture.build_scorer(),
        ]
    header = {"format": "conceptkit-demo", "version": 1, "unet": architecture.UNET, "text": architecture.TEXT}
    header |= {"autoencoder": architecture.AUTOENCODER, "scorer": {"width": architecture.WIDTH}}
    weights = {k: v.half().contiguous() for k, v in to_single_file(*(part.state_dict() for part in parts)).items()}
    save_file(weights, path, {"conceptkit": json.dumps(header)})
    return path.name
