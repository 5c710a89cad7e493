"""One matrix product for the modulation of all blocks.

    MMDiTModulation(c, w₀, b₀) ┐
    MMDiTModulation(c, w₁, b₁) ┤   ⇒   Gemm(c, w₀|w₁|…, b₀|b₁|…) ─ Unsqueeze ─ Split
    …                          ┘

The weights lie next to each other in the file, so the joined one is a longer span of it: no copy. TensorRT finds the
product by itself, but joins the weights in memory: a third of the model, held twice while it builds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from mmdit_deploy.graph.passes import Pass


@dataclass(frozen=True)
class _Projection:
    """A call of a function that is ``Unsqueeze(Gemm(x, w, b, transB=1), 1)``."""

    node: ir.Node
    x: ir.Value
    weight: ir.ExternalTensor
    bias: ir.ExternalTensor

    def follows(self, other: _Projection) -> bool:
        """Whether both tensors begin where the other's end."""
        pairs = ((self.weight, other.weight), (self.bias, other.bias))
        return all(
            mine.location == theirs.location and _begin(mine) == _begin(theirs) + theirs.nbytes
            for mine, theirs in pairs
        )


def _batch(model: ir.Model) -> int:
    projections = [p for node in model.graph for p in [_projection(model, node)] if p is not None]
    by_input: dict[ir.Value, list[_Projection]] = {}
    for projection in projections:
        by_input.setdefault(projection.x, []).append(projection)
    count = 0
    for group in by_input.values():
        for run in _adjacent(sorted(group, key=lambda p: (p.weight.location, _begin(p.weight)))):
            if len(run) > 1:
                _replace(model.graph, run)
                count += len(run)
    if count:
        _drop_unused(model)
    return count


def _projection(model: ir.Model, node: ir.Node) -> _Projection | None:
    function = model.functions.get(node.op_identifier())
    if function is None or len(function.inputs) != 3 or len(node.inputs) != 3:
        return None
    out = function.outputs[0].producer()
    gemm = out.inputs[0].producer() if out is not None and out.op_type == "Unsqueeze" and out.inputs[0] else None
    if out is None or gemm is None or gemm.op_type != "Gemm" or tuple(gemm.inputs) != tuple(function.inputs):
        return None
    axes = ir.convenience.get_const_tensor(out.inputs[1]) if out.inputs[1] is not None else None
    if axes is None or axes.numpy().tolist() != [1] or len(function.outputs) != 1:
        return None
    expected = {"transB": 1.0, "transA": 0.0, "alpha": 1.0, "beta": 1.0}
    if any(float(a.value) != expected.get(name) for name, a in gemm.attributes.items()):
        return None
    x, weight, bias = node.inputs
    tensors = [value.const_value for value in (weight, bias) if value is not None]
    if x is None or len(tensors) != 2 or not all(isinstance(t, ir.ExternalTensor) for t in tensors):
        return None
    return _Projection(node, x, *tensors)  # type: ignore[arg-type]


def _begin(tensor: ir.ExternalTensor) -> int:
    return tensor.offset or 0


def _adjacent(ordered: Sequence[_Projection]) -> Iterator[list[_Projection]]:
    run = [ordered[0]]
    for before, projection in itertools.pairwise(ordered):
        if not projection.follows(before):
            yield run
            run = []
        run.append(projection)
    yield run


def _replace(graph: ir.Graph, run: Sequence[_Projection]) -> None:
    first = run[0]
    base = (first.node.name or "modulations").split(".")[0]
    names = itertools.chain([base], (f"{base}.run{i}" for i in itertools.count(1)))
    name = next(n for n in names if f"{n}.weight" not in graph.initializers)
    values = [_joined(f"{name}.{leaf}", tensors) for leaf, tensors in (
        ("weight", [p.weight for p in run]),
        ("bias", [p.bias for p in run]),
    )]  # fmt: skip
    for value in values:
        graph.initializers[value.name or ""] = value
    sizes = [p.weight.shape.numpy()[0] for p in run]
    gemm = ir.node("Gemm", [first.x, *values], attributes={"transB": 1}, name=name)
    axes = ir.node("Constant", [], attributes={"value_ints": [1]}, name=f"{name}.axes")
    rows = ir.node("Constant", [], attributes={"value_ints": sizes}, name=f"{name}.sizes")
    wide = ir.node("Unsqueeze", [gemm.outputs[0], axes.outputs[0]], name=f"{name}.unsqueeze")
    split = ir.node(
        "Split", [wide.outputs[0], rows.outputs[0]], attributes={"axis": 2}, num_outputs=len(run), name=f"{name}.split"
    )
    made = (gemm, axes, rows, wide, split)
    for node in made:
        for i, value in enumerate(node.outputs):
            value.name = f"{node.name}.{i}"
    batch = first.x.shape[0] if first.x.shape is not None else None
    dtype = ir.TensorType(first.weight.dtype)
    gemm.outputs[0].shape, gemm.outputs[0].type = ir.Shape([batch, sum(sizes)]), dtype
    wide.outputs[0].shape, wide.outputs[0].type = ir.Shape([batch, 1, sum(sizes)]), dtype

    # Before the first of the calls: they all read only x and weights.
    anchor = next(node for node in graph if any(node is p.node for p in run))
    graph.insert_before(anchor, made)
    for projection, out in zip(run, split.outputs, strict=True):
        old = projection.node.outputs[0]
        out.name, out.shape, out.type = old.name, old.shape, old.type
        ir.convenience.replace_all_uses_with(old, out, replace_graph_outputs=True)
    for projection in run:
        weights = projection.node.inputs[1:]
        graph.remove(projection.node, safe=True)
        for weight in weights:
            if weight is not None and weight.name is not None and not weight.uses():
                graph.initializers.pop(weight.name, None)


def _joined(name: str, tensors: Sequence[ir.ExternalTensor]) -> ir.Value:
    first = tensors[0]
    rows = sum(t.shape.numpy()[0] for t in tensors)
    shape = ir.Shape([rows, *first.shape.numpy()[1:]])
    tensor = ir.ExternalTensor(
        first.location, first.offset, sum(t.nbytes for t in tensors), first.dtype, shape=shape, name=name,
        base_dir=first.base_dir,
    )  # fmt: skip
    return ir.Value(name=name, shape=shape, type=ir.TensorType(first.dtype), const_value=tensor)


def _drop_unused(model: ir.Model) -> None:
    called = {node.op_identifier() for node in model.graph.all_nodes()}
    for function in model.functions.values():
        called |= {node.op_identifier() for node in function.all_nodes()}
    for name in [name for name in model.functions if name not in called]:
        del model.functions[name]


batched_modulation = Pass("batched modulation", _batch)
