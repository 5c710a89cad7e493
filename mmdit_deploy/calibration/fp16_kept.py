"""What an fp16 model keeps in fp32, as far as a search has come: within calls, and from one call to the next.

blocks.3 ─ blocks.3.img ─┬─ blocks.4        one tensor: where it stays in fp32, the call that makes it and all that
                         └─ final           read it have it so
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from mmdit_deploy.calibration.fp16_plan import TensorPlan, Why
from mmdit_deploy.calibration.fp16_ranges import Ranges, amax_by_value
from mmdit_deploy.calibration.fp16_variants import rounded_up
from mmdit_deploy.calibration.graph_values import GraphValues
from mmdit_deploy.calibration.value_labels import labels
from mmdit_deploy.graph.precision.wide_values import decide
from mmdit_deploy.model import Call


class Kept:
    """Values that stay in fp32, each with the reason that came first.

    Args:
        chain: the model's calls.
        places: of each kind, by function.
        outputs: block outputs that the graph exposes: they have the contract's type, as the model's inputs and
            ``sample`` have, and are never kept.
    """

    def __init__(self, chain: Sequence[Call], places: Mapping[str, GraphValues], outputs: Collection[str]):
        self._chain, self._places = chain, places
        self._free = {name for call in chain for name in call.outputs} - {*chain[-1].outputs, *outputs}
        self._passed: dict[str, Why] = {}  # between calls, by name in the chain
        self._inside: dict[str, dict[str, Why]] = {call.path: {} for call in chain}

    def copy(self) -> Kept:
        """One that grows by itself."""
        made = Kept(self._chain, self._places, ())
        made._free, made._passed = self._free, dict(self._passed)
        made._inside = {call: dict(values) for call, values in self._inside.items()}
        return made

    def keep(self, call: Call, values: Collection[str], why: Why) -> None:
        """Keep values of a call, as far as they are not the contract's."""
        border = _border(call)
        for value in self.allowed(call, values):
            if value in border:
                self._passed.setdefault(border[value], why)
            else:
                self._inside[call.path].setdefault(value, why)

    def allowed(self, call: Call, values: Collection[str]) -> frozenset[str]:
        """Without what the contract has in fp16."""
        border = _border(call)
        return frozenset(v for v in values if v not in border or border[v] in self._free)

    def wide(self, call: Call) -> frozenset[str]:
        """What stays in fp32 of a call, by the names in its function."""
        passed = {value for value, name in _border(call).items() if name in self._passed}
        return frozenset(self._inside[call.path]) | passed

    def rounded_up(self) -> dict[str, frozenset[str]]:
        """By call, what it keeps where that is anything: a little more than it must, so that few plans differ."""
        functions = {call.path: call.kind.function for call in self._chain}
        borders = {call.kind.function: frozenset(_border(call)) for call in self._chain}
        return rounded_up({call.path: wide for call in self._chain if (wide := self.wide(call))}, functions, borders)

    def tensors(self, wide: Mapping[str, frozenset[str]], ranges: Ranges) -> list[TensorPlan]:
        """What was decided of each value that has a range, and of what lies between those that are kept.

        Args:
            wide: by call, what is kept in the end.
        """
        words = {name: labels(p.function) for name, p in self._places.items()}
        made = []
        for call in self._chain:
            places, named = self._places[call.kind.function], words[call.kind.function]
            own = wide.get(call.path, frozenset())
            islands = decide(places.function, own).names
            amax = amax_by_value(places, ranges.get(call.path, {}))
            for name in dict.fromkeys([*amax, *sorted(own), *sorted(islands & amax.keys())]):
                why = self._why(call, name) or ("shared" if name in own else "neighbour" if name in islands else "")
                label, largest = named.get(name, name), amax.get(name, 0.0)
                made.append(TensorPlan(call.path, name, label, largest, "fp32" if why else "fp16", why))
        return made

    def _why(self, call: Call, name: str) -> Why:
        return self._inside[call.path].get(name) or self._passed.get(_border(call).get(name, ""), "")


def _border(call: Call) -> dict[str, str]:
    """The names in the chain of what is fp16 and enters or leaves a call, by their names in its function."""
    kind = call.kind
    tensors = [*zip(kind.inputs, call.inputs, strict=True), *zip(kind.outputs, call.outputs, strict=True)]
    return {t.name: name for t, name in tensors if t.dtype == "compute"}
