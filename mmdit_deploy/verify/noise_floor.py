"""The noise floor: how far the eager model is from itself, when the same arithmetic is done in another way.

    eager in fp32 ──┬── eager in fp16 or bf16        what any 16-bit engine must lose
                    └── torch.compile in fp32, …      what another order of sums makes of it

An error is judged by its tolerance; beside its floor one sees what it means. Twice the floor is rounding, a hundred
times the floor is a fault, or a quantization.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mmdit_deploy.eager.calls import EagerCall, Values
from mmdit_deploy.errors import MachineError, UsageError
from mmdit_deploy.model import Call
from mmdit_deploy.spec import Precision
from mmdit_deploy.verify.metrics import compare
from mmdit_deploy.verify.records import Case, Check, NoiseFloor

# auto: the eager model in the engine's 16-bit type, on the first case: rounding is alike on all, and fp16 costs a CPU
# three times what fp32 does (bf16 a third of it), so that the floor of one case in nine adds a sixth to verification.
# dtype: the same on every case. compile: as auto, and by torch.compile in fp32 and in that type, which takes some ten
# seconds for a kind of call.
FloorRequest = Literal["auto", "dtype", "compile", "none"]
FLOOR_REQUESTS: tuple[FloorRequest, ...] = ("auto", "dtype", "compile", "none")
Function = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
_FINAL = {"final": "sample"}  # the last call's chain is called by what the model returns


class Way:
    """Another way to compute the eager model.

    Args:
        dtype: of weights and activations.
        compiled: by torch.compile, once per kind of call.
    """

    def __init__(self, dtype: torch.dtype, *, compiled: bool = False):
        self._dtype, self._compiled = dtype, compiled
        self._functions: dict[str, Callable[..., Any]] = {}

    @property
    def what(self) -> str:
        """In words."""
        return f"{'torch.compile' if self._compiled else 'eager'} in {str(self._dtype).removeprefix('torch.')}"

    def of(self, call: Call, eager: EagerCall) -> Function:
        """A call of the model, computed this way; compute-type activations are rounded first."""
        weights = {name: w.to(self._dtype) for name, w in eager.weights.items()}
        compute = [t.dtype == "compute" for t in call.kind.inputs]
        run = self._function(call, eager)

        def function(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
            rounded = [t.to(self._dtype) if c else t for t, c in zip(inputs, compute, strict=True)]
            with torch.no_grad():
                out = run(weights, dict(zip(eager.names, rounded, strict=True)))
            return out if isinstance(out, tuple) else (out,)

        return function

    def _function(self, call: Call, eager: EagerCall) -> Callable[..., Any]:
        kind = call.kind.function
        if kind not in self._functions:

            def run(weights: Values, activations: Values) -> Any:
                return torch.func.functional_call(eager.module, weights, kwargs=activations)

            self._functions[kind] = _compiled(run, kind) if self._compiled else run
        return self._functions[kind]


def _compiled(run: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """The function, compiled when it is first called."""

    def call(*args: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's compiler warns of its own internals
            try:
                return compiled(*args)
            except torch._dynamo.exc.TorchDynamoException as error:
                raise MachineError(
                    "a noise floor by torch.compile needs a compiler for this machine (g++)",
                    received=f"{kind}: {str(error).strip()[:400]}",
                    fix="install one, or measure the floor in the engine's type alone",
                ) from error

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(run, dynamic=False)
    return call


@dataclass
class Measurement:
    """The floor of one way, as it is measured call by call beside a verification.

    Args:
        what: the way, in words.
        cases: indices of the cases that it is measured on.
        alone: by call path and then index of the case: rel-L2 on equal inputs.
        chained: the same of the way's own chain of calls.
        seconds: spent on it.
    """

    what: str
    cases: tuple[int, ...]
    alone: dict[str, dict[int, float]] = field(default_factory=dict)
    chained: dict[str, dict[int, float]] = field(default_factory=dict)
    seconds: float = 0.0

    def of(self, check: Check, case: int | None) -> float | None:
        """The floor at a check's place: on its case, else the largest of those that were measured; None for none."""
        values = (self.alone if check.level == "local" else self.chained).get(check.name, {})
        value = values[case] if case in values else max(values.values(), key=_nan_is_worst, default=0.0)
        return value if 0 < value < math.inf else None

    def attach(self, checks: Sequence[Check], cases: Sequence[Case]) -> list[Check]:
        """The checks with this floor."""
        index = {case: i for i, case in enumerate(cases)}
        return [replace(check, floor=self.of(check, index.get(check.case))) for check in checks]

    def record(self) -> NoiseFloor:
        """What the verdict says of it."""
        worst = {path: max(values.values(), key=_nan_is_worst) for path, values in self.alone.items()}
        output = max(self.chained.get("sample", {}).values(), key=_nan_is_worst, default=math.nan)
        return NoiseFloor(self.what, len(self.cases), worst, output, self.seconds)

    def to_json(self) -> dict[str, Any]:
        """For `reference.safetensors`: figures in the order of the cases."""
        tables = {
            name: {path: [_finite(values[i]) for i in self.cases] for path, values in table.items()}
            for name, table in (("alone", self.alone), ("chained", self.chained))
        }
        return {"what": self.what, "cases": list(self.cases), **tables}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Measurement:
        """Read what `to_json` wrote."""
        cases = tuple(data["cases"])
        alone, chained = (
            {
                path: {i: math.nan if v is None else float(v) for i, v in zip(cases, values, strict=True)}
                for path, values in data[name].items()
            }
            for name in ("alone", "chained")
        )
        return Measurement(str(data["what"]), cases, alone, chained)


