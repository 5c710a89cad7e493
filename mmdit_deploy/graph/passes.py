"""How a pass over a graph looks: it changes the model in place, returns a count, and says what it left and why."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnxscript.rewriter import RewriteRuleSet
from onnxscript.rewriter.pattern import MatchingTracer, MatchResult, MatchStatus, RewriteRule

from mmdit_deploy.errors import GraphError, UsageError
from mmdit_deploy.graph.named_functions import define, is_named_function, make_way, put_first


@dataclass(frozen=True)
class Left:
    """A near miss: where a rule's pattern was found, and what kept the rule from rewriting it.

    Args:
        node: its name, or its op and output.
        scope: the function that it is in; ``""`` in the main graph.
        reason: what was not as the rule needs it.
    """

    node: str
    scope: str
    reason: str


def _nothing(model: ir.Model) -> tuple[Left, ...]:
    return ()


@dataclass(frozen=True)
class Pass:
    """One named step of a pipeline.

    Args:
        name: how reports call it.
        apply: changes the model in place and returns how many times it fired. A second run returns 0.
        left: the near misses of a model on which it has run.
    """

    name: str
    apply: Callable[[ir.Model], int]
    left: Callable[[ir.Model], tuple[Left, ...]] = _nothing


@dataclass(frozen=True)
class PassResult:
    """What one pass did.

    Args:
        name: of the pass.
        count: how many times it fired.
        left: its near misses, where they were asked for.
    """

    name: str
    count: int
    left: tuple[Left, ...] = ()

    @property
    def found(self) -> int:
        """How often its pattern was there."""
        return self.count + len(self.left)


def rule_pass(name: str, *rules: RewriteRule) -> Pass:
    """A pass of declarative rewrite rules, over the graph and over every function that is not a named one of ours.

    Functions that the rules call, such as ``MMDiTSiLU``, get their definitions.
    """

    def apply(model: ir.Model) -> int:
        make_way(model)
        with _without_named_functions(model):
            count = RewriteRuleSet(list(rules)).apply_to_model(model)
        define(model)
        return count

    def left(model: ir.Model) -> tuple[Left, ...]:
        reasons = _Reasons()
        with _without_named_functions(model):
            RewriteRuleSet(list(rules)).apply_to_model(model, tracer=reasons)  # which changes nothing
        return tuple(reasons.left.values())

    return Pass(name, apply, left)


def run(model: ir.Model, pipeline: Sequence[Pass], *, explain: bool = False) -> tuple[PassResult, ...]:
    """Run the passes in order.

    Args:
        model: changed in place.
        explain: look for near misses too, after each pass.

    Raises:
        UsageError: the graph is one that a pass refuses.
        GraphError: a pass failed; it names the pass and those that ran before it.
    """
    results: list[PassResult] = []
    for step in pipeline:
        try:
            count = step.apply(model)
            results.append(PassResult(step.name, count, step.left(model) if explain else ()))
        except (UsageError, MemoryError):
            raise  # what the graph or the machine is to blame for
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


def label(node: ir.Node) -> str:
    """A node's name, for people; where it has none its op and first output."""
    return node.name or f"{node.op_type} → {node.outputs[0].name}"


class _Reasons(MatchingTracer):
    """The nodes where a pattern matched and no rule rewrote it, with the first reason given.

    A check that fails without a reason says that what matched is something else: nothing was left there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left: dict[ir.Node, Left] = {}

    def log(
        self,
        rule: RewriteRule,
        container: ir.Graph | ir.Function,
        node: ir.Node,
        match_result: MatchResult,
        status: MatchStatus,
    ) -> None:
        failed = status in (MatchStatus.CONDITION_FAILED, MatchStatus.REPLACEMENT_FAILED)
        if failed and match_result.reason and node not in self.left:
            scope = container.name if isinstance(container, ir.Function) else ""
            at = [_shown(culprit) for culprit in match_result.failure_nodes_and_values]
            reason = f"{match_result.reason} ({', '.join(at)})" if at else match_result.reason
            self.left[node] = Left(label(node), scope, reason)


def _shown(culprit: ir.Node | ir.Value) -> str:
    return label(culprit) if isinstance(culprit, ir.Node) else f"{culprit.name}"


@contextlib.contextmanager
def _without_named_functions(model: ir.Model) -> Iterator[None]:
    """Inside a named function its own pattern matches, and would become a call of itself."""
    aside = {key: f for key, f in model.functions.items() if is_named_function(f)}
    for key in aside:
        del model.functions[key]
    try:
        yield
    finally:
        put_first(model, aside, dict(model.functions))
