"""What an engine is made of: its layer list, read from the builder's log or from TensorRT's engine inspector.

TensorRT-RTX writes one line per layer into its verbose log, enterprise TensorRT gives the same as JSON; both name the
ONNX nodes that became the layer. So kernels are counted and fusion is checked on what was really built.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmdit_deploy.errors import GraphError

# What launches work on the GPU. Not: signal, wait, shape_call, allocate, deallocate and no-op reshapes.
# Enterprise TensorRT calls a runtime_fusion a fusion.
KERNEL_TYPES = frozenset({"gemm", "kgen", "runtime_fusion", "fusion", "correlation", "convolution"})
# Kernels with a matrix product. Fused attention is none of them: Myelin calls it a kgen.
PRODUCT_TYPES = KERNEL_TYPES - {"kgen"}
ENGINE = "engine"  # where kernels are counted that belong to no call of the model

# Myelin, TensorRT's compiler, names a kernel that it generates by the operations in it (`__myl_CastMeanSub…`, cut off
# after some twenty with `Etc`). The one kernel of softmax(Q·Kᵀ)·V has a name of its own, the same for every shape and
# type: measured on TensorRT-RTX 1.7, and seen in TensorRT 10, in profiles also with a number before it.
_FUSED_ATTENTION = re.compile(r"(__mye\d+)?_gem[mv]_mha_v\d")
_EXPONENTIAL = re.compile(r"Exp(?![a-z])")

_LINE = re.compile(
    r"Name: (?P<name>.*), LayerType: (?P<type>\S+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>.*?), StreamId: .*?, Metadata: (?P<metadata>.*)"
)
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([^\]]*)\],.*? Datatype: (\w+),")
# `node | call (Function) | call of that call (Function)`: innermost first. The entries are separated by control
# characters (unit and record separator).
_SOURCE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_MYELIN_GRAPH = re.compile(r"_myl(\d+)_\d+$")
_PROFILE = re.compile(r"\[profile (\d+)\]")


@dataclass(frozen=True)
class LayerTensor:
    """One tensor that a layer reads or writes.

    Args:
        dims: of what the layer takes of it, which may be a slice; axes of unknown size are −1.
        dtype: TensorRT's word, e.g. ``Half``.
        elements: how many it reads or writes at the profile's opt shape, from `mmdit_deploy.build.opt_sizes`; None
            where that is not known.
    """

    name: str
    dims: tuple[int, ...]
    dtype: str
    elements: int | None = None


@dataclass(frozen=True)
class EngineLayer:
    """One entry of an engine's layer list.

    Args:
        name: TensorRT's, e.g. ``_gemm_mha_v2_myl0_42``.
        type: e.g. ``gemm``, ``kgen``, ``shape_call``.
        profile: index of the optimization profile whose plan it belongs to.
        sources: the ONNX nodes that became it, each with the call of the model that it is in; the call is ``""`` for
            nodes of the main graph. A node of a nested function is named ``inner_call/node``.
        inputs, outputs: its tensors; constants are not among them.
        tactic: the kernel's name, where there is one.
        constants: weights, and what was computed of them; None where the list does not say them.
        flops: at the profile's opt shape, those of matrix products alone, from `mmdit_deploy.build.opt_sizes`; None
            where they are not known.
    """

    name: str
    type: str
    profile: int
    sources: tuple[tuple[str, str], ...]
    inputs: tuple[LayerTensor, ...]
    outputs: tuple[LayerTensor, ...]
    tactic: str
    constants: tuple[LayerTensor, ...] | None = None
    flops: int | None = None

    @property
    def is_kernel(self) -> bool:
        return self.type in KERNEL_TYPES

    @property
    def is_product(self) -> bool:
        return self.type in PRODUCT_TYPES

    @property
    def is_fused_attention(self) -> bool:
        return _FUSED_ATTENTION.match(self.name) is not None

    @property
    def has_exponential(self) -> bool:
        """Whether its name says so, as that of every softmax kernel does: ``__myl_SlicMaxrSubExpSum_…``."""
        return self.name.startswith("__myl_") and _EXPONENTIAL.search(self.name) is not None

    def to_json(self) -> dict[str, Any]:
        def tensors(of: Iterable[LayerTensor]) -> list[list[Any]]:
            return [[t.name, list(t.dims), t.dtype, t.elements] for t in of]

        return {
            "name": self.name,
            "type": self.type,
            "profile": self.profile,
            "sources": [list(source) for source in self.sources],
            "inputs": tensors(self.inputs),
            "constants": None if self.constants is None else tensors(self.constants),
            "outputs": tensors(self.outputs),
            "tactic": self.tactic,
            "flops": self.flops,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> EngineLayer:
        """Read what `to_json` wrote, or wrote before there were elements, constants and FLOPs.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """

        def tensors(of: Iterable[Any]) -> tuple[LayerTensor, ...]:
            return tuple(LayerTensor(name, tuple(dims), dtype, *elements) for name, dims, dtype, *elements in of)

        constants = data.get("constants")

        return EngineLayer(
            data["name"],
            data["type"],
            data["profile"],
            tuple((node, call) for node, call in data["sources"]),
            tensors(data["inputs"]),
            tensors(data["outputs"]),
            data["tactic"],
            None if constants is None else tensors(constants),
            data.get("flops"),
        )


def parse_layer_list(text: str) -> tuple[EngineLayer, ...]:
    """Read the builder's verbose message that begins with ``Layers:``, or several of them.

    Raises:
        GraphError: there is no layer in it, or a line that cannot be read: nothing may be counted on such a list.
    """
    entries = []
    for line in text.split("\n"):  # not splitlines: a record separator ends no line
        if not (line.startswith("Name: ") and ", LayerType: " in line):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise _unreadable("the builder's log", line[:200])
        name, type_, inputs, constants, outputs, tactic, metadata = match.groups()
        read, fixed, made = map(_log_tensors, (inputs, constants, outputs))
        entries.append(EngineLayer(name, type_, 0, _sources(metadata), read, made, tactic, fixed))
    if not entries:
        raise _unreadable("the builder's log", "no layer list")
    return _with_profiles(entries)


def parse_inspector(text: str) -> tuple[EngineLayer, ...]:
    """Read what ``EngineInspector.get_engine_information(LayerInformationFormat.JSON)`` gave.

    TensorRT 10 says ``Format/Datatype`` of a tensor, TensorRT 11 ``Datatype`` and ``Format`` (NVIDIA's migration guide,
    "IEngineInspector JSON Output").

    Raises:
        GraphError: there is no layer in it, or not in this form.
    """
    try:
        # Not strict: control characters separate the entries of Metadata, and need not be escaped.
        entries = [
            EngineLayer(
                layer["Name"],
                layer["LayerType"],
                0,
                _sources(layer.get("Metadata", "")),
                _json_tensors(layer["Inputs"]),
                _json_tensors(layer["Outputs"]),
                layer.get("TacticName", ""),
                _json_tensors(layer["Constants"]) if "Constants" in layer else None,
            )
            for layer in json.loads(text, strict=False)["Layers"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable("the engine inspector", f"{type(error).__name__}: {error}") from None
    if not entries:
        raise _unreadable("the engine inspector", "no layers")
    return _with_profiles(entries)


def kernels_by_type(layers: Iterable[EngineLayer]) -> dict[str, int]:
    """Kernels of each type, the most frequent first; of several profiles, those of all together."""
    return dict(Counter(layer.type for layer in layers if layer.is_kernel).most_common())


def kernels_by_call(layers: Iterable[EngineLayer], calls: Sequence[str]) -> dict[str, int]:
    """Kernels that each call of the model became; of several profiles, those of all together.

    A kernel may be made of nodes of several calls: the end of one block is fused with the first norm of the next. It
    counts for the call that most of its nodes are in, and of equal ones for the last, which is where its result goes.
    So one GEMM of several modulations counts for the last of them. Nodes of the main graph have no say.

    Args:
        calls: names of the calls, in the model's order.

    Returns:
        Counts of the calls that have kernels, in that order, and under ``engine`` what belongs to none of them.
    """
    return {call: len(kernels) for call, kernels in by_call(layers, calls).items()}


def by_call(layers: Iterable[EngineLayer], calls: Sequence[str]) -> dict[str, list[EngineLayer]]:
    """Kernels of each call that has some, as `kernels_by_call` counts them."""
    position = {call: i for i, call in enumerate(calls)}
    found: dict[str, list[EngineLayer]] = {call: [] for call in [*calls, ENGINE]}
    for layer in layers:
        if layer.is_kernel:
            votes = Counter(call for _, call in layer.sources if call in position)
            found[max(votes, key=lambda call: (votes[call], position[call]), default=ENGINE)].append(layer)
    return {call: kernels for call, kernels in found.items() if kernels}


def _sources(metadata: str) -> tuple[tuple[str, str], ...]:
    sources = []
    for source in _SOURCE.findall(metadata):
        node, *sites = source.split(" | ")
        *inner, call = [site.rpartition(" (")[0] for site in sites] or [""]  # a site is `call (Function)`
        sources.append(("/".join([*reversed(inner), node]), call))
    return tuple(sources)


def _log_tensors(text: str) -> tuple[LayerTensor, ...]:
    return tuple(
        LayerTensor(name, tuple(int(n) for n in dims.split(",") if n), dtype)
        for name, dims, dtype in _TENSOR.findall(text)
    )


def _json_tensors(data: Iterable[Mapping[str, Any]]) -> tuple[LayerTensor, ...]:
    return tuple(
        LayerTensor(t["Name"], tuple(t["Dimensions"]), t.get("Datatype") or t["Format/Datatype"]) for t in data
    )


def _with_profiles(entries: Sequence[EngineLayer]) -> tuple[EngineLayer, ...]:
    """The layers with their profiles.

    The plans of all profiles are in one list. In the second and later ones, what is named after the network (its inputs
    and outputs, GEMMs, tensors between them) has ``[profile N]`` in its name, and what the compiler made up has not.
    Each of the compiler's graphs (``_mylN_``) is of one profile, so one such name tells it for the whole graph. On
    TensorRT-RTX that is also N of ``_mylN_``, but not on enterprise TensorRT, which may have several graphs a profile.
    """
    marked: dict[str, int] = {}
    for entry in entries:
        for name in (entry.name, *(t.name for t in (*entry.inputs, *entry.outputs))):
            if match := _PROFILE.search(name):
                marked[_graph(entry)] = int(match[1])
    return tuple(dataclasses.replace(entry, profile=marked.get(_graph(entry), 0)) for entry in entries)


def _graph(entry: EngineLayer) -> str:
    match = _MYELIN_GRAPH.search(entry.name)
    return match[1] if match else entry.name


def _unreadable(where: str, received: str) -> GraphError:
    return GraphError(
        f"{where} lists the engine's layers, each with the ONNX nodes that it was made of",
        received=received,
        fix="build with ProfilingVerbosity.DETAILED and a verbose logger; "
        "if it was, report this as a bug, with TensorRT's version",
    )
