"""Every graph of a bundle, from a spec: trace, assemble, fuse, check, lower. No weights are touched."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir
import torch

from mmdit_deploy.checkpoint import Layout
from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.contract import Contract
from mmdit_deploy.graph.assemble import Span, assemble, trace_kinds
from mmdit_deploy.graph.census import check_census, implied, implied_lowered
from mmdit_deploy.graph.fuse import FUSE
from mmdit_deploy.graph.lower import lower
from mmdit_deploy.graph.passes import PassResult, run
from mmdit_deploy.graph.precision.apply import apply_plan
from mmdit_deploy.model import calls
from mmdit_deploy.precision import PrecisionPlan
from mmdit_deploy.spec import ModelSpec, Precision


@dataclass(frozen=True)
class Graphs:
    """The standard graph and its dialects, and what was done to get there.

    Args:
        standard: opset 23, local functions, weights by reference.
        lowered: by dialect.
        census: attentions, norms, GELUs and named functions of the standard graph, as the spec implies them.
        passes: by graph (``standard`` or the dialect): each pass and how often it fired.
        kinds: the functions traced.
        seconds: wall time by stage: trace, assemble, fuse, lower.
    """

    standard: onnx.ModelProto
    lowered: Mapping[str, onnx.ModelProto]
    census: Mapping[str, int]
    passes: Mapping[str, tuple[PassResult, ...]]
    kinds: tuple[str, ...]
    seconds: Mapping[str, float]

    def of(self, dialect: str) -> onnx.ModelProto:
        """The graph in a dialect, or the ``standard`` one."""
        return self.standard if dialect == "standard" else self.lowered[dialect]


def build_graphs(
    spec: ModelSpec,
    contract: Contract,
    precision: Precision,
    layout: Layout,
    *,
    dialects: Sequence[str],
    outputs: Sequence[str] = (),
    location: str = "weights.safetensors",
    plan: PrecisionPlan | None = None,
) -> Graphs:
    """Build a bundle's graphs.

    Args:
        layout: where each canonical tensor will lie in the weights file.
        dialects: which lowered graphs to make, by name in `mmdit_deploy.graph.lower.DIALECTS`; the ``standard``
            one is always made.
        outputs: names of block outputs to expose, e.g. ``blocks.12``.
        location: the weights file's name, beside the graphs.
        plan: what is quantized or stays in fp32; everything is in the compute type without one. `layout` is then that
            of `mmdit_deploy.precision.weights.planned_layout`.

    Raises:
        GraphError: a fusion that should fire did not, or a pass failed; or the plan is of another model.
    """
    dtype = getattr(torch, precision.dtype)
    chain = calls(spec, outputs)
    spans = _spans(spec, layout)
    clock = [time.perf_counter()]

    functions = trace_kinds(chain, dtype)
    clock.append(time.perf_counter())
    model = assemble(spec.name, chain, functions, contract, spans, dtype, location=location)
    clock.append(time.perf_counter())
    passes = {"standard": run(model, FUSE)}
    census = check_census(model, implied(spec), "standard")
    if plan is not None and not plan.plain:
        passes["standard"] += (PassResult("precision plan", apply_plan(model, plan, layout, location=location)),)
        census = check_census(model, implied(spec, plan), "standard")
    clock.append(time.perf_counter())
    lowered = {}
    for dialect in [d for d in dict.fromkeys(dialects) if d != "standard"]:
        lowered[dialect], passes[dialect] = lower(model, dialect)
        check_census(lowered[dialect], implied_lowered(spec, dialect, plan), dialect)
    standard = _written(model)
    protos = {dialect: _written(graph) for dialect, graph in lowered.items()}
    clock.append(time.perf_counter())

    stages = ("trace", "assemble", "fuse", "lower")
    seconds = {stage: end - start for stage, (start, end) in zip(stages, itertools.pairwise(clock), strict=True)}
    return Graphs(standard, protos, census, passes, tuple(functions), seconds)


def _written(model: ir.Model) -> onnx.ModelProto:
    """The graph as a file has it. Of initializers it says the type and shape once: they are most of its values."""
    proto = ir.to_proto(model)
    initializers = {tensor.name for tensor in proto.graph.initializer}
    rest = [value for value in proto.graph.value_info if value.name not in initializers]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(rest)
    return proto


def _spans(spec: ModelSpec, layout: Layout) -> dict[str, Span]:
    """Each parameter's bytes: its parts lie next to each other, so it is one span."""
    spans = {}
    for parameter in parameters(spec):
        parts = [layout.tensors[p.key] for p in parameter.parts]
        for before, after in itertools.pairwise(parts):
            if before.offset + before.nbytes != after.offset:
                raise ValueError(f"{before.key} and {after.key} are one parameter, but are not adjacent in the file")
        spans[parameter.path] = Span(parameter.shape, parts[0].offset, sum(p.nbytes for p in parts))
    return spans
