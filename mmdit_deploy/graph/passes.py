"""How a pass over a graph looks: it says what it does, changes the model in place, and returns a count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnxscript.rewriter import RewriteRuleSet
from onnxscript.rewriter.pattern import RewriteRule

from mmdit_deploy.errors import GraphError


@dataclass(frozen=True)
class Pass:
    """One named step of a pipeline.

    Args:
        name: how reports call it.
        apply: changes the model in place and returns how many times it fired. A second run returns 0.
    """

    name: str
    apply: Callable[[ir.Model], int]


@dataclass(frozen=True)
class PassResult:
    """What one pass did."""

    name: str
    count: int


def rule_pass(name: str, *rules: RewriteRule) -> Pass:
    """A pass of declarative rewrite rules, over the graph and over every function."""

    def apply(model: ir.Model) -> int:
        return RewriteRuleSet(list(rules)).apply_to_model(model)

    return Pass(name, apply)


def run(model: ir.Model, pipeline: Sequence[Pass]) -> tuple[PassResult, ...]:
    """Run the passes in order.

    Raises:
        GraphError: a pass failed; it names the pass and those that ran before it.
    """
    results: list[PassResult] = []
    for step in pipeline:
        try:
            results.append(PassResult(step.name, step.apply(model)))
        except Exception as error:
            done = ", ".join(r.name for r in results) or "none"
            raise GraphError(
                f"the pass {step.name!r} failed (ran before it: {done})",
                received=f"{type(error).__name__}: {error}",
                fix="report this as a bug",
            ) from error
    return tuple(results)


def like(value: ir.Value, other: ir.Value, shape: Sequence[int | ir.SymbolicDim]) -> ir.Value:
    """Give a rewritten value the element type of another and a shape, so that later rules see both."""
    value.type, value.shape = other.type, ir.Shape(shape)
    return value
