"""The eager model as planned: its weights as they are stored, its quantized layers as their schemes compute them.

What an engine of a quantized model should compute, but for the arithmetic of the compute type. That decides which way a
few inputs are rounded to their 8 or 4 bits, and runtimes differ in it: ONNX Runtime's CPU keeps fp32 between ops of
fp16. How far a layer's output moves when its input does, by less than a rounding of the compute type, is its *slack*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mmdit_deploy.eager.program import Program
from mmdit_deploy.precision import PrecisionPlan, Scheme
from mmdit_deploy.precision.quantize import (
    attention_scales,
    dequantize,
    quantize_weight,
    simulate,
    simulate_attention,
)

_LINEAR = torch.ops.aten.linear.default
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


class PlannedCall:
    """One call of the eager model as planned.

    Args:
        path: of the call, e.g. ``blocks.3``.
        program: of its kind.
        weights: of the source, fp32, by name in the module.
        plan: of the model.
        in_fp32: of a linear layer's operator, whether the graph has its input in fp32, and quantizes it so.

    Raises:
        ValueError: the plan lacks what calibration finds.
    """

    def __init__(
        self,
        path: str,
        program: Program,
        weights: Mapping[str, Tensor],
        plan: PrecisionPlan,
        in_fp32: Callable[[fx.Node], bool] = lambda _: False,
    ):
        self._program, self._plan, self._call, self._in_fp32 = program, plan, path, in_fp32
        self._compute: torch.dtype = getattr(torch, plan.precision.dtype)
        self._weights = {name: w.to(self._compute).float() for name, w in weights.items()}
        self._linears = {
            name: quantize_weight(w, plan.linears[linear], self._compute)
            for name, w in weights.items()
            if (linear := self._path(name)) in plan.linears
        }
        attentions = [n for n in program.module.graph.nodes if n.target is _ATTENTION]
        # The first ones of the call, in order.
        self._attentions = dict(zip(attentions, plan.attentions.get(path, ()), strict=False))

    def run(
        self,
        activations: Mapping[str, Tensor],
        tap: Callable[[fx.Node, Tensor], Tensor] | None = None,
        slack: dict[fx.Node, float] | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute the call in fp32; as `Program.run`.

        Args:
            slack: gets, by operator, the relative L2 distance of its value to that for inputs that are moved.
        """

        def replace(node: fx.Node, args: Sequence[Any]) -> Tensor | None:
            if node.target is _LINEAR:
                return self._linear(node, slack, *args)
            return self._attention(node, slack, *args) if node in self._attentions else None

        return self._program.run(activations, self._weights, tap=tap, replace=replace)

    def _path(self, weight: str) -> str:
        """The path of the linear layer that a weight is of."""
        return f"{self._call}.{weight.removesuffix('.weight')}" if weight.endswith(".weight") else ""

    def _linear(
        self, node: fx.Node, slack: dict[fx.Node, float] | None, x: Tensor, _: Tensor, bias: Tensor | None = None
    ) -> Tensor | None:
        weight = self._program.names.get(getattr(node.args[1], "name", ""), "")
        if weight not in self._linears:
            return None
        scheme, tensors = self._plan.linears[self._path(weight)].scheme, self._linears[weight]
        product = simulate(x, tensors, scheme, None if self._in_fp32(node) else self._compute)
        if slack is not None and scheme.activations != "none":
            others = [simulate(near, tensors, scheme) for near in _moved(x, self._compute)]
            slack[node] = _farthest(product, others) + _one_step(x, product, tensors, scheme) / 2
        return product if bias is None else product + bias

    def _attention(
        self,
        node: fx.Node,
        slack: dict[fx.Node, float] | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        *_: Any,
    ) -> Tensor:
        scales = attention_scales(self._attentions[node], q.shape[-1], self._compute)
        made = simulate_attention(q, k, v, scales, mask)
        if slack is not None:
            # Q, K, V and the scores are each rounded before something is quantized.
            near = zip(*(_moved(t, self._compute) for t in (q, k, v, _scores(q, k, mask))), strict=True)
            others = [simulate_attention(a, b, c, scales, scores - _scores(a, b)) for a, b, c, scores in near]
            slack[node] = _farthest(made, others)
        return made.transpose(1, 2).contiguous().transpose(1, 2)  # as PyTorch's lies in memory: it is viewed by tokens


def _scores(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the softmax of an attention is taken of, as if nothing were quantized: [batch, heads, tokens, tokens]."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def _one_step(x: Tensor, product: Tensor, tensors: Mapping[str, Tensor], scheme: Scheme) -> float:
    """Relative L2 that one value moves a product by at most, where it is rounded the other way.

    Of a few thousand values none may do so when they are moved, and one when an engine computes them.
    """
    columns = dequantize(tensors, scheme).norm(dim=0)
    if scheme.smooth:
        factor = tensors["pre_quant_scale"].float()
        x, columns = x * factor, columns / factor
    step = _LARGEST_STEP[scheme.weights] * float(x.abs().max())
    return step * float(columns.max()) / max(float(product.norm()), torch.finfo(torch.float32).tiny)


# Of a format, as a share of its largest value.
_LARGEST_STEP = {"fp8": 32 / 448, "int8": 1 / 127, "fp4": 2 / 6}


def _farthest(value: Tensor, others: Sequence[Tensor]) -> float:
    """The largest relative L2 distance."""
    size = value.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return max(float((value - other).norm() / size) for other in others)


def _moved(x: Tensor, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every other element larger by half of what the compute type may round by, the others smaller; and the reverse."""
    share = torch.full((x.shape[-1],), torch.finfo(compute).eps / 4)
    share[::2] *= -1
    return x * (1 + share), x * (1 - share)
