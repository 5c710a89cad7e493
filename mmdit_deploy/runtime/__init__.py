"""Run engines: named tensors in, named tensors out."""

from mmdit_deploy.runtime.engine import Engine, engine_graph, runnable_target
from mmdit_deploy.runtime.memory import available_memory
from mmdit_deploy.runtime.ort import DEVICES, PROVIDERS, open_session, run_session

__all__ = [
    "DEVICES",
    "PROVIDERS",
    "Engine",
    "available_memory",
    "engine_graph",
    "open_session",
    "run_session",
    "runnable_target",
]
