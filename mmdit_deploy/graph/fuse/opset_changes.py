"""What changed in ONNX's ops between opset 7 and 23, and how a node written before a change says the same after it.

    Squeeze<axes = [1]>(x)   ⇒   Squeeze(x, Constant [1])
    Softmax(x), before 13    ⇒   Reshape(Softmax<axis = -1>(Flatten<axis = 1>(x)), Shape(x))

ONNX's own converter does this for whole models only: it serializes them, weights and all, and drops their functions;
onnxscript's inlines the functions, and from below opset 18 calls ONNX's. A change here sees one node, so it works in
functions, branches and loop bodies alike, and reads no weight.

Most ops only gained types, optional inputs or attributes, and stay as they are. What is listed is the rest; a test
holds the table against ONNX's schemas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

Change = Callable[[ir.Node], None]


class CannotConvert(Exception):
    """Why a node has no equal in the newer opset."""


def _before(node: ir.Node, op: str, inputs: list[ir.Value | None], suffix: str, **attributes: ir.Attr) -> ir.Value:
    """The output of a new node before another one, named after it."""
    new = ir.Node("", op, inputs, attributes=attributes.values())
    new.outputs[0].name = f"{node.outputs[0].name}.{suffix}"
    new.name = f"{node.name or node.outputs[0].name}.{suffix}"
    assert node.graph is not None
    node.graph.insert_before(node, new)
    return new.outputs[0]


def _constant(node: ir.Node, value: np.ndarray | list[int], suffix: str) -> ir.Value:
    tensor = ir.tensor(value if isinstance(value, np.ndarray) else np.array(value, dtype=np.int64))
    out = _before(node, "Constant", [], suffix, value=ir.AttrTensor("value", tensor))
    out.type, out.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.numpy().shape)
    return out


def _set_input(node: ir.Node, index: int, value: ir.Value | None) -> None:
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def _to_input(attribute: str, index: int) -> Change:
    """A list of ints that was an attribute, a function's own included, and is an input now."""

    def change(node: ir.Node) -> None:
        old = node.attributes.pop(attribute, None)
        if old is None:
            return
        if old.is_ref():
            assert old.ref_attr_name is not None
            ints = ir.RefAttr("value_ints", old.ref_attr_name, ir.AttributeType.INTS)
            value = _before(node, "Constant", [], attribute, value_ints=ints)
        else:
            value = _constant(node, list(old.as_ints()), attribute)
        _set_input(node, index, value)

    return change


def _number_to_input(attribute: str, index: int) -> Change:
    """A float that was an attribute, and is an input of the type of the first now."""

    def change(node: ir.Node) -> None:
        old = node.attributes.pop(attribute, None)
        if old is None:
            return
        x = node.inputs[0]
        if x is not None and x.dtype is not None and not old.is_ref():
            _set_input(node, index, _constant(node, np.array(old.as_float(), x.dtype.numpy()), attribute))
            return
        given = (
            ir.RefAttr("value_float", old.ref_attr_name, ir.AttributeType.FLOAT)
            if old.is_ref() and old.ref_attr_name is not None
            else ir.AttrFloat32("value_float", old.as_float())
        )
        number = _before(node, "Constant", [], f"{attribute}.float", value_float=given)
        _set_input(node, index, _before(node, "CastLike", [number, x], attribute))

    return change


def _int_to_input(attribute: str, index: int, *, default: int | None, scalar: bool) -> Change:
    def change(node: ir.Node) -> None:
        old = node.attributes.pop(attribute, None)
        if old is not None and old.is_ref():
            raise CannotConvert(f"{attribute} is an attribute of the function around it")
        value = default if old is None else old.as_int()
        if value is None:
            raise CannotConvert(f"it has no {attribute}")
        _set_input(node, index, _constant(node, np.array(value if scalar else [value], np.int64), attribute))

    return change


def _drop(attribute: str, *, only: int | None = None) -> Change:
    """An attribute without effect: whatever it is, or where it is what the newer op does anyway."""

    def change(node: ir.Node) -> None:
        old = node.attributes.pop(attribute, None)
        if old is not None and only is not None and (old.is_ref() or old.as_int() != only):
            raise CannotConvert(f"{attribute} is not {only}")

    return change


def _rename_op(name: str) -> Change:
    def change(node: ir.Node) -> None:
        node.op_type = name

    return change


def _set(attribute: str, value: str) -> Change:
    def change(node: ir.Node) -> None:
        node.attributes[attribute] = ir.AttrString(attribute, value)

    return change


def _rename_values(attribute: str, names: Mapping[str, str]) -> Change:
    def change(node: ir.Node) -> None:
        old = node.attributes.get(attribute)
        if old is not None and not old.is_ref() and old.as_string() in names:
            node.attributes[attribute] = ir.AttrString(attribute, names[old.as_string()])

    return change


def _flat_softmax(node: ir.Node) -> None:
    """Over all axes from `axis` on, taken as one. One that is the last is what the newer op means by it."""
    axis = node.attributes.get("axis") or ir.AttrInt64("axis", 1)
    x, out = node.inputs[0], node.outputs[0]
    rank = len(x.shape) if x is not None and x.shape is not None else None
    if not axis.is_ref() and axis.as_int() in (-1, None if rank is None else rank - 1):
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
        return
    shape = _before(node, "Shape", [x], "shape")
    _set_input(node, 0, _before(node, "Flatten", [x], "flat", axis=axis))
    node.attributes["axis"] = ir.AttrInt64("axis", -1)
    unflat = ir.Node("", "Reshape", [None, shape], name=f"{node.name or out.name}.unflat")
    result = unflat.outputs[0]
    result.type, result.shape = out.type, out.shape
    out.replace_all_uses_with(result, replace_graph_outputs=True)
    result.name, out.name, out.shape = out.name, f"{out.name}.flat.softmax", None
    unflat.replace_input_with(0, out)
    assert node.graph is not None
    node.graph.insert_after(node, unflat)


