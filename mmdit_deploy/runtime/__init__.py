"""Run engines: named tensors in, named tensors out."""

from mmdit_deploy.runtime.conditioning import Conditioning, StepConditioning
from mmdit_deploy.runtime.engine import Engine
from mmdit_deploy.runtime.engines import (
    check_runnable,
    engine_files,
    engine_graph,
    engine_parts,
    runnable_target,
    stepped_graph,
)
from mmdit_deploy.runtime.fit import check_runs_here
from mmdit_deploy.runtime.memory import available_memory
from mmdit_deploy.runtime.ort import check_provider, open_session, run_session
from mmdit_deploy.runtime.runner import Runner, open_runner
from mmdit_deploy.runtime.sampling import sample
from mmdit_deploy.runtime.tensorrt import TensorRTEngine

__all__ = [
    "Conditioning",
    "Engine",
    "Runner",
    "StepConditioning",
    "TensorRTEngine",
    "available_memory",
    "check_provider",
    "check_runnable",
    "check_runs_here",
    "engine_files",
    "engine_graph",
    "engine_parts",
    "open_runner",
    "open_session",
    "run_session",
    "runnable_target",
    "sample",
    "stepped_graph",
]
