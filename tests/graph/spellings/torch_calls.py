"""What a PyTorch model really calls in one forward pass: attentions, norms, RoPE. Fused graphs are held against it.

PyTorch dispatches every call of its own functions through a mode, so nothing is missed, whatever a class does around
it. diffusers has no function for an RMS norm, but modules; and its RoPE functions are replaced while we count.
"""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_FUNCTIONS: Mapping[Any, str] = {
    F.scaled_dot_product_attention: "Attention",
    F.rms_norm: "RMSNormalization",
    torch.rms_norm: "RMSNormalization",
    F.layer_norm: "LayerNormalization",
    F.gelu: "Gelu",
}
# Each call turns one tensor: Q or K.
_ROPE = {
    "transformer_flux": "apply_rotary_emb",
    "transformer_flux2": "apply_rotary_emb",
    "transformer_qwenimage": "apply_rotary_emb_qwen",
}


def count_calls(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Run a model and count its calls, by the ONNX op that is to stand for each.

    Args:
        module: ends in no gradient.
        inputs: by argument name of its ``forward``.

    Returns:
        Counts; what is not called at all is 0.
    """
    counts: Counter[str] = Counter({"Attention": 0, "RMSNormalization": 0, "RotaryEmbedding": 0})

    class Mode(TorchFunctionMode):
        depth = 0

        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func in _FUNCTIONS:
                counts[_FUNCTIONS[func]] += 1
            return func(*args, **(kwargs or {}))

    with torch.inference_mode(), _rms_norm_modules(module, counts), _rope(counts), Mode():
        module(**inputs)
    return dict(counts)


@contextlib.contextmanager
def _rms_norm_modules(module: nn.Module, counts: Counter[str]) -> Iterator[None]:
    """Count the modules that compute an RMS norm by themselves, and not through PyTorch's function."""
    called: dict[nn.Module, int] = {}

    def before(norm: nn.Module, _: Any) -> None:
        called[norm] = counts["RMSNormalization"]

    def after(norm: nn.Module, _: Any, __: Any) -> None:
        if counts["RMSNormalization"] == called[norm]:
            counts["RMSNormalization"] += 1

    norms = [m for m in module.modules() if "RMSNorm" in type(m).__name__]
    handles = [h for m in norms for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _rope(counts: Counter[str]) -> Iterator[None]:
    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts["RotaryEmbedding"] += 1
            return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name, function in _ROPE.items():
            module = importlib.import_module(f"diffusers.models.transformers.{name}")
            stack.enter_context(mock.patch.object(module, function, counted(getattr(module, function))))
        yield