def _split_in_equal_parts(node: ir.Node) -> None:
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _no_float_mask(node: ir.Node) -> None:
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        raise CannotConvert("something reads its mask, which is of another type now")


def _scales_to_input(node: ir.Node) -> None:
    old = node.attributes.pop("scales", None)
    if old is None or old.is_ref():
        raise CannotConvert("it has no scales of its own")
    _set_input(node, 1, _constant(node, np.array(old.as_floats(), np.float32), "scales"))


def _upsample_to_resize(node: ir.Node) -> None:
    """(x, scales) ⇒ (x, no region, scales): from the corner, and the nearest below, as both once did."""
    scales = node.inputs[1]
    _set_input(node, 2, scales)
    _set_input(node, 1, None)
    node.op_type = "Resize"
    _set("coordinate_transformation_mode", "asymmetric")(node)
    _set("nearest_mode", "floor")(node)


def _only_enlarging(node: ir.Node) -> None:
    """Which pixel is the nearest when there are fewer of them, Resize-10 does not say."""
    mode, scales = node.attributes.get("mode"), node.inputs[1]
    if mode is not None and mode.as_string() != "nearest":
        return
    known = None if scales is None else ir.convenience.get_const_tensor(scales)
    if known is None or known.size > 8 or (known.numpy() < 1).any():
        raise CannotConvert("it may shrink, by scales that are not known to be 1 or more")


def _empty_inputs_are_none(node: ir.Node) -> None:
    """Opset 11 wanted a tensor for the region and for the scales, if only an empty one."""
    if (mode := node.attributes.get("coordinate_transformation_mode")) is not None:
        if mode.as_string() == "tf_half_pixel_for_nn":
            raise CannotConvert("tf_half_pixel_for_nn is no more")
    for index in (1, 2):
        value = node.inputs[index] if index < len(node.inputs) else None
        known = None if value is None else ir.convenience.get_const_tensor(value)
        if known is not None and known.size == 0:
            node.replace_input_with(index, None)


def _training_said(node: ir.Node) -> None:
    """More than one output used to mean training."""
    if len(node.outputs) == 1:
        return
    for out in node.outputs[3:]:
        if out.uses() or out.is_graph_output():
            raise CannotConvert("something reads statistics that it no longer gives")
    if len(node.outputs) > 3:
        node.resize_outputs(3)
    node.attributes["training_mode"] = ir.AttrInt64("training_mode", 1)


def _scale_by_channel(node: ir.Node) -> None:
    """GroupNormalization took one scale and bias for each group, and takes them for each channel."""
    x, groups = node.inputs[0], node.attributes.get_int("num_groups", 0)
    channels = x.shape[1] if x is not None and x.shape is not None and len(x.shape) > 1 else None
    if not isinstance(channels, int) or not groups:
        raise CannotConvert("how many channels it has is not known")
    for index, name in ((1, "scale"), (2, "bias")):
        column = _before(node, "Reshape", [node.inputs[index], _constant(node, [-1, 1], f"{name}.column.shape")], name)
        wide = _constant(node, [1, channels // groups], f"{name}.channels")
        wide = _before(node, "Expand", [column, wide], f"{name}.wide")
        flat = _before(node, "Reshape", [wide, _constant(node, [-1], f"{name}.flat.shape")], f"{name}.flat")
        node.replace_input_with(index, flat)


def _refuse(reason: str) -> Change:
    def change(node: ir.Node) -> None:
        raise CannotConvert(reason)

    return change


_REDUCE = {
    f"Reduce{how}": ((18, _to_input("axes", 1)),)
    for how in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
}

# By op: the opset that brought a change, and the change. In order: an old node goes through all that came after it.
CHANGES: Mapping[str, tuple[tuple[int, Change], ...]] = _REDUCE | {
    "BatchNormalization": ((9, _drop("spatial", only=1)), (14, _training_said)),
    "Clip": ((11, _number_to_input("min", 1)), (11, _number_to_input("max", 2))),
    "DFT": ((20, _int_to_input("axis", 2, default=1, scalar=True)),),
    "Dropout": ((10, _no_float_mask), (12, _drop("ratio"))),
    "GridSample": ((20, _rename_values("mode", {"bilinear": "linear", "bicubic": "cubic"})),),
    "GroupNormalization": ((21, _scale_by_channel),),
    "Hardmax": ((13, _flat_softmax),),
    "LogSoftmax": ((13, _flat_softmax),),
    "Pad": ((11, _to_input("pads", 1)), (11, _number_to_input("value", 2))),
    "ReduceSum": ((13, _to_input("axes", 1)),),
    "Resize": ((11, _only_enlarging), (11, _upsample_to_resize), (13, _empty_inputs_are_none)),
    "RoiAlign": ((16, _set("coordinate_transformation_mode", "output_half_pixel")),),
    "Scan": ((9, _refuse("it has a batch axis of its own, which Scan has no more")),),
    "Scatter": ((11, _rename_op("ScatterElements")),),
    "Slice": ((10, _to_input("starts", 1)), (10, _to_input("ends", 2)), (10, _to_input("axes", 3))),
    "Softmax": ((13, _flat_softmax),),
    "Split": ((13, _to_input("split", 1)), (18, _split_in_equal_parts)),
    "Squeeze": ((13, _to_input("axes", 1)),),
    "TopK": ((10, _int_to_input("k", 1, default=None, scalar=False)),),
    "Unsqueeze": ((13, _to_input("axes", 1)),),
    "Upsample": ((9, _scales_to_input), (10, _upsample_to_resize)),
}
