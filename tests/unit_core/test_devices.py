"""Every method on a model that is elsewhere: no accelerator is needed, tensors only say where they are, and operations hold them to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptkit.core.decompose import Decomposition
from conceptkit.core.model import Conditioning, Model, Prompt
from conceptkit.tests.unit_core.test_methods import Stop, method, take_apart, world
from torch import Tensor
from torch.overrides import TorchFunctionMode

ELSEWHERE = torch.device("cuda:0")
_TELL = {
    "item",
    "tolist",
    "__bool__",
    "__float__",
    "__int__",
    "__len__",
    "dim",
    "size",
    "stride",
    "numel",
    "__format__",
    "__repr__",
    "__hash__",
}


class Away(Tensor):
    """A tensor that says it is elsewhere; what is done with it is for `Devices` to judge."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def away(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if isinstance(value, Away) else value.as_subclass(Away)
    return type(value)(map(away, value)) if type(value) in (list, tuple) else value


def here(value: Any) -> Any:
    if isinstance(value, Away):
        return value.as_subclass(Tensor)
    if isinstance(value, Mapping):
        return {key: here(item) for key, item in value.items()}
    return type(value)(map(here, value)) if type(value) in (list, tuple) else value


def leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)


class Devices(TorchFunctionMode):
    """Refuses what a machine with two devices refuses: operations over both, a NumPy array of the other, a generator of the wrong one."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        given = list(leaves([*args, *kwargs.values()]))
        there = any(isinstance(tensor, Away) for tensor in given)
        if name == "__get__":
            if not there:
                return func(*args)
            return ELSEWHERE if func.__self__.__name__ == "device" else away(func(*args))
        if name == "__set__":
            return func(*args)
        if name == "to":
            return self._moved(func, args, kwargs)
        if name == "cpu":
            return here(args[0])
        if name in _TELL:
            return func(*here(args), **kwargs)
        if name == "grad":
            inputs = kwargs["inputs"] if "inputs" in kwargs else args[1]
            inputs = [inputs] if isinstance(inputs, Tensor) else inputs
            return tuple(away(g) if isinstance(i, Away) else here(g) for g, i in zip(func(*args, **kwargs), inputs, strict=True))
        wanted = kwargs.get("device") is not None and torch.device(kwargs["device"]) == ELSEWHERE
        if wanted:
            kwargs["device"] = "cpu"
        if (there or wanted) and kwargs.get("generator") is not None:
            raise RuntimeError(f"{name}: a generator of the CPU for a tensor elsewhere")
        if there:
            self._agree(name, args, given)
        if there and name.endswith("_") and not name.endswith("__"):
            func(args[0], *here(args[1:]), **here(kwargs))
            return args[0]
        result = func(*here(args), **here(kwargs))
        return away(result) if wanted or (there and (name != "__getitem__" or isinstance(args[0], Away))) else result

    def _moved(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        target, rest = kwargs.pop("device", None), []
        for value in args[1:]:
            if isinstance(value, Tensor):
                target, rest = ELSEWHERE if isinstance(value, Away) else "cpu", [*rest, value.dtype]
            elif isinstance(value, (torch.device, str)):
                target = value
            else:
                rest.append(value)
        result = func(here(args[0]), *rest, **kwargs) if rest or kwargs else here(args[0])
        stays = isinstance(args[0], Away) if target is None else torch.device(target) == ELSEWHERE
        return away(result) if stays else result

    def _agree(self, name: str, args: Any, given: Sequence[Tensor]) -> None:
        if name == "numpy":
            raise RuntimeError("a NumPy array of a tensor elsewhere")
        if name in ("__getitem__", "index_select"):
            if not isinstance(args[0], Away):
                raise RuntimeError("a tensor here, indexed by one elsewhere")
        elif name not in ("copy_", "__setitem__") and any(tensor.ndim and not isinstance(tensor, Away) for tensor in given):
            raise RuntimeError(f"{name}: tensors here and elsewhere, {[tuple(tensor.shape) for tensor in given]}")


@contextmanager
def elsewhere() -> Iterator[None]:
    """Inside a network that is elsewhere, where all is on one device."""
    with torch._C.DisableTorchFunction():
        yield


class Text:
    def __init__(self, text: Any, moved: bool) -> None:
        self.text, self.place = text, away if moved else here
        self.vocabulary, self.tokenize = text.vocabulary, text.tokenize
        self.tables = {name: self.place(table) for name, table in text.tables.items()}

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        with elsewhere():
            encoded = self.text.encode([p if isinstance(p, str) else [here(part) for part in p] for p in prompts])
        return encoded.map(self.place)


class Denoiser:
    device = ELSEWHERE

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser
        self.latent_channels, self.downscale, self.side = denoiser.latent_channels, denoiser.downscale, denoiser.side
        self.training_sigmas = denoiser.training_sigmas

    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        with elsewhere():
            return away(self.denoiser.denoise(here(x), here(sigma), conditioning.map(here)))


class Autoencoder:
    def __init__(self, autoencoder: Any) -> None:
        self.autoencoder = autoencoder

    def encode(self, pictures: Tensor) -> Tensor:
        with elsewhere():
            return away(self.autoencoder.encode(here(pictures)))

    def decode(self, latents: Tensor) -> Tensor:
        with elsewhere():
            return away(self.autoencoder.decode(here(latents)))


class Scorer:
    def __init__(self, scorer: Any) -> None:
        self.scorer, self.logit_scale = scorer, scorer.logit_scale

    def embed_pictures(self, pictures: Tensor) -> Tensor:
        with elsewhere():
            return away(self.scorer.embed_pictures(here(pictures)))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        with elsewhere():
            return away(self.scorer.embed_texts(texts))


def moved(model: Model, text: bool) -> Model:
    """The model elsewhere, its text encoder too or not: a host with little memory leaves that on the CPU."""
    return replace(
        model,
        text=Text(model.text, text),
        denoiser=Denoiser(model.denoiser),
        autoencoder=Autoencoder(model.autoencoder),
        scorer=Scorer(model.scorer),
    )


@cache
def at_home(method: str) -> Decomposition:
    return take_apart(world(), method)


@pytest.mark.parametrize("text", [True, False], ids=["all elsewhere", "text encoder here"])
@method
def test_a_model_elsewhere_gives_what_it_gives_here(method: str, text: bool, tmp_path: Path) -> None:
    expected, path = at_home(method), tmp_path / "run"

    def stop(step: int, total: int, metrics: object) -> None:
        if step >= 0.8 * expected.evals:
            raise Stop

    with Devices():
        if method != "text":
            with pytest.raises(Stop):
                take_apart(moved(world(), text), method, checkpoint=path, on_step=stop)
        found = take_apart(moved(world(), text), method, checkpoint=path)
    assert found.content_hash() == expected.content_hash()


def test_devices_that_differ_are_noticed() -> None:
    there, near = torch.ones(3).as_subclass(Away), torch.ones(3)
    with Devices():
        assert there.device == ELSEWHERE and there.cpu().device.type == "cpu" and (2 * there).device == ELSEWHERE
        for wrong in (lambda: there + near, lambda: near[there.long()], lambda: there.numpy(), lambda: torch.cat([there, near])):
            with pytest.raises(RuntimeError):
                wrong()
