"""Each kind of call is traced once in a run of the tests, by whichever of its processes needs it first.

A trace takes a second, of which a family has a dozen in each type. The exports that they are made of stay in their
process; the functions lie in files too, for the others to take.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import onnx
import onnx_ir as ir
import torch

from mmdit_deploy.eager.program import Program
from mmdit_deploy.graph.assemble import IR_VERSION
from mmdit_deploy.graph.named_functions import DOMAIN
from mmdit_deploy.graph.trace import export_kind, one_operator_registry, trace
from mmdit_deploy.model import Call, Kind
from mmdit_deploy.spec import ModelSpec

# What a block's function depends on besides its name, and what no other function depends on.
_OF_BLOCKS = (
    "num_heads", "head_dim", "mlp_ratio", "activation", "bias", "qk_norm", "txt_mask", "still_references", "fp16_clip",
    "rope_axes",
)  # fmt: skip
_NOT_OF_OTHERS = (
    "name",
    "family",
    "depth",
    "single_depth",
    "text_ends",
    "residuals",
    "dual_attention_blocks",
    "qk_norm",
    # what a function reads and makes shows these
    "latent_channels",
    "out_channels",
    "txt_dim",
    "pooled_dim",
    "guidance",
    "still_references",
)


class Traces:
    """What was exported and traced.

    Args:
        folder: where the processes of a run share functions.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._exported: dict[object, tuple[torch.onnx.ONNXProgram, list[str]]] = {}
        self._functions: dict[object, ir.Function] = {}
        self._programs: dict[object, Program] = {}

    def functions(self, spec: ModelSpec, calls: Sequence[Call], dtype: torch.dtype) -> dict[str, ir.Function]:
        """What `trace_kinds` gives. They are shared: clone one before changing it."""
        kinds = {_key(spec, call.kind, dtype): call.kind for call in calls}
        for wait in (False, True):  # what another process traces at this moment comes last
            for key, kind in kinds.items():
                if key not in self._functions and (made := self._function(key, kind, dtype, wait=wait)):
                    self._functions[key] = made
        return {kind.function: self._functions[key] for key, kind in kinds.items()}

    def programs(self, spec: ModelSpec, calls: Sequence[Call], dtype: torch.dtype) -> dict[str, Program]:
        """What `programs_of` gives. The functions are made of the same exports where this process makes both."""
        found = {}
        for call in calls:
            key = _key(spec, call.kind, dtype)
            if key not in self._programs:
                with self._exported_once(key):
                    self._programs[key] = Program(call.kind, dtype)
            found[call.kind.function] = self._programs[key]
        return found

    @contextlib.contextmanager
    def within(self, spec: ModelSpec) -> Iterator[None]:
        """A context in which exports of a model, and their verification, take what was traced already."""

        def functions(calls: Sequence[Call], dtype: torch.dtype) -> dict[str, ir.Function]:
            return self.functions(spec, calls, dtype)

        def programs(calls: Sequence[Call], dtype: torch.dtype) -> dict[str, Program]:
            return self.programs(spec, calls, dtype)

        with (
            mock.patch("mmdit_deploy.graph.pipeline.trace_kinds", functions),
            mock.patch("mmdit_deploy.calibration.graph_values.trace_kinds", functions),
            mock.patch("mmdit_deploy.export.planning.programs_of", programs),
            mock.patch("mmdit_deploy.verify.as_planned.programs_of", programs),
            mock.patch("mmdit_deploy.verify.bisect.programs_of", programs),
        ):
            yield

    def _function(self, key: object, kind: Kind, dtype: torch.dtype, *, wait: bool) -> ir.Function | None:
        """From its file, written where that is empty; None if another process does that and is not waited for."""
        path = self._folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.onnx"
        with path.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return None
            file.seek(0)
            content = file.read()
            if not content:
                with self._exported_once(key):  # as a graph: a function's protobuf has no types of its inputs
                    model = ir.Model(trace(kind, dtype).graph, ir_version=IR_VERSION)
                content = ir.to_proto(model).SerializeToString()
                file.write(content)
        graph = ir.from_proto(onnx.load_from_string(content)).graph
        return ir.Function(DOMAIN, kind.function, graph=graph, attributes=[])

    @contextlib.contextmanager
    def _exported_once(self, key: object) -> Iterator[None]:
        def export(kind: Kind, dtype: torch.dtype) -> tuple[torch.onnx.ONNXProgram, list[str]]:
            if key not in self._exported:
                self._exported[key] = export_kind(kind, dtype)
            return self._exported[key]

        with (
            one_operator_registry(),
            mock.patch("mmdit_deploy.graph.trace.export_kind", export),
            mock.patch("mmdit_deploy.eager.program.export_kind", export),
        ):
            yield


def _key(spec: ModelSpec, kind: Kind, dtype: torch.dtype) -> object:
    """What the trace of a kind depends on.

    What a kind reads and makes says more than the spec: of what kind a block is, and how many residuals there are.
    """
    of_kind = kind.function, kind.inputs, kind.outputs
    if kind.function.endswith("Block"):
        return tuple(getattr(spec, field) for field in _OF_BLOCKS), of_kind, dtype
    return tuple(v for field, v in dataclasses.asdict(spec).items() if field not in _NOT_OF_OTHERS), of_kind, dtype
