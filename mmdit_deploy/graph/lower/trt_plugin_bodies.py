"""What plugin nodes compute, as local functions in ops of opset 17: for runtimes without the plugins.

    MMDiTRMSNormPlugin(x, w)   ⇒   the same node, and a function of its name

The nodes stay as they are, so that what is run and judged here is what TensorRT gets. Numbers come from the nodes'
attributes; where an attribute says how a body is built there is a body for each, and where a graph has more than one of
them, overloads of the function tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx.parser
import onnx_ir as ir

from mmdit_deploy.graph.lower.decomposed_opset import OPSET, OVERLOADS
from mmdit_deploy.graph.lower.trt_plugin_contract import (
    ADALN,
    ATTENTION,
    PLUGIN_DOMAIN,
    PLUGINS,
    RMS_NORM,
    ROPE,
    Plugin,
)
from mmdit_deploy.graph.named_functions import put_first
from mmdit_deploy.graph.passes import Pass

# Attributes that say how a body is built.
_BUILT_BY = {ATTENTION.name: ("layout", "has_mask"), ROPE.name: ("layout", "interleaved")}
_Variant = tuple[str | int, ...]

_INTS = """
    none = Constant<value_ints = [0]>()
    one = Constant<value_ints = [1]>()
    two = Constant<value_ints = [2]>()
    last = Constant<value_ints = [-1]>()
    tokens = Constant<value_ints = [0, 0]>()
    merged = Constant<value_ints = [0, 0, -1]>()
    all = Constant<value_ints = [9223372036854775807]>()
