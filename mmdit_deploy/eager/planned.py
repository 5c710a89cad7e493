"""The eager model as planned: its weights as they are stored, its quantized layers as their schemes compute them.

What an engine of a quantized model should compute, but for the arithmetic of the compute type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mmdit_deploy.eager.program import Program
from mmdit_deploy.precision import PrecisionPlan
from mmdit_deploy.precision.quantize import attention_scales, quantize_weight, simulate, simulate_attention

_LINEAR = torch.ops.aten.linear.default
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


class PlannedCall:
    """One call of the eager model as planned.

    Args:
        path: of the call, e.g. ``blocks.3``.
        program: of its kind.
        weights: of the source, fp32, by name in the module.
        plan: of the model.

    Raises:
        ValueError: the plan lacks what calibration finds.
    """

    def __init__(self, path: str, program: Program, weights: Mapping[str, Tensor], plan: PrecisionPlan):
        self._program, self._plan, self._path = program, plan, path
        self._compute: torch.dtype = getattr(torch, plan.precision.dtype)
        self._weights = {name: w.to(self._compute).float() for name, w in weights.items()}
        self._linears = {
            name: quantize_weight(w, plan.linears[linear], self._compute)
            for name, w in weights.items()
            if (linear := self._linear(name)) in plan.linears
        }
        attentions = [n for n in program.module.graph.nodes if n.target is _ATTENTION]
        # The first ones of the call, in order.
        self._attentions = dict(zip(attentions, plan.attentions.get(path, ()), strict=False))

    def run(
        self,
        activations: Mapping[str, Tensor],
        tap: Callable[[fx.Node, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute the call in fp32; as `Program.run`."""
        return self._program.run(activations, self._weights, tap=tap, replace=self._replace)

    def _linear(self, weight: str) -> str:
        """The path of the linear layer that a weight is of."""
        return f"{self._path}.{weight.removesuffix('.weight')}" if weight.endswith(".weight") else ""

    def _replace(self, node: fx.Node, args: Sequence[Any]) -> Tensor | None:
        if node.target is _LINEAR:
            return self._quantized_linear(node, *args)
        if node in self._attentions:
            q, k, v = args[:3]
            scales = attention_scales(self._attentions[node], q.shape[-1], self._compute)
            return simulate_attention(q, k, v, scales, args[3] if len(args) > 3 else None)
        return None

    def _quantized_linear(self, node: fx.Node, x: Tensor, _: Tensor, bias: Tensor | None = None) -> Tensor | None:
        weight = self._program.names.get(getattr(node.args[1], "name", ""), "")
        if weight not in self._linears:
            return None
        scheme = self._plan.linears[self._linear(weight)].scheme
        product = simulate(x, self._linears[weight], scheme, self._compute)
        return product if bias is None else product + bias
