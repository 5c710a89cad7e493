"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467).

    x / √(mean(x²) + ε)               ⇒   RMSNormalization(x, ones)
    SimplifiedLayerNormalization(x)   ⇒   RMSNormalization(x)         ONNX Runtime's name of it

x is what is divided, in the type in which it is divided: `norm_weights` takes weights and casts in.

Exact, but for the order of sums: where all is spelled in fp32, and the second.
Off by roundings to 16 bits: what is spelled in 16 bits, all of it or the factor alone. The op computes in fp32.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter._basics import MatchFailureError
from onnxscript.rewriter.pattern import MatchResult, RewriteRule, RewriteRuleClassBase

from mmdit_deploy.graph.fuse.norms.layer_norm import subtracts_mean
from mmdit_deploy.graph.fuse.norms.spelled_norm import (
    SPELLINGS,
    STASH,
    MeanSquare,
    keeps_numbers,
    keeps_shape,
    mean_square,
    normalized_shape,
    ones,
    same,
    under_root,
)
from mmdit_deploy.graph.passes import Pass, rule_pass


def _read(x: ir.Value, other: ir.Value, normed: ir.Value) -> MeanSquare | None:
    under = None if subtracts_mean(x) is not None else under_root(normed, other)  # else it is a LayerNorm
    read = None if under is None else mean_square(under, x)
    if read is not None and not same(read.x, x):
        raise MatchFailureError("what is squared is not what is divided", read.x)
    return read


def _check(context: Any, x: Any, other: Any, normed: Any, **_: Any) -> MatchResult:
    read = _read(x, other, normed)
    if read is None:
        return MatchResult().fail()  # some other product or quotient
    keeps_shape(normed, x)
    keeps_numbers(x, x, other, read.epsilon)
    normalized_shape(x, read.axis)
    return MatchResult()


def _rewrite(op: Any, x: Any, other: Any, normed: Any, **_: Any) -> Any:
    read = _read(x, other, normed)
    assert read is not None
    weight = ones(op, x, normalized_shape(x, read.axis))
    return op.RMSNormalization(x, weight, axis=read.axis, epsilon=read.epsilon, stash_type=STASH)


class _Simplified(RewriteRuleClassBase):
    """ONNX Runtime has it in a domain of its own and, by mistake, in ONNX's; its attributes mean the same."""

    def __init__(self, domain: str) -> None:
        super().__init__(remove_nodes=False)
        self.domain = domain

    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        more = {"_allow_other_attributes": True, "_outputs": ["normed"]}
        return op.SimplifiedLayerNormalization(x, weight, _domain=self.domain, **more)

    def check(self, op: Any, x: Any, normed: Any, **_: Any) -> MatchResult:
        node = normed.producer()
        if subtracts_mean(x) is not None:
            return MatchResult().fail("it is of a deviation from the mean: a LayerNorm", node)
        if any(more.uses() or more.is_graph_output() for more in node.outputs[1:]):
            return MatchResult().fail("its factor is an output too", node)
        return MatchResult()

    def rewrite(self, op: Any, x: Any, weight: Any, normed: Any, **_: Any) -> Any:
        return op.RMSNormalization(x, weight, **normed.producer().attributes)


rms_norm: Pass = rule_pass(
    "RMSNorm",
    *(RewriteRule(spelling, _rewrite, _check, remove_nodes=False) for spelling in SPELLINGS),
    _Simplified.rule(""),
    _Simplified.rule("com.microsoft"),
)
