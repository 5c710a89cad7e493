"""Plugin nodes for TensorRT before 10.14, which has no op for attention, RMSNorm and RoPE.

    Attention(q, k, v, mask)                                   ⇒   MMDiTAttentionPlugin(q, k, v, mask)
    RMSNormalization(x, w)                                     ⇒   MMDiTRMSNormPlugin(x, w)
    RotaryEmbedding(x, cos, sin, at)                           ⇒   MMDiTRoPEPlugin(x, cos[at], sin[at])
    MMDiTModulate(LayerNormalization(x, ones), scale, shift)   ⇒   MMDiTAdaLNPlugin(x, scale, shift)

What each gets and computes is the contract of `trt_plugin_contract`. What does not fit it is spelled out like the rest
of the graph, in opset 17, which TensorRT 9.0 to 10.13 parse with its local functions.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter._basics import MatchFailureError
from onnxscript.rewriter.pattern import MatchResult, RewriteRule, RewriteRuleClassBase

from mmdit_deploy.graph.lower.decomposed import DECOMPOSED
from mmdit_deploy.graph.lower.decomposed_opset import OPSET
from mmdit_deploy.graph.lower.mask_of_keys import mask_of_keys
from mmdit_deploy.graph.lower.trt_plugin_contract import (
    ADALN,
    ATTENTION,
    PLUGIN_DOMAIN,
    PLUGINS,
    RMS_NORM,
    ROPE,
    Plain,
    Plugin,
)
from mmdit_deploy.graph.named_functions import DOMAIN
from mmdit_deploy.graph.passes import Pass, like, rule_pass

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_MOST_CHANNELS = 65536
_Values = Mapping[str, ir.Value]  # of a pattern


class _ToPlugin(RewriteRuleClassBase):
    """A rule that is its plugin: `fields` fails, and says why, where the plugin does not compute a node."""

    plugin: Plugin

    def __init__(self) -> None:
        super().__init__(remove_nodes=False)  # one norm may be modulated twice

    @abc.abstractmethod
    def fields(self, node: ir.Node, values: _Values) -> dict[str, Plain]:
        """The plugin's fields, from a node and the values of the pattern."""

    def inputs(self, op: Any, node: ir.Node, values: _Values) -> Sequence[ir.Value]:
        """The plugin's inputs."""
        return [values[tensor.name] for tensor in self.plugin.inputs]

    def check(self, op: Any, done: ir.Value, **values: ir.Value) -> MatchResult:
        node = done.producer()
        assert node is not None
        self.fields(node, values)
        return MatchResult()

    def rewrite(self, op: Any, done: ir.Value, **values: ir.Value) -> ir.Value:
        node = done.producer()
        assert node is not None
        attributes = self.plugin.attributes(**self.fields(node, values))
        made: ir.Value = getattr(op, self.plugin.name)(
            *self.inputs(op, node, values), _domain=PLUGIN_DOMAIN, _version=1, **attributes
        )
        made.type, made.shape = done.type, done.shape
        call = made.producer()
        assert call is not None
        call.name = node.name
        return made


class _Attention(_ToPlugin):
    plugin = ATTENTION

    def pattern(self, op: Any, q: Any, k: Any, v: Any) -> Any:
        return op.Attention(q, k, v, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["done"])

    def fields(self, node: ir.Node, values: _Values) -> dict[str, Plain]:
        q, k, v, mask = values["q"], values["k"], values["v"], _input(node, 3)
        dtype = _same_type(q, k, v)
        if any(value is not None for value in node.inputs[4:]):
            raise MatchFailureError("it reads keys of earlier calls", node)
        if _int(node, "is_causal") or _float(node, "softcap"):
            raise MatchFailureError("causal or soft-capped", node)
        if mask is not None and mask.dtype not in (dtype, ir.DataType.BOOL):
            raise MatchFailureError("the mask is neither bool nor of the type of Q", mask)
        layout, heads, size = _layout(q, _int(node, "q_num_heads"))
        of_k, of_v = (_layout(x, _int(node, "kv_num_heads")) for x in (k, v))
        if of_k != of_v or of_k[2] != size:
            raise MatchFailureError("heads of V are unlike those of Q and K", v)
        return {
            "num_heads": heads,
            "kv_num_heads": of_k[1],
            "head_size": size,
            "scale": _float(node, "scale") or 1 / math.sqrt(size),
            "has_mask": int(mask is not None),
            "softmax_type": _int(node, "softmax_precision") or int(dtype),
            "layout": layout,
        }

    def inputs(self, op: Any, node: ir.Node, values: _Values) -> Sequence[ir.Value]:
        q, mask = values["q"], _input(node, 3)
        masks = [] if mask is None else [_added(op, mask, q)]
        return [q, values["k"], values["v"], *masks]


