"""The plan of an fp16 model: the values of each call that stay in fp32, and what decided each of them.

    range       twice the largest magnitude that calibration saw is beyond 65504
    error       with it in fp16, the call is too far from fp32; of all that could be kept it helped most
    shared      another block of the same kind keeps it: one variant of the function serves both
    neighbour   it lies between nodes that are computed in fp32 because of the others

A model that fp16 suits has an empty plan. `fp16_search` makes one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mmdit_deploy.calibration.fp16_emulation import Bound, Error
from mmdit_deploy.graph.precision.wide_values import FP16_MAX

Why = Literal["", "range", "error", "shared", "neighbour"]


@dataclass(frozen=True)
class TensorPlan:
    """What was decided of one value of one call.

    Args:
        call: e.g. ``blocks.35``.
        value: its name in the standard graph's function.
        label: what it is, in words.
        amax: the largest magnitude that was seen.
        dtype: ``fp16`` or ``fp32``.
        why: it is fp32; empty where it is fp16.
    """

    call: str
    value: str
    label: str
    amax: float
    dtype: Literal["fp16", "fp32"]
    why: Why

    def __str__(self) -> str:
        return f"{self.call}: {self.label}: {self.dtype}, |x| ≤ {self.amax:.3g}" + (
            f" ({self.why})" if self.why else ""
        )


@dataclass(frozen=True)
class CallError:
    """How far a call is from fp32, emulated: everything in fp16 that the range allows, and as planned."""

    before: Error
    after: Error


@dataclass(frozen=True)
class Fp16Plan:
    """What stays in fp32, and why.

    Args:
        wide: by call, the values that stay in fp32, by their names in the standard graph's function, as in
            `PrecisionPlan`. Calls that keep nothing are left out.
        tensors: of every call, in the order of the model.
        functions: by call, the function that it calls before there are variants.
        errors: by call.
        output: how far the model's output is from fp32, each call fed by the one before, emulated.
        bound: what calls and the output are held to: a part of the tolerance.
        headroom: how many times the largest magnitude seen must fit.
        bf16_attentions: calls with an attention that is computed in bf16, because its Q, K or V are fp32.
    """

    wide: Mapping[str, frozenset[str]]
    tensors: tuple[TensorPlan, ...]
    functions: Mapping[str, str]
    errors: Mapping[str, CallError]
    output: Error
    bound: Bound
    headroom: float
    bf16_attentions: tuple[str, ...] = field(default=())

    @property
    def kept(self) -> tuple[TensorPlan, ...]:
        """What stays in fp32."""
        return tuple(t for t in self.tensors if t.dtype == "fp32")

    @property
    def out_of_bound(self) -> tuple[str, ...]:
        """Calls that nothing brought within the bound."""
        return tuple(call for call, error in self.errors.items() if not error.after.within(self.bound))

    def text(self) -> str:
        """A summary for people."""
        if not self.kept:
            return "fp16 plan: nothing needs fp32"
        lines = [f"fp16 plan: {len(self.kept)} values of {len(self.wide)} calls stay in fp32"]
        return "\n".join([*lines, *(f"  {t}" for t in self.kept if t.why != "neighbour")])

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, for the manifest: labels by function, ranges by call, and of what is fp32 why.

        About 30 bytes a value: 40 kB for 24 joint blocks.
        """
        labels: dict[str, dict[str, str]] = {}
        calls: dict[str, dict[str, Any]] = {}
        for t in self.tensors:
            function = self.functions[t.call]
            labels.setdefault(function, {})[t.value] = t.label
            entry = calls.setdefault(t.call, {"function": function, "amax": {}})
            entry["amax"][t.value] = float(f"{t.amax:.4g}")
            if t.why:
                entry.setdefault("fp32", {})[t.value] = t.why
        for call, error in self.errors.items():
            calls.setdefault(call, {"function": self.functions[call], "amax": {}})["rel_l2"] = [
                _finite(error.before.rel_l2),
                _finite(error.after.rel_l2),
            ]
        return {
            "limit": FP16_MAX,
            "headroom": self.headroom,
            "bound": {"min_cosine": self.bound.min_cosine, "max_rel_l2": self.bound.max_rel_l2},
            "output_rel_l2": _finite(self.output.rel_l2),
            "bf16_attentions": list(self.bf16_attentions),
            "labels": labels,
            "calls": calls,
        }


def _finite(value: float) -> float | None:
    """JSON has no infinity: what overflowed is null."""
    return float(f"{value:.3g}") if math.isfinite(value) else None