class FloorChain:
    """Measures one way, in lockstep with the verification.

    Args:
        inputs: of the model, for every case of the verification.
        cases: indices of those to measure.
    """

    def __init__(self, way: Way, inputs: Sequence[Values], cases: Sequence[int]):
        self._way = way
        self._values = {i: dict(inputs[i]) for i in cases}
        self._call: tuple[Call, Function] | None = None
        self.measured = Measurement(way.what, tuple(cases))

    def load(self, call: Call | None, eager: EagerCall | None = None) -> None:
        """Take up the next call, or none: its weights are freed."""
        start = time.perf_counter()
        self._call = None if call is None or eager is None else (call, self._way.of(call, eager))
        self.measured.seconds += time.perf_counter() - start

    def measure(
        self,
        case: int,
        inputs: Sequence[Tensor],
        alone: Sequence[Tensor],
        chained: Sequence[Tensor],
        over: Sequence[str],
    ) -> None:
        """Measure the call on one case, if that is measured.

        Args:
            inputs: activations.
            alone: what the eager call makes of them in fp32.
            chained: what it makes of its own chain.
            over: values that no later call reads.
        """
        if case not in self._values or self._call is None:
            return
        start = time.perf_counter()
        (call, function), values = self._call, self._values[case]
        made = function([values[name] for name in call.inputs])
        values.update(zip(call.outputs, made, strict=True))
        self._note(self.measured.alone, call.path, case, function(inputs), alone)
        self._note(self.measured.chained, _FINAL.get(call.path, call.path), case, made, chained)
        for name in over:
            del values[name]
        self.measured.seconds += time.perf_counter() - start

    @staticmethod
    def _note(
        table: dict[str, dict[int, float]], name: str, case: int, made: Sequence[Tensor], expected: Sequence[Tensor]
    ) -> None:
        worst = max((compare(a, b) for a, b in zip(made, expected, strict=True)), key=lambda errors: errors.badness)
        table.setdefault(name, {})[case] = worst.rel_l2


def floor_ways(request: FloorRequest, precision: Precision, cases: Sequence[Case]) -> list[tuple[Way, list[int]]]:
    """What to measure, and on which cases; the first is what checks are compared with.

    Raises:
        UsageError: there is no such floor, or fp32 is asked for its noise in its own type.
    """
    if request not in FLOOR_REQUESTS:
        raise UsageError(f"a noise floor is one of {', '.join(FLOOR_REQUESTS)}", received=request, fix="auto")
    dtype = getattr(torch, precision.dtype)
    wide = dtype == torch.float32
    if request == "dtype" and wide:
        raise UsageError(
            "the eager model in fp32 is the reference itself: it has no noise in its own type",
            received="a floor in the engine's type, of an fp32 engine",
            fix="--noise-floor compile",
        )
    if request == "none" or not cases:
        return []
    in_type = [] if wide else [(Way(dtype), list(range(len(cases))) if request == "dtype" else [0])]
    if request != "compile":
        return in_type
    compiled = [torch.float32] if wide else [torch.float32, dtype]
    return [*in_type, *((Way(d, compiled=True), [0]) for d in compiled)]


def _nan_is_worst(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
