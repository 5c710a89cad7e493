"""What changed in ONNX's ops from opset 17 to 23, and how a node written after a change says the same before it.

    ReduceMean(x, Constant [1])   ⇒   ReduceMean<axes = [1]>(x)
    Mish(x)                       ⇒   x · Tanh(Softplus(x))

The way back of `mmdit_deploy.graph.fuse.opset_changes`, and like it one node at a time: functions stay functions, and
no weight is read. What was only added (types, inputs, attributes) is no change here: that nothing of it is used is
checked against ONNX's schemas; a test holds the table against them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from mmdit_deploy.graph.fuse.opset_changes import CannotConvert
from mmdit_deploy.graph.lower.decomposed_nodes import Replacement

Change = Callable[[ir.Node], None]
_SMALL = 64  # elements: axes and paddings


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _known(node: ir.Node, index: int, what: str) -> list[int]:
    value = _input(node, index)
    tensor = None if value is None or value.is_graph_input() else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size > _SMALL:
        raise CannotConvert(f"its {what} are computed, and were constants")
    return [int(i) for i in tensor.numpy().reshape(-1)]


def _of_function(value: ir.Value) -> str | None:
    """The attribute of the function around it that a list is."""
    node = value.producer()
    given = node.attributes.get("value_ints") if node is not None and node.op_type == "Constant" else None
    return given.ref_attr_name if given is not None and given.is_ref() else None


def _without_inputs_from(node: ir.Node, index: int) -> None:
    if len(node.inputs) > index:
        node.resize_inputs(index)


def _axes_to_attribute(node: ir.Node) -> None:
    """No axes are all of them, or with `noop_with_empty_axes` none."""
    value, noop = _input(node, 1), node.attributes.pop("noop_with_empty_axes", None)
    name = None if value is None else _of_function(value)
    axes = [] if value is None or name is not None else _known(node, 1, "axes")
    if not axes and name is None and noop is not None and (noop.is_ref() or noop.as_int()):
        raise CannotConvert("it is over no axes")
    if name is not None:
        node.attributes["axes"] = ir.RefAttr("axes", name, ir.AttributeType.INTS)
    elif axes:
        node.attributes["axes"] = ir.AttrInt64s("axes", axes)
    _without_inputs_from(node, 1)


def _axis_to_attribute(node: ir.Node) -> None:
    axis = _known(node, 2, "axes")[0] if _input(node, 2) is not None else -2
    node.attributes["axis"] = ir.AttrInt64("axis", axis)
    _without_inputs_from(node, 2)


def _sizes_of_parts(node: ir.Node) -> None:
    """As many parts as there are outputs, of which the last is smaller where the axis does not divide evenly."""
    parts = node.attributes.pop("num_outputs", None)
    if parts is None or _input(node, 1) is not None:
        return
    count, axis, x = len(node.outputs), node.attributes.get_int("axis", 0), node.inputs[0]
    assert x is not None
    size = x.shape[axis] if x.shape is not None else None
    if isinstance(size, int) and size % count == 0:
        return
    new = Replacement(node)
    if isinstance(size, int):
        part = -(-size // count)
        sizes = new.ints(*[part] * (count - 1), size - part * (count - 1))
    else:
        whole = new("Gather", new("Shape", x, dtype=ir.DataType.INT64), new.ints(axis), axis=0)
        rounded = new("Add", whole, new.ints(count - 1))
        part_ = new("Div", rounded, new.ints(count))
        last = new("Sub", whole, new("Mul", part_, new.ints(count - 1)))
        sizes = new("Concat", *[part_] * (count - 1), last, axis=0)
    node.resize_inputs(2)
    node.replace_input_with(1, sizes)


def _pads_of_all_axes(node: ir.Node) -> None:
    if _input(node, 3) is not None:
        axes, pads, x = _known(node, 3, "axes"), _known(node, 1, "paddings"), node.inputs[0]
        if x is None or x.shape is None:
            raise CannotConvert("its rank is not known")
        rank = len(x.shape)
        all_pads = [0] * (2 * rank)
        for i, axis in enumerate(axes):
            all_pads[axis % rank], all_pads[rank + axis % rank] = pads[i], pads[len(axes) + i]
        node.replace_input_with(1, Replacement(node).ints(*all_pads))
    _without_inputs_from(node, 3)


def _only_all_axes(node: ir.Node) -> None:
    axes = node.attributes.pop("axes", None)
    x = node.inputs[0]
    rank = None if x is None or x.shape is None else len(x.shape)
    if axes is not None and (axes.is_ref() or rank is None or list(axes.as_ints()) != list(range(rank))):
        raise CannotConvert("it names axes")


def _drop(attribute: str, *harmless: Any) -> Change:
    """An attribute without effect: whatever it is, or where it is one of these."""

    def change(node: ir.Node) -> None:
        old = node.attributes.pop(attribute, None)
        if old is not None and harmless and (old.is_ref() or old.value not in harmless):
            raise CannotConvert(f"its {attribute} is {'a parameter' if old.is_ref() else old.value}")

    return change


def _drop_ones(attribute: str) -> Change:
    def change(node: ir.Node) -> None:
        old = node.attributes.pop(attribute, None)
        if old is not None and (old.is_ref() or set(old.as_ints()) > {1}):
            raise CannotConvert(f"it has {attribute}")

    return change


def _refuse_value(attribute: str, *values: str) -> Change:
    def change(node: ir.Node) -> None:
        old = node.attributes.get(attribute)
        if old is not None and (old.is_ref() or old.as_string() in values):
            raise CannotConvert(f"its {attribute} is {'a parameter' if old.is_ref() else old.as_string()}")

    return change


def _rename_values(attribute: str, names: Mapping[str, str]) -> Change:
    def change(node: ir.Node) -> None:
        old = node.attributes.get(attribute)
        if old is not None and not old.is_ref() and old.as_string() in names:
            node.attributes[attribute] = ir.AttrString(attribute, names[old.as_string()])

    return change


def _only_images(node: ir.Node) -> None:
    x = node.inputs[0]
    if x is None or x.shape is None or len(x.shape) != 4:
        raise CannotConvert("it is not known to be over images")


def _group_norm(node: ir.Node) -> None:
    """Each group as one channel of an instance norm, then a factor and a summand for each channel."""
    x, scale, bias = node.inputs[:3]
    groups, epsilon = node.attributes.get_int("num_groups", 0), node.attributes.get_float("epsilon", 1e-5)
    if x is None or x.shape is None or x.dtype is None or not groups:
        raise CannotConvert("its axes, or its type, are not known")
    new = Replacement(node)
    wide = new.cast(x, ir.DataType(node.attributes.get_int("stash_type", ir.DataType.FLOAT)))
    assert wide.dtype is not None and scale is not None and bias is not None
    ones, zeros = (
        new("Constant", value=ir.tensor([number] * groups, dtype=wide.dtype), dtype=wide.dtype) for number in (1.0, 0.0)
    )
    normed = new("InstanceNormalization", new.reshape(wide, 0, groups, -1), ones, zeros, epsilon=epsilon)
    back = new.cast(new("Reshape", normed, new("Shape", x, dtype=ir.DataType.INT64)), x.dtype)
    column = [-1, *[1] * (len(x.shape) - 2)]
    factor, summand = (new.reshape(value, *column) for value in (scale, bias))
    new.done(new("Add", new("Mul", back, factor), summand))


def _mish(node: ir.Node) -> None:
    """Misra 2019, arXiv:1908.08681"""
    x = node.inputs[0]
    assert x is not None
    new = Replacement(node)
    new.done(new("Mul", x, new("Tanh", new("Softplus", x))))


def _all(*changes: Change) -> Change:
    def change(node: ir.Node) -> None:
        for each in changes:
            each(node)

    return change


_REDUCE: Sequence[str] = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
_ONLY_FP8 = _drop("saturate")  # what becomes of numbers out of range
_NO_BLOCKS = _all(_ONLY_FP8, _drop("block_size", 0), _drop("output_dtype", 0), _drop("precision", 0))

# By op: what undoes all of its changes.
CHANGES: Mapping[str, Change] = {f"Reduce{how}": _axes_to_attribute for how in _REDUCE} | {
    "AveragePool": _drop_ones("dilations"),
    "Cast": _ONLY_FP8,
    "CastLike": _ONLY_FP8,
    "DFT": _axis_to_attribute,
    "DequantizeLinear": _NO_BLOCKS,
    "GridSample": _all(_only_images, _rename_values("mode", {"linear": "bilinear", "cubic": "bicubic"})),
    "GroupNormalization": _group_norm,
    "LpPool": _all(_drop("ceil_mode", 0), _drop_ones("dilations")),
    "Mish": _mish,
    "Pad": _all(_refuse_value("mode", "wrap"), _pads_of_all_axes),
    "QuantizeLinear": _NO_BLOCKS,
    "Resize": _all(
        _only_all_axes,
        _drop("antialias", 0),
        _drop("keep_aspect_ratio_policy", "stretch"),
        _refuse_value("coordinate_transformation_mode", "half_pixel_symmetric"),
    ),
    "ScatterElements": _refuse_value("reduction", "max", "min"),
    "ScatterND": _refuse_value("reduction", "max", "min"),
    "Split": _sizes_of_parts,
}

# Ops that take and give the same type, and took only fp32 for some of those that they take now.
IN_FLOAT = frozenset(
    "Acos Acosh Asin Asinh Atan Atanh Cos Cosh Elu HardSigmoid HardSwish IsInf Round Selu Sin Sinh Softplus Softsign "
    "Tan ThresholdedRelu".split()
)


def in_float(node: ir.Node) -> None:
    """Compute a node in fp32: op(x) ⇒ Cast(op(Cast(x)))."""
    (x,) = node.inputs
    assert x is not None and x.dtype is not None
    new = Replacement(node)
    wide = new.cast(x, ir.DataType.FLOAT)
    attributes = {name: a.value for name, a in node.attributes.items()}
    asks = node.op_type == "IsInf"
    made = new(node.op_type, wide, dtype=ir.DataType.BOOL if asks else None, **attributes)
    new.done(made if asks else new.cast(made, x.dtype))
