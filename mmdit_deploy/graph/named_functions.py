"""Small functions with a name for what has no op: they say what a graph computes, and a dialect may replace them whole.

Their names are unique over all domains and equal no op of ONNX or TensorRT, whose parser looks functions up by name
alone. They are generic: the same definition serves every type and shape.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping

import onnx.parser
import onnx_ir as ir

DOMAIN = "mmdit"
# Metadata of a function: inputs that are the same numbers in every call of it, and of others that are like it.
SHARED = "mmdit.shared"

# What each computes, in ONNX's own textual form. Nodes have names, because engines name their kernels after them.
_DEFINITIONS = {
    "MMDiTSiLU": """(x) => (y) {
        [sigmoid] sigmoid = Sigmoid(x)
        [silu] y = Mul(x, sigmoid)
    }""",
    # Shazeer 2020, arXiv:2002.05202
    "MMDiTSwiGLU": """(gate, value) => (y) {
        [sigmoid] sigmoid = Sigmoid(gate)
        [silu] silu = Mul(gate, sigmoid)
        [gated] y = Mul(silu, value)
    }""",
    # AdaLN (Peebles & Xie 2023, arXiv:2212.09748), after the norm
    "MMDiTModulate": """(x, scale, shift) => (y) {
        [one] one = Constant <value_float = 1.0> ()
        [one_like] one_like = CastLike(one, scale)
        [factor] factor = Add(scale, one_like)
        [scaled] scaled = Mul(x, factor)
        [shifted] y = Add(scaled, shift)
    }""",
    "MMDiTGatedResidual": """(x, gate, y) => (out) {
        [gated] gated = Mul(gate, y)
        [added] out = Add(x, gated)
    }""",
}


def _fp8_attention(mask: str = "") -> str:
    """Attention with everything that its products read in E4M3: Q as it is scaled, and the softmax in steps of 1/448.

    Spelled out, because TensorRT fuses it so and only so. Tokens are [B, N, H·D]; `heads` is [0, 0, H, D], `joined`
    [0, 0, H·D] and `scale` 1/√D.
    """
    inputs = ", ".join(["q", "k", "v", *([mask] if mask else []), "q_scale", "k_scale", "v_scale"])
    lines = [
        "[heads] heads = Constant <value_ints: ints = @heads> ()",
        "[joined] joined = Constant <value_ints: ints = @joined> ()",
        "[root] root = Constant <value_float: float = @scale> ()",
        "[root_like] root_like = CastLike(root, q)",
        "[share] share = Constant <value_float = 0.00223214286> ()",
        "[share_like] share_like = CastLike(share, q)",
        *(f"[{x}_heads] {x}_heads = Reshape({x}, heads)" for x in "qkv"),
        *(f"[{x}_by_head] {x}_by_head = Transpose <perm = [0, 2, 1, 3]> ({x}_heads)" for x in "qkv"),
        "[q_scaled] q_scaled = Mul(q_by_head, root_like)",
        *_through_fp8("q_scaled", "q_scale", "q_fp8"),
        *_through_fp8("k_by_head", "k_scale", "k_fp8"),
        *_through_fp8("v_by_head", "v_scale", "v_fp8"),
        "[k_turned] k_turned = Transpose <perm = [0, 1, 3, 2]> (k_fp8)",
        "[scores] scores = MatMul(q_fp8, k_turned)",
        *([f"[masked] masked = Add(scores, {mask})"] if mask else []),
        f"[softmax] shares = Softmax <axis = -1> ({'masked' if mask else 'scores'})",
        *_through_fp8("shares", "share_like", "shares_fp8"),
        "[attended] attended = MatMul(shares_fp8, v_fp8)",
        "[by_token] by_token = Transpose <perm = [0, 2, 1, 3]> (attended)",
        "[tokens] y = Reshape(by_token, joined)",
    ]
    return f"<heads, joined, scale>({inputs}) => (y) {{\n" + "\n".join(lines) + "\n}"


def _through_fp8(x: str, scale: str, out: str) -> tuple[str, str]:
    return (
        f"[{out}_quantize] {out}_coded = QuantizeLinear <output_dtype = 17> ({x}, {scale})",
        f"[{out}_dequantize] {out} = DequantizeLinear({out}_coded, {scale})",
    )


_DEFINITIONS |= {"MMDiTFP8Attention": _fp8_attention(), "MMDiTFP8MaskedAttention": _fp8_attention("mask")}
NAMED_FUNCTIONS = tuple(_DEFINITIONS)
SILU, SWIGLU, MODULATE, GATED_RESIDUAL, FP8_ATTENTION, FP8_MASKED_ATTENTION = NAMED_FUNCTIONS
FP8_ATTENTIONS = (FP8_ATTENTION, FP8_MASKED_ATTENTION)

_Scope = ir.Graph | ir.Function
_Key = tuple[str, str, str]  # domain, name and overload of a function
Functions = Mapping[_Key, ir.Function]


@functools.cache
def definition(name: str) -> ir.Function:
    """What one of `NAMED_FUNCTIONS` computes. Not to be changed: clone it."""
    header = f'<domain: "{DOMAIN}", opset_import: ["": 23]>\n'
    return ir.serde.deserialize_function(onnx.parser.parse_function(f"{header}{name} {_DEFINITIONS[name]}"))


def is_named_function(function: ir.Function) -> bool:
    """Whether it is one of ours."""
    return function.identifier() in _KEYS


def define(model: ir.Model) -> int:
    """Define every named function that is called, in the model's own opset, and drop those that are not.

    Definitions come first: they call nothing, and some readers want a function before its callers.

    Returns:
        How many were added.
    """
    called = {key for scope in _scopes(model) for key in _called(scope)}
    there = {key: function for key, function in model.functions.items() if key in _KEYS & called}
    missing = [key for key in _KEYS_IN_ORDER if key in called and key not in there]
    for key in missing:
        there[key] = definition(key[1]).clone()
        there[key].opset_imports[""] = model.opset_imports.get("", 23)
    put_first(model, there, {key: f for key, f in model.functions.items() if key not in _KEYS})
    for scope in _scopes(model):
        if not _KEYS.isdisjoint(_called(scope)):
            scope.opset_imports.setdefault(DOMAIN, 1)
    return len(missing)


def put_first(model: ir.Model, first: Functions, rest: Functions) -> None:
    """Let a model have these functions, in this order."""
    functions = {**first, **rest}
    model.functions.clear()
    model.functions.update(functions)


def make_way(model: ir.Model) -> int:
    """Rename functions of other people, or of another version of ours, that have a name of ours in any domain.

    A local function's name is no part of a model's interface, and what it computes stays as it is.

    Returns:
        How many were renamed.
    """
    taken = {function.name for function in model.functions.values()} | set(NAMED_FUNCTIONS)
    others = [f for f in model.functions.values() if f.name in NAMED_FUNCTIONS and not _is_ours(f)]
    for function in others:
        before = function.identifier()
        name = next(n for i in itertools.count(2) if (n := f"{function.name}_{i}") not in taken)
        taken.add(name)
        for scope in _scopes(model):
            for node in scope.all_nodes():
                if node.op_identifier() == before:
                    node.op_type = name
        function.name = name
    put_first(model, {}, {f.identifier(): f for f in model.functions.values()})
    return len(others)


_KEYS_IN_ORDER: tuple[_Key, ...] = tuple((DOMAIN, name, "") for name in NAMED_FUNCTIONS)
_KEYS = frozenset(_KEYS_IN_ORDER)


def _scopes(model: ir.Model) -> Iterator[_Scope]:
    yield model.graph
    yield from model.functions.values()


def _called(scope: _Scope) -> set[_Key]:
    return {node.op_identifier() for node in scope.all_nodes()}


def _is_ours(function: ir.Function) -> bool:
    return is_named_function(function) and _structure(function) == _structure(definition(function.name))


def _structure(function: ir.Function) -> list[object]:
    """What a function computes, whatever its values and nodes are called."""
    numbers: dict[ir.Value | None, int] = {None: -1}

    def number(value: ir.Value | None) -> int:
        return numbers.setdefault(value, len(numbers))

    inputs = [number(value) for value in function.inputs]
    nodes = [
        (
            node.op_identifier(),
            [number(value) for value in node.inputs],
            [number(value) for value in node.outputs],
            {name: (a.type, a.value) for name, a in node.attributes.items()},
        )
        for node in function
    ]
    return [inputs, nodes, [number(value) for value in function.outputs]]