"""


def _attention(layout: str, has_mask: int) -> str:
    split = "\n".join(
        f"""{x}_shape = Concat<axis = 0>(tokens, {heads}, last)
            {x}_split = Reshape({x}, {x}_shape)
            {x}_heads = Transpose<perm = [0, 2, 1, 3]>({x}_split)"""
        if layout == "BNC"
        else f"{x}_heads = Identity({x})"
        for x, heads in (("q", "h"), ("k", "h_kv"), ("v", "h_kv"))
    )
    repeated = "\n".join(
        f"""{x}_groups = Unsqueeze({x}_heads, two)
            {x}_wide = Expand({x}_groups, repeats)
            {x}_all = Reshape({x}_wide, repeated)"""
        for x in ("k", "v")
    )
    masked = "masked = Add(scores, mask)" if has_mask else "masked = Identity(scores)"
    guarded = """
        empty = IsNaN(softmax)
        zero = Constant<value_float = 0.0>()
        nothing = CastLike(zero, softmax)
        probabilities = Where(empty, nothing, softmax)
    """ if has_mask else "probabilities = Identity(softmax)"  # fmt: skip
    merged = """
        attended_tokens = Transpose<perm = [0, 2, 1, 3]>(attended)
        y = Reshape(attended_tokens, merged)
    """ if layout == "BNC" else "y = Identity(attended)"  # fmt: skip
    return f"""({"q, k, v, mask" if has_mask else "q, k, v"}) => (y) {{
        {_INTS}
        {_list("h", "num_heads")}
        {_list("h_kv", "kv_num_heads")}
        {_list("d", "head_size")}
        {split}
        group = Div(h, h_kv)
        repeats = Concat<axis = 0>(one, one, group, one, one)
        repeated = Concat<axis = 0>(none, h, last, d)
        {repeated}
        scale = Constant<value_float: float = @scale>()
        factor = CastLike(scale, q)
        scaled = Mul(q_heads, factor)
        turned = Transpose<perm = [0, 1, 3, 2]>(k_all)
        scores = MatMul(scaled, turned)
        {masked}
        exact = Cast<to: int = @softmax_type>(masked)
        softmax = Softmax<axis = -1>(exact)
        {guarded}
        weights = CastLike(probabilities, q)
        attended = MatMul(weights, v_all)
        {merged}
    }}"""


def _rope(layout: str, interleaved: int) -> str:
    split = """
        shape = Concat<axis = 0>(tokens, h, last)
        whole = Reshape(x, shape)
    """ if layout == "BNC" else "whole = Identity(x)"  # fmt: skip
    pairs = """
        a = Slice(part, none, r, last, two)
        b = Slice(part, one, r, last, two)
    """ if interleaved else """
        half = Div(r, two)
        a = Slice(part, none, half, last)
        b = Slice(part, half, r, last)
    """  # fmt: skip
    joined = """
        a_column = Unsqueeze(a_turned, last)
        b_column = Unsqueeze(b_turned, last)
        columns = Concat<axis = -1>(a_column, b_column)
        four = Constant<value_ints = [0, 0, 0, -1]>()
        turned = Reshape(columns, four)
    """ if interleaved else "turned = Concat<axis = -1>(a_turned, b_turned)"  # fmt: skip
    return f"""(x, cos, sin) => (y) {{
        {_INTS}
        {_list("h", "num_heads")}
        {_list("r", "rotary_embedding_dim")}
        {split}
        axis_of_heads = Identity({"two" if layout == "BNC" else "one"})
        c = Unsqueeze(cos, axis_of_heads)
        s = Unsqueeze(sin, axis_of_heads)
        part = Slice(whole, none, r, last)
        rest = Slice(whole, r, all, last)
        {pairs}
        ac = Mul(a, c)
        bs = Mul(b, s)
        a_turned = Sub(ac, bs)
        bc = Mul(b, c)
        as = Mul(a, s)
        b_turned = Add(bc, as)
        {joined}
        result = Concat<axis = -1>(turned, rest)
        y = {"Reshape(result, merged)" if layout == "BNC" else "Identity(result)"}
    }}"""


def _rms_norm() -> str:
    return """(x, weight) => (y) {
        wide = Cast<to: int = @stash_type>(x)
        square = Mul(wide, wide)
        mean = ReduceMean<axes = [-1], keepdims = 1>(square)
        epsilon = Constant<value_float: float = @epsilon>()
        small = CastLike(epsilon, mean)
        sum = Add(mean, small)
        root = Sqrt(sum)
        quotient = Div(wide, root)
        normed = CastLike(quotient, x)
        y = Mul(normed, weight)
    }"""


def _adaln() -> str:
    return """(x, scale, shift) => (y) {
        channels = Shape<start = -1>(x)
        float_ones = ConstantOfShape<value = float[1] {1.0}>(channels)
        ones = CastLike(float_ones, x)
        normed = LayerNormalization
            <axis: int = @axis, epsilon: float = @epsilon, stash_type: int = @stash_type>(x, ones)
        one = Constant<value_float = 1.0>()
        one_like = CastLike(one, scale)
        factor = Add(scale, one_like)
        scaled = Mul(normed, factor)
        y = Add(scaled, shift)
    }"""


_BODIES: Mapping[str, Callable[..., str]] = {
    ATTENTION.name: _attention,
    ROPE.name: _rope,
    RMS_NORM.name: _rms_norm,
    ADALN.name: _adaln,
}


def _list(name: str, attribute: str) -> str:
    """A list of one number that is an attribute."""
    return f"""{name}_number = Constant<value_int: int = @{attribute}>()
        {name} = Unsqueeze({name}_number, none)"""


def body(plugin: Plugin, variant: _Variant) -> ir.Function:
    """The function of a plugin, in one of its variants."""
    names = ", ".join([*(field.name for field in plugin.fields), "plugin_version", "plugin_namespace"])
    text = f"""<domain: "{PLUGIN_DOMAIN}", opset_import: ["": {OPSET}]>
        {plugin.name} <{names}> {_BODIES[plugin.name](*variant)}"""
    function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    for out in (node.outputs[0] for node in function):
        constant = ir.convenience.get_const_tensor(out)
        if constant is not None:
            out.type, out.shape = ir.TensorType(constant.dtype), ir.Shape(constant.shape.numpy())
    for node in list(function)[::-1]:  # numbers that this variant has no use for
        if not any(out.uses() for out in node.outputs) and not any(out in function.outputs for out in node.outputs):
            function.remove(node)
    return function


def _add_bodies(model: ir.Model) -> int:
    scopes: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    nodes = [n for scope in scopes for n in scope.all_nodes() if n.domain == PLUGIN_DOMAIN and n.op_type in PLUGINS]
    if all(node.op_identifier() in model.functions for node in nodes):
        return 0
    variants: dict[str, list[_Variant]] = {}
    for node in nodes:
        known = variants.setdefault(node.op_type, [])
        if _variant(node) not in known:
            known.append(_variant(node))
    functions = {}
    for node in nodes:
        one_of_many = len(variants[node.op_type]) > 1
        node.overload = "_".join(str(part) for part in _variant(node)) if one_of_many else ""
        if node.op_identifier() not in functions:
            function = body(PLUGINS[node.op_type], _variant(node))
            function.overload = node.overload
            functions[node.op_identifier()] = function
    put_first(model, functions, dict(model.functions))
    model.graph.opset_imports[PLUGIN_DOMAIN] = 1
    if any(function.overload for function in functions.values()):
        model.ir_version = max(model.ir_version, OVERLOADS)
    return len(functions)


def _variant(node: ir.Node) -> _Variant:
    return tuple(node.attributes[name].value for name in _BUILT_BY.get(node.op_type, ()))


plugin_bodies: Pass = Pass("plugin bodies", _add_bodies)
