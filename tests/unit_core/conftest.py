from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import settings

# Same examples on every run and machine, however slow; nothing written beside the tests.
settings.register_profile("conceptkit", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("conceptkit")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint in the demo's layout."""
    import torch
    from conceptkit.core.demo.architecture import AUTOENCODER, TEXT, UNET, build_autoencoder, build_text_encoder, build_unet
    from conceptkit.core.hosts.checkpoint import to_single_file
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = [network.state_dict() for network in (build_unet(), build_text_encoder(), build_autoencoder())]
    header = {"format": "conceptkit-demo", "version": 1, "unet": UNET, "text": TEXT, "autoencoder": AUTOENCODER}
    tensors = {key: value.half().contiguous() for key, value in to_single_file(*parts).items()}
    save_file(tensors, path, metadata={"conceptkit": json.dumps(header)})
    return path


@pytest.fixture(scope="session")
def thrifty() -> dict[str, int]:
    """Settings of the default method with which it spends next to nothing, whatever they are called."""
    from conceptkit.core.decompose.distilled import BUDGETS

    return {name: min(value, 2) for name, value in vars(BUDGETS["fast"]).items() if isinstance(value, int)}
