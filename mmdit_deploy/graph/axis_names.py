"""Names of a traced graph's dims: the tracer's symbols become the contract's axes, each size spelled in one way.

    s12 + s21, s21 + s12, (s40//2)   ⇒   img_tokens + txt_tokens, img_tokens + txt_tokens, batch

Passes compare dims as text, so equal sizes must read alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import sympy

from mmdit_deploy.contract import AXES, TensorSpec

_AXES = {axis: sympy.Symbol(axis, integer=True, positive=True) for axis in AXES}


def name_axes(graph: ir.Graph, inputs: Sequence[TensorSpec]) -> None:
    """Rename the dims of every value of a traced graph, in place.

    Args:
        graph: its first inputs are those of the kind.
        inputs: what the kind's inputs are: a symbol is what it stands for there.
    """
    symbols: dict[str, sympy.Expr] = {}
    for value, tensor in zip(graph.inputs, inputs, strict=False):
        for dim, axis in zip(value.shape or (), tensor.axes, strict=True):
            # A dim that follows from others, such as s12 + s21, is no symbol of its own.
            if isinstance(axis, str) and str(dim).isidentifier():
                symbols[str(dim)] = sympy.Add(*(_AXES[part] for part in axis.split(" + ")))
    for value in [*graph.inputs, *(out for node in graph for out in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([dim if isinstance(dim, int) else _named(str(dim), symbols) for dim in value.shape])


def _named(dim: str, symbols: Mapping[str, sympy.Expr]) -> int | ir.SymbolicDim:
    size = sympy.expand(sympy.sympify(dim, locals=dict(symbols)))
    if size.is_Integer:
        return int(size)
    counts = size.as_coefficients_dict()
    if set(counts) <= set(_AXES.values()) and all(count.is_Integer and count > 0 for count in counts.values()):
        names = [axis for axis, symbol in _AXES.items() for _ in range(int(counts.get(symbol, 0)))]
        return ir.SymbolicDim(" + ".join(names))
    return ir.SymbolicDim(str(size))
