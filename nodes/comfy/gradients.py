"""What autograd needs of ComfyUI's layers and of patches on them, for as long as it needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.clip_model
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, attention_pytorch
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...core.model import UnsupportedModel


def override(stack: ExitStack, module: torch.nn.Module, kind: type, make: Callable[[Any], Callable[..., Tensor]]) -> None:
    """Give the layers of a kind another forward for the length of ``stack``; those that another pack overrode keep theirs."""
    for layer in module.modules():
        if isinstance(layer, kind) and "forward" not in vars(layer):
            layer.forward = make(layer)
            stack.callback(delattr, layer, "forward")


def casts(patcher: ModelPatcher) -> bool:
    """Whether weights are cast or fetched anew at every call: autograd would keep all those copies at once."""
    base = patcher.model
    return bool(base.model_lowvram) or base.get_dtype() != base.get_dtype_inference()


@contextmanager
def gradients_or_a_sentence() -> Iterator[None]:
    """Raises UnsupportedModel where autograd fails on what a patch of another node did to tensors."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("Inference tensors", "modified by an inplace operation")):
            raise
        raise UnsupportedModel(
            "a patch on this MODEL computes with tensors that have no gradient: connect the MODEL from before that node"
        ) from error


def saving(patch: Any) -> Any:
    """A patch on hidden states, such as FreeU's, that may write into them: autograd keeps copies of what it needs."""
    if not callable(patch):  # a type of layer and its handler, which replaces the layer
        return patch

    def saved(*args: Any, **kwargs: Any) -> Any:
        own = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept: kept):
            return patch(*own, **kwargs)

    return saved


def recomputed(block: BasicTransformerBlock) -> Callable[..., Tensor]:
    """The block's forward, run again for the gradient instead of being remembered."""
    inner = block.forward

    def forward(x: Tensor, context: Tensor | None = None, transformer_options: Mapping[str, Any] | None = None) -> Tensor:
        # A copy: the next block writes its own number into the options before this one is run again.
        options = dict(transformer_options or {})
        if not torch.is_grad_enabled():
            return inner(x, context=context, transformer_options=options)
        return checkpoint(inner, x, context=context, transformer_options=options, use_reentrant=False)

    return forward


def out_of_place(layer: comfy.clip_model.CLIPLayer) -> Callable[..., Tensor]:
    """The layer's forward without writing into its input, which autograd needs."""

    def forward(x: Tensor, mask: Tensor | None = None, optimized_attention: Any = None) -> Tensor:
        x = x + layer.self_attn(layer.layer_norm1(x), mask, optimized_attention)
        return x + layer.mlp(layer.layer_norm2(x))

    return forward


def plain_attention(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    return attention_pytorch(*args, **kwargs)