class _RMSNorm(_ToPlugin):
    plugin = RMS_NORM

    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        return op.RMSNormalization(x, weight, _allow_other_attributes=True, _outputs=["done"])

    def fields(self, node: ir.Node, values: _Values) -> dict[str, Plain]:
        x, weight = values["x"], values["weight"]
        _same_type(x, weight)
        if x.shape is None or not 2 <= len(x.shape) <= 4:
            raise MatchFailureError("its axes are not known, or are more than 4", x)
        if weight.shape is None or list(weight.shape) != [x.shape[-1]]:
            raise MatchFailureError("the weight is not one factor for each channel", weight)
        return _norm_fields(node, x)


class _RoPE(_ToPlugin):
    plugin = ROPE

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any) -> Any:
        return op.RotaryEmbedding(
            x, cos, sin, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["done"]
        )

    def fields(self, node: ir.Node, values: _Values) -> dict[str, Plain]:
        _same_type(values["x"], values["cos"], values["sin"])
        layout, heads, size = _layout(values["x"], _int(node, "num_heads"))
        return {
            "num_heads": heads,
            "head_size": size,
            "rotary_embedding_dim": _int(node, "rotary_embedding_dim") or size,
            "interleaved": _int(node, "interleaved"),
            "layout": layout,
        }

    def inputs(self, op: Any, node: ir.Node, values: _Values) -> Sequence[ir.Value]:
        x, waves, positions = values["x"], (values["cos"], values["sin"]), _input(node, 3)
        if positions is None:
            return [x, *waves]
        dims = [*(positions.shape or (None, None)), *(waves[0].shape or (None,))[-1:]]
        return [x, *(like(op.Gather(wave, positions, axis=0), wave, dims) for wave in waves)]


class _AdaLN(_ToPlugin):
    plugin = ADALN

    def pattern(self, op: Any, x: Any, ones: Any, scale: Any, shift: Any) -> Any:
        normed = op.LayerNormalization(
            x, ones, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["normed"]
        )
        return op.MMDiTModulate(normed, scale, shift, _domain=DOMAIN, _outputs=["done"])

    def fields(self, node: ir.Node, values: _Values) -> dict[str, Plain]:
        x, ones, norm = values["x"], values["ones"], values["normed"].producer()
        assert norm is not None
        _same_type(x, values["scale"], values["shift"])
        bias = _input(norm, 2)
        if not _are_all(1, ones) or (bias is not None and not _are_all(0, bias)):
            raise MatchFailureError("the norm has a weight of its own", norm)
        if x.shape is None or len(x.shape) != 3:
            raise MatchFailureError("its axes are not (B, N, C)", x)
        for value in (values["scale"], values["shift"]):
            if value.shape is None or list(value.shape) not in ([x.shape[0], 1, x.shape[2]], list(x.shape)):
                raise MatchFailureError("not one vector per sample, or token", value)
        return _norm_fields(norm, x)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _same_type(first: ir.Value, *others: ir.Value) -> ir.DataType:
    if first.dtype not in _TYPES:
        raise MatchFailureError("its type is not known, or none that a plugin computes in", first)
    for other in others:
        if other.dtype != first.dtype:
            raise MatchFailureError("its inputs are not of one type", other)
    return first.dtype


