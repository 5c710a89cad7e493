"""Run engines: named tensors in, named tensors out."""

from mmdit_deploy.runtime.engine import Engine, runnable_target
from mmdit_deploy.runtime.ort import PROVIDERS, open_session, run_session

__all__ = ["PROVIDERS", "Engine", "open_session", "run_session", "runnable_target"]
