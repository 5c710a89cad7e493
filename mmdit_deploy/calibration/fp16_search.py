"""Find what an fp16 model must keep in fp32: first what fp16 cannot hold, then what it rounds too much.

    ranges ─► values beyond fp16, in all calls ─┐
    inputs ─► call by call, in fp32 and in fp16 ┴► while a call is too far off: keep the region that helps most
                                                ─► while the output is: keep the residual streams of the last blocks

A call's error is what it makes of inputs that are rounded to fp16, against what the eager model makes of exact ones.
What passes between two calls is one tensor: where it stays in fp32, the call that makes it and all that read it agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from mmdit_deploy.calibration.fp16_emulation import Bound, Error, Fp16Call, error_of, rounded, worst
from mmdit_deploy.calibration.fp16_kept import Kept
from mmdit_deploy.calibration.fp16_plan import CallError, Fp16Plan
from mmdit_deploy.calibration.fp16_ranges import HEADROOM, Ranges, too_large
from mmdit_deploy.calibration.fp16_regions import Region, regions
from mmdit_deploy.calibration.graph_values import GraphValues, fused_functions, graph_values
from mmdit_deploy.calibration.observe import last_uses
from mmdit_deploy.checkpoint.weights import WeightSource
from mmdit_deploy.contract import Contract
from mmdit_deploy.eager.calls import EagerCalls, Values
from mmdit_deploy.eager.program import Program
from mmdit_deploy.eager.programs import programs_of
from mmdit_deploy.graph.precision.wide_values import decide
from mmdit_deploy.model import Call, calls
from mmdit_deploy.spec import ModelSpec, precision

# A region must take this much off the error to be worth its bytes; what is left is of something else.
WORTH = 0.1
# Of the tolerance. The rest is for what is not emulated: the order of sums on a GPU, and other images.
SHARE = 0.5
Progress = Callable[[str, int, int], None]


def plan_fp16(
    spec: ModelSpec,
    source: WeightSource,
    ranges: Ranges,
    samples: Sequence[Mapping[str, Tensor]],
    tolerance: Bound,
    *,
    outputs: Sequence[str] = (),
    headroom: float = HEADROOM,
    programs: Mapping[str, Program] | None = None,
    functions: Mapping[str, ir.Function] | None = None,
    progress: Progress | None = None,
) -> Fp16Plan:
    """Decide, value by value, what an fp16 model keeps in fp32.

    Args:
        ranges: by call, the largest magnitude of each value (`ranges_of` statistics).
        samples: inputs of the model by name, each of any size: errors are measured on them.
        tolerance: of fp16, for each call and for the output; they are held to `SHARE` of it.
        outputs: block outputs that the graph exposes, as for `calls`.
        headroom: how many times the largest magnitude must fit into fp16.
        programs, functions: of the model's kinds in fp16, where they are traced already: `programs_of` and
            `fused_functions`.
        progress: called with the call's name, its index and the number of calls.
    """
    chain = calls(spec, outputs)
    made = programs_of(chain, torch.float16) if programs is None else programs
    places = graph_values(made, fused_functions(chain, torch.float16) if functions is None else functions)
    search = _Search(chain, places, EagerCalls(spec, source), tolerance.share(SHARE), Kept(chain, places, outputs))
    search.keep_ranges(ranges, headroom)
    features = {t.name for t in Contract.of(spec, precision("fp16")).inputs if t.dtype == "float16"}
    inputs = [{name: rounded(t) if name in features else t for name, t in sample.items()} for sample in samples]
    output = search.keep_errors(inputs, progress)
    if not output.within(search.bound):
        output = search.keep_streams(inputs, output)
    wide = search.kept.rounded_up()
    return Fp16Plan(
        wide,
        tuple(search.kept.tensors(wide, ranges)),
        {call.path: call.kind.function for call in chain},
        search.errors,
        output,
        search.bound,
        headroom,
        tuple(c.path for c in chain if c.path in wide and decide(places[c.kind.function].function, wide[c.path]).bf16),
    )


class _Search:
    """A search for what must be kept.

    Attributes:
        bound: for each call and for the output.
        kept: so far.
        errors: of each call.
    """

    def __init__(
        self, chain: Sequence[Call], places: Mapping[str, GraphValues], eager: EagerCalls, bound: Bound, kept: Kept
    ):
        self._chain, self._places, self._eager = chain, places, eager
        self.bound, self.kept = bound, kept
        self.errors: dict[str, CallError] = {}
        self._regions = {name: regions(p.function, dict.fromkeys(p.values.values())) for name, p in places.items()}
        self._expected: list[Tensor] = []  # the model's outputs

    def keep_ranges(self, ranges: Ranges, headroom: float) -> None:
        """Keep what fp16 cannot hold; a product within a node where the node would compute it in fp16."""
        found = {c: too_large(self._places[c.kind.function], ranges.get(c.path, {}), headroom) for c in self._chain}
        for call, beyond in found.items():
            self.kept.keep(call, beyond.values, "range")
        for call, beyond in found.items():
            islands = decide(self._places[call.kind.function].function, self.kept.wide(call))
            factors = {factor for node, factor in beyond.factors.items() if node not in islands.nodes}
            self.kept.keep(call, factors, "range")

    def keep_errors(self, inputs: Sequence[Values], progress: Progress | None) -> Error:
        """Go through the calls, and keep what each needs to be within the bound.

        Returns:
            The output's error, each call fed by the one before.
        """
        exact, chained = [dict(values) for values in inputs], [dict(values) for values in inputs]
        for index, (call, done) in enumerate(zip(self._chain, last_uses(self._chain), strict=True)):
            if progress is not None:
                progress(call.path, index, len(self._chain))
            fp16 = self._load(call)
            given = [_activations(call, values) for values in exact]
            expected = [fp16.exact(values) for values in given]
            self._settle(call, fp16, given, expected)
            for values, made in zip(exact, expected, strict=True):
                _pass_on(call, values, made, done)
            self._step(call, fp16, self.kept, chained, done)
        self._expected = [values["sample"] for values in exact]
        return self._output(chained)

    def keep_streams(self, inputs: Sequence[Values], output: Error) -> Error:
        """Keep the residual streams of as few of the last blocks as bring the output within the bound.

        Where they do not help they are not kept.

        Returns:
            The output's error, before or after.
        """
        blocks = [c for c in self._chain if any(r.stream for r in self._regions[c.kind.function])]

        def last(count: int) -> tuple[Error, Kept]:
            kept = self.kept.copy()
            for call in blocks[len(blocks) - count :]:
                for region in self._regions[call.kind.function]:
                    if region.stream:
                        kept.keep(call, region.values, "error")
            return self._chained(inputs, kept), kept

        best, kept = last(len(blocks))
        if best.over(self.bound) > (1 - WORTH) * output.over(self.bound):
            return output
        least, most = 0, len(blocks)
        while best.within(self.bound) and most - least > 1:
            middle = (least + most) // 2
            tried, fewer = last(middle)
            if tried.within(self.bound):
                best, kept, most = tried, fewer, middle
            else:
                least = middle
        self.kept = kept
        return best

    def _chained(self, inputs: Sequence[Values], kept: Kept) -> Error:
        """The output's error, each call fed by the one before."""
        chained = [dict(values) for values in inputs]
        for call, done in zip(self._chain, last_uses(self._chain), strict=True):
            self._step(call, self._load(call), kept, chained, done)
        return self._output(chained)

    def _load(self, call: Call) -> Fp16Call:
        return Fp16Call(self._places[call.kind.function], self._eager.weights(call))

    def _step(self, call: Call, fp16: Fp16Call, kept: Kept, chained: Sequence[Values], done: Sequence[str]) -> None:
        islands = fp16.islands(kept.wide(call))
        for values in chained:
            _pass_on(call, values, fp16(_activations(call, values), islands), done)

    def _output(self, chained: Sequence[Values]) -> Error:
        return worst([error_of(v["sample"], e) for v, e in zip(chained, self._expected, strict=True)])

    def _settle(
        self, call: Call, fp16: Fp16Call, given: Sequence[Values], expected: Sequence[tuple[Tensor, ...]]
    ) -> None:
        """Keep the region that helps a call most, one after the other, until it is within the bound.

        What came first and is not needed any more goes again.
        """

        def error(wide: frozenset[str]) -> Error:
            islands = fp16.islands(wide)
            errors = []
            for values, wanted in zip(given, expected, strict=True):
                errors += [error_of(a, b) for a, b in zip(fp16(values, islands), wanted, strict=True)]
            return worst(errors)

        start = self.kept.wide(call)
        before = now = error(start)
        while beyond := self.kept.allowed(call, fp16.overflowed) - start:  # what calibration did not see
            self.kept.keep(call, beyond, "range")
            start = self.kept.wide(call)
            now = error(start)
        kept: list[Region] = []
        left = [Region(r.label, self.kept.allowed(call, r.values)) for r in self._regions[call.kind.function]]
        while not now.within(self.bound) and left:
            wide = start.union(*(r.values for r in kept))
            tried = [(error(wide | r.values), r) for r in left if not r.values <= wide]
            best = min(tried, key=lambda pair: pair[0].over(self.bound), default=None)
            if best is None or not best[0].over(self.bound) < (1 - WORTH) * now.over(self.bound):
                break
            now = best[0]
            kept.append(best[1])
            left.remove(best[1])
        for region in kept[:-1]:
            without = start.union(*(r.values for r in kept if r is not region))
            if (after := error(without)).within(self.bound):
                kept.remove(region)
                now = after
        self.errors[call.path] = CallError(before, now)
        for region in kept:
            self.kept.keep(call, region.values, "error")


def _pass_on(call: Call, values: Values, made: Sequence[Tensor], done: Sequence[str]) -> None:
    """Let a call's outputs be there for later calls, and drop what none of them reads."""
    values.update(zip(call.outputs, made, strict=True))
    for name in done:
        del values[name]


def _activations(call: Call, values: Values) -> Values:
    return {t.name: values[name] for t, name in zip(call.kind.inputs, call.inputs, strict=True)}
