"""Small functions with a name for what has no op: they say what a graph computes, and a dialect may replace them whole.

Their names are unique over all domains and equal no op of ONNX or TensorRT, whose parser looks functions up by name
alone. They are generic: the same definition serves every type.
"""

from __future__ import annotations

import functools

import onnx.parser
import onnx_ir as ir

DOMAIN = "mmdit"
_OPSET = 23

# What each computes, in ONNX's own textual form.
_DEFINITIONS = {
    "MMDiTSiLU": """(x) => (y) {
        gate = Sigmoid(x)
        y = Mul(x, gate)
    }""",
    "MMDiTSwiGLU": """(gate, value) => (y) {
        sigmoid = Sigmoid(gate)
        silu = Mul(gate, sigmoid)
        y = Mul(silu, value)
    }""",
    # AdaLN (Peebles & Xie 2023, arXiv:2212.09748), after the norm
    "MMDiTModulate": """(x, scale, shift) => (y) {
        one = Constant <value_float = 1.0> ()
        one_like = CastLike(one, scale)
        factor = Add(one_like, scale)
        scaled = Mul(x, factor)
        y = Add(scaled, shift)
    }""",
    "MMDiTGatedResidual": """(x, gate, y) => (out) {
        gated = Mul(gate, y)
        out = Add(x, gated)
    }""",
}
NAMED_FUNCTIONS = tuple(_DEFINITIONS)


@functools.cache
def _definition(name: str) -> ir.Function:
    header = f'<domain: "{DOMAIN}", opset_import: ["": {_OPSET}]>\n'
    return ir.serde.deserialize_function(onnx.parser.parse_function(f"{header}{name} {_DEFINITIONS[name]}"))


def is_named_function(function: ir.Function) -> bool:
    """Whether it is one of ours."""
    return function.domain == DOMAIN and function.name in _DEFINITIONS


def define(model: ir.Model) -> int:
    """Define every named function that is called and has no definition yet.

    Returns:
        How many were added.
    """
    scopes: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    called = {node.op_type for scope in scopes for node in scope.all_nodes() if node.domain == DOMAIN}
    missing = [n for n in _DEFINITIONS if n in called and (DOMAIN, n, "") not in model.functions]
    for name in missing:
        model.functions[DOMAIN, name, ""] = _definition(name).clone()
    if missing:
        for scope in scopes:
            scope.opset_imports.setdefault(DOMAIN, 1)
    return len(missing)
