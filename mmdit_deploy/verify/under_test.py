"""What is verified."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

from mmdit_deploy.build import EngineRecord, Target, parse_target
from mmdit_deploy.contract import Contract
from mmdit_deploy.precision import PrecisionPlan
from mmdit_deploy.runtime.split import Parts
from mmdit_deploy.spec import ModelSpec, Precision
from mmdit_deploy.verify.bounds import Bounds
from mmdit_deploy.verify.tolerances import DEFAULTS, Tolerances


@dataclass(frozen=True)
class EngineUnderTest:
    """What is verified: an engine, the graph to step through, and what they should compute.

    Args:
        name: the bundle's.
        target: which of its engines.
        graph: in the dialect `stepped_dialect_of` the target; weights by reference.
        folder: the weights file's.
        files: what the engine is loaded from: the graph's file for ONNX Runtime, the engine files for TensorRT.
        record: what was built, for TensorRT.
        outputs: block outputs that the graph exposes besides ``sample``.
        whole: also run the whole engine in one go, where this machine can.
        plan: what is quantized in it: the other calls are bound as in the compute type. Without one, all calls of a
            quantized precision are bound as quantized ones.
        tolerances: ours, or a user's.
        parts: of an engine in two parts, the other one; `files` and `record` are then the trunk's, and `graph` is still
            that of the whole.
    """

    name: str
    target: Target
    spec: ModelSpec
    contract: Contract
    precision: Precision
    graph: onnx.ModelProto
    folder: Path
    files: tuple[Path, ...]
    record: EngineRecord | None = None
    outputs: tuple[str, ...] = ()
    whole: bool = True
    plan: PrecisionPlan | None = None
    tolerances: Tolerances = DEFAULTS
    parts: Parts | None = None

    @property
    def bounds(self) -> Bounds:
        """The tolerances of its calls."""
        return Bounds(self.precision, self.plan, self.tolerances)

    @property
    def stepped_on(self) -> Target:
        """The ONNX Runtime target that its graph is stepped through on."""
        return self.target if self.record is None else parse_target("ort-cpu")
