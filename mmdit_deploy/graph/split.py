"""A model's graph in two: what makes the modulation tensors, and what reads them; between them one table.

    conditioning ─ modulations.0.img [batch, 1, 6·C] ┐
                   modulations.0.txt [batch, 1, 6·C] ┼ Concat ─ modulation [batch, total]
                   …                                 ┘
    modulation ─┬ Slice ─ modulations.0.img [batch, 1, 6·C] ─ blocks.0
                └ …

Calls are cut out of the standard graph, after its precision plan, and each part is lowered by itself: so whatever was
planned of modulations, or merged into them, is in the part that makes them. Values pass as they are; where the plan
keeps one of them in fp32 the table is fp32, which 16-bit numbers survive unchanged.

Where references stay at timestep 0, a sample has two rows of modulation, [batch + batch, 1, …]: a row of the table
holds both, side by side.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from mmdit_deploy.contract import TABLE, Contract, SplitContract
from mmdit_deploy.graph.census import check_census
from mmdit_deploy.graph.extract import extract_segment
from mmdit_deploy.graph.lower import lower
from mmdit_deploy.graph.onnx_file import to_ir
from mmdit_deploy.graph.split_check import check_parts
from mmdit_deploy.model import Call, conditioning_calls

_BY_SAMPLE, _BY_ROW = f"{TABLE}.by_sample", f"{TABLE}.by_row"


@dataclass(frozen=True)
class Table:
    """What a row of the table holds.

    Args:
        columns: by modulation tensor: its first column, and how many it has.
        dtype: of the table, by torch's name.
        rows: of modulation for each sample: 1, or 2 where references have their own.
    """

    columns: Mapping[str, tuple[int, int]]
    dtype: str
    rows: int

    @staticmethod
    def of(standard: onnx.ModelProto, chain: Sequence[Call]) -> Table:
        """The table of a model: its modulation tensors, in the order of its calls.

        Args:
            standard: the whole graph; it says which of them are in fp32.
        """
        types = {v.name: v.type.tensor_type.elem_type for v in standard.graph.value_info}
        columns: dict[str, tuple[int, int]] = {}
        total = 0
        modulating = [call for call in chain if call.modulates]
        for call in modulating:
            width = int(call.kind.outputs[0].axes[-1])
            columns[call.outputs[0]] = (total, width)
            total += width
        elements = {types[name] for name in columns}
        element = TensorProto.FLOAT if TensorProto.FLOAT in elements else elements.pop()
        rows = 2 if modulating[0].kind.outputs[0].axes[0] != "batch" else 1
        return Table(columns, helper.tensor_dtype_to_np_dtype(element).name, rows)

    @property
    def total(self) -> int:
        """Columns of all tensors."""
        return sum(width for _, width in self.columns.values())

    @property
    def width(self) -> int:
        """Of a row of the table."""
        return self.rows * self.total

    @property
    def element(self) -> int:
        """Of the table, as `TensorProto.DataType`."""
        return {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[
            self.dtype
        ]


@dataclass(frozen=True)
class SplitGraphs:
    """The two parts of a model's graphs.

    Args:
        contract: of the parts.
        table: that passes between them.
        calls: that the conditioning makes; the trunk makes the others.
        conditioning, trunk: by dialect.
    """

    contract: SplitContract
    table: Table
    calls: tuple[str, ...]
    conditioning: Mapping[str, onnx.ModelProto]
    trunk: Mapping[str, onnx.ModelProto]


def split_graphs(
    standard: onnx.ModelProto,
    chain: Sequence[Call],
    contract: Contract,
    dialects: Mapping[str, Mapping[str, int]],
    folder: Path,
) -> SplitGraphs:
    """Cut a model's graph in two, and lower both parts.

    Args:
        standard: the whole graph, with its precision plan; not changed.
        contract: of the whole.
        dialects: which lowered graphs to make, each with what the whole graph has in it: `census.implied_lowered`.
        folder: of the bundle, which references to weights are relative to.

    Raises:
        GraphError: the parts together are not the whole.
    """
    table = Table.of(standard, chain)
    own = conditioning_calls(chain)
    conditioning = [call.path for call in own]
    trunk = [call.path for call in chain if call.path not in conditioning]
    name = standard.graph.name
    parts = tuple(
        through_table(extract_segment(standard, calls, f"{name}.{part}"), table)
        for part, calls in (("conditioning", conditioning), ("trunk", trunk))
    )
    check_parts(standard, *parts)
    lowered: dict[str, tuple[onnx.ModelProto, ...]] = {}
    for dialect, expected in dialects.items():
        models = [lower(to_ir(part, folder), dialect)[0] for part in parts]
        check_census(models[0], expected, f"split {dialect}", beside=models[1:])
        lowered[dialect] = tuple(map(_written, models))
    made = SplitContract.of(contract, own[0].inputs, table.width, table.dtype)
    return SplitGraphs(
        made,
        table,
        tuple(conditioning),
        {dialect: first for dialect, (first, _) in lowered.items()},
        {dialect: second for dialect, (_, second) in lowered.items()},
    )


def through_table(part: onnx.ModelProto, table: Table) -> onnx.ModelProto:
    """A part of a model that takes modulation tensors from the table, or puts them into it.

    Args:
        part: cut out by `extract_segment`; not changed. Of the modulation tensors it reads some, or makes all.

    Returns:
        The same where none of its inputs and outputs is a modulation tensor.
    """
    read = [value for value in part.graph.input if value.name in table.columns]
    written = [value for value in part.graph.output if value.name in table.columns]
    made = onnx.ModelProto()
    made.CopyFrom(part)
    edge = helper.make_tensor_value_info(TABLE, table.element, ["batch", table.width])
    before, after = _Nodes(table), _Nodes(table)
    if read:
        _replace(made.graph.input, read, [edge])
        _unpack(read, table, before)
    if written:
        _replace(made.graph.output, written, [edge])
        _pack(written, table, after)
    del made.graph.node[:]
    made.graph.node.extend([*before.nodes, *part.graph.node, *after.nodes])
    inside = [value for value in (*before.values, *after.values) if value.name != TABLE]
    made.graph.value_info.extend([*read, *written, *inside])
    return made


def _replace(values: Any, old: Collection[onnx.ValueInfoProto], new: Iterable[onnx.ValueInfoProto]) -> None:
    """Let a graph have other inputs or outputs in the place of some."""
    names = {value.name for value in old}
    kept = [value for value in values if value.name not in names]
    del values[:]
    values.extend([*kept, *new])


class _Nodes:
    """Nodes between the parts, in order, each named after what it makes; with the types and shapes of that."""

    def __init__(self, table: Table):
        self._element = table.element
        self.nodes: list[onnx.NodeProto] = []
        self.values: list[onnx.ValueInfoProto] = []

    def add(self, op: str, inputs: Sequence[str], name: str, shape: Sequence[int | str], **attributes: Any) -> str:
        """A node that makes one value of the table's type, or of that which it casts to."""
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        self.values.append(helper.make_tensor_value_info(name, attributes.get("to", self._element), shape))
        return name

    def ints(self, name: str, *numbers: int) -> str:
        """A list of whole numbers."""
        self.nodes.append(helper.make_node("Constant", [], [name], name=name, value_ints=numbers))
        return name

    def reshape(self, value: str, to: Sequence[int], name: str, shape: Sequence[int | str]) -> str:
        return self.add("Reshape", [value, self.ints(f"{name}.shape", *to)], name, shape)


