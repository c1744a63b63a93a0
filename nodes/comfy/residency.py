"""Models loaded through ComfyUI's model manager, with weights that autograd can save."""

from __future__ import annotations

from contextlib import ExitStack

import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ...core.model import UnsupportedModel


class Resident:
    """Keeps models loaded together, with weights that autograd can save, and ``memory`` bytes free for their computations."""

    def __init__(self, *patchers: ModelPatcher, memory: float = 0) -> None:
        self._patchers, self._memory = patchers, memory
        self._ready = False

    def load(self) -> None:
        """Load them, unless they still are."""
        held = [entry.model for entry in management.current_loaded_models]
        if self._ready and all(any(patcher is model for model in held) for patcher in self._patchers):
            return
        models = [model for patcher in self._patchers for model in (patcher, *patcher.get_nested_additional_models())]
        with torch.inference_mode():
            management.load_models_gpu(models, memory_required=self._memory)
        with torch.inference_mode(False):
            for patcher in self._patchers:
                if not _dynamic(patcher):
                    _make_plain(patcher.model)
        self._ready = True


def _dynamic(patcher: ModelPatcher) -> bool:
    """Whether the weights lie in evictable memory."""
    return hasattr(patcher, "is_dynamic") and bool(patcher.is_dynamic())


def lasting(stack: ExitStack, patcher: ModelPatcher) -> ModelPatcher:
    """The patcher itself; for a model in evictable memory, which autograd must not keep views of, a copy of its own."""
    # No clone otherwise: ComfyUI cannot take a bypassed LoRA back out of the shared layers once the clone that put it there is gone.
    if not _dynamic(patcher):
        return patcher
    if patcher.cached_patcher_init is None:
        raise UnsupportedModel(
            "this model cannot be copied out of dynamic memory: load it with one of ComfyUI's own loaders, or start ComfyUI with "
            "--disable-dynamic-vram"
        )
    copy = patcher.clone(disable_dynamic=True, force_deepcopy=True)
    stack.callback(management.unload_model_and_clones, copy)
    return copy


def ordinary(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def _make_plain(module: torch.nn.Module) -> None:
    """Let autograd save the weights: an inference tensor is replaced by an ordinary one on the same memory, and none wants a gradient."""
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.is_inference():
                child._parameters[name] = torch.nn.Parameter(_on_the_same_memory(parameter), requires_grad=False)
            else:
                parameter.requires_grad_(False)
        for name, buffer in child.named_buffers(recurse=False):
            if buffer.is_inference():
                child._buffers[name] = _on_the_same_memory(buffer)
        # A LoRA in bypass mode adds its own product to the layer's output.
        adapter = getattr(getattr(child.forward, "__self__", None), "adapter", None)
        if isinstance(adapter, WeightAdapterBase) and isinstance(adapter.weights, (list, tuple)):
            adapter.weights = type(adapter.weights)(
                _on_the_same_memory(w) if isinstance(w, Tensor) and w.is_inference() else w for w in adapter.weights
            )


def _on_the_same_memory(tensor: Tensor) -> Tensor:
    """An ordinary tensor with the memory of an inference tensor; nothing is copied."""
    plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
