"""GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415) in ops of opset 17.

Gelu(x)                          ⇒   x · ½ · (1 + Erf(x · √½))
Gelu<approximate = "tanh">(x)    ⇒   x · ½ · (1 + Tanh(√(2/π) · (x + 0.044715 · x³)))
"""

from __future__ import annotations

import math

import onnx_ir as ir

from mmdit_deploy.graph.lower.decomposed_nodes import Replacement, nodes_of, own_attributes
from mmdit_deploy.graph.passes import Pass


def _spell_out(model: ir.Model) -> int:
    nodes = nodes_of(model, "Gelu")
    for node in nodes:
        new, x = Replacement(node), node.inputs[0]
        assert x is not None
        step = _tanh(new, x) if own_attributes(node).get("approximate", "none") == "tanh" else _erf(new, x)
        half = new("Mul", x, new.number(0.5, x))
        new.done(new("Mul", half, new("Add", step, new.number(1.0, x))))
    return len(nodes)


def _erf(new: Replacement, x: ir.Value) -> ir.Value:
    return new("Erf", new("Mul", x, new.number(math.sqrt(0.5), x)))


def _tanh(new: Replacement, x: ir.Value) -> ir.Value:
    cubed = new("Mul", new("Mul", x, x), x)
    inner = new("Add", x, new("Mul", cubed, new.number(0.044715, x)))
    return new("Tanh", new("Mul", inner, new.number(math.sqrt(2 / math.pi), x)))


gelu: Pass = Pass("GELU spelled out", _spell_out)