def _layout(x: ir.Value, heads: int) -> tuple[str, int, int]:
    """The layout, the number of heads, and their size."""
    dims = list(x.shape) if x.shape is not None else []
    width = dims[-1] if dims else None
    if isinstance(width, int):
        if len(dims) == 3 and heads and width % heads == 0:
            return "BNC", heads, width // heads
        if len(dims) == 4 and isinstance(dims[1], int):
            return "BHND", dims[1], width
    raise MatchFailureError("its heads are not known", x)


def _norm_fields(norm: ir.Node, x: ir.Value) -> dict[str, Plain]:
    rank = len(x.shape) if x.shape is not None else 0
    if _int(norm, "axis", -1) not in (-1, rank - 1):
        raise MatchFailureError("it is over more than the last axis", norm)
    return {
        "axis": -1,
        "epsilon": _float(norm, "epsilon", 1e-5),
        "stash_type": _int(norm, "stash_type", int(ir.DataType.FLOAT)),
    }


def _int(node: ir.Node, name: str, default: int = 0) -> int:
    return int(_own(node, name, default))


def _float(node: ir.Node, name: str, default: float = 0.0) -> float:
    return float(_own(node, name, default))


def _own(node: ir.Node, name: str, default: Any) -> Any:
    attribute = node.attributes.get(name)
    if attribute is not None and attribute.is_ref():
        raise MatchFailureError(f"its {name} is given by each call of the function around it", node)
    return default if attribute is None else attribute.value


def _added(op: Any, mask: ir.Value, q: ir.Value) -> ir.Value:
    """A mask that is added: 0 where a bool one says true, and -inf elsewhere."""
    if mask.dtype != ir.DataType.BOOL:
        return mask
    zero, never = (op.Constant(value=ir.tensor(number, dtype=q.dtype)) for number in (0.0, -math.inf))
    return like(op.Where(mask, zero, never), q, list(mask.shape or ()))


def _are_all(number: int, value: ir.Value) -> bool:
    """Whether a norm's weight, or bias, is none. What lies in another file is not looked at."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size > _MOST_CHANNELS:
        return False
    return bool(np.all(tensor.numpy() == number))


def _plugin_pass(name: str, rule: RewriteRule) -> Pass:
    rules = rule_pass(name, rule)

    def apply(model: ir.Model) -> int:
        scopes: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
        new = [scope for scope in scopes if PLUGIN_DOMAIN not in scope.opset_imports]
        for scope in new:
            scope.opset_imports[PLUGIN_DOMAIN] = 1
        count = rules.apply(model)
        for scope in new:
            if not any(node.domain == PLUGIN_DOMAIN for node in scope.all_nodes()):
                del scope.opset_imports[PLUGIN_DOMAIN]
        return count

    return Pass(name, apply, rules.left)


def _drop_bodies(model: ir.Model) -> int:
    """TensorRT would take a body instead of the plugin.

    Bodies of our own second file come here in the opset of rules; one in opset 17 was written by this dialect.
    """
    of_plugins = [key for key in model.functions if key[0] == PLUGIN_DOMAIN and key[1] in PLUGINS]
    read = [key for key in of_plugins if model.functions[key].opset_imports.get("") != OPSET]
    for key in read:
        del model.functions[key]
    scopes: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for scope in scopes:
        for node in scope.all_nodes():
            if node.op_identifier() in read:
                node.overload = ""
    return len(read)


PLUGIN_PASSES: tuple[Pass, ...] = (
    Pass("plugin bodies dropped", _drop_bodies),
    _plugin_pass("attention plugin", _Attention.rule()),
    _plugin_pass("RMS norm plugin", _RMSNorm.rule()),
    _plugin_pass("RoPE plugin", _RoPE.rule()),
    _plugin_pass("AdaLN plugin", _AdaLN.rule()),
)
TRT_PLUGIN: tuple[Pass, ...] = (mask_of_keys, *PLUGIN_PASSES, *DECOMPOSED)

__all__ = ["PLUGIN_PASSES", "TRT_PLUGIN"]