def _unpack(values: Sequence[onnx.ValueInfoProto], table: Table, nodes: _Nodes) -> None:
    """Modulation tensors, each [rows · batch, 1, columns] and in its own type, from the table."""
    rows, batch = TABLE, "batch"
    if table.rows > 1:
        apart = nodes.reshape(TABLE, [0, table.rows, table.total], _BY_SAMPLE, ["batch", table.rows, table.total])
        turned = nodes.add("Transpose", [apart], _BY_ROW, [table.rows, "batch", table.total], perm=[1, 0, 2])
        batch = " + ".join(["batch"] * table.rows)
        rows = nodes.reshape(turned, [-1, table.total], f"{TABLE}.rows", [batch, table.total])
    axis = nodes.ints(f"{TABLE}.axis", 1)
    for value in values:
        first, width = table.columns[value.name]
        own = f"{TABLE}.{value.name}"
        span = [nodes.ints(f"{own}.first", first), nodes.ints(f"{own}.end", first + width)]
        taken = nodes.add("Slice", [rows, *span, axis], f"{own}.columns", [batch, width])
        element = value.type.tensor_type.elem_type
        if element != table.element:
            taken = nodes.add("Cast", [taken], f"{own}.narrow", [batch, width], to=element)
        nodes.nodes.append(helper.make_node("Unsqueeze", [taken, axis], [value.name], name=own))


def _pack(values: Sequence[onnx.ValueInfoProto], table: Table, nodes: _Nodes) -> None:
    """The table, from all modulation tensors."""
    batch = " + ".join(["batch"] * table.rows)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    side_by_side = []
    for name, (_, width) in table.columns.items():
        if types[name] != table.element:
            name = nodes.add("Cast", [name], f"{TABLE}.{name}.wide", [batch, 1, width], to=table.element)
        side_by_side.append(name)
    last = nodes.add("Concat", side_by_side, f"{TABLE}.tensors", [batch, 1, table.total], axis=2)
    if table.rows > 1:
        apart = [table.rows, -1, table.total]
        last = nodes.reshape(last, apart, _BY_ROW, [table.rows, "batch", table.total])
        last = nodes.add("Transpose", [last], _BY_SAMPLE, ["batch", table.rows, table.total], perm=[1, 0, 2])
    nodes.reshape(last, [-1, table.width], TABLE, ["batch", table.width])


def _written(model: ir.Model) -> onnx.ModelProto:
    """As a file has it: of an input that differs in type from call to call, no shape is said either."""
    for value in (value for function in model.functions.values() for value in function.inputs):
        if value.type is None:
            value.shape = None
    return ir.to_proto(model)
