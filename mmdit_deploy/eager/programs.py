"""A model's calls as operators: each kind of call is traced once, however often it is called."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmdit_deploy.eager.program import Program
from mmdit_deploy.graph.trace import one_operator_registry
from mmdit_deploy.model import Call


def programs_of(calls: Sequence[Call], dtype: torch.dtype) -> dict[str, Program]:
    """The program of every kind, by the name of its function.

    Args:
        calls: of one model.
        dtype: the compute type of its graph, which says what the operators are and what their values are called.
    """
    kinds = {call.kind.function: call.kind for call in calls}
    with one_operator_registry():
        return {function: Program(kind, dtype) for function, kind in kinds.items()}
