"""A bundle's weights, byte by byte, beside what their source gives; and where the graph looks for them.

An exponent bit that flipped in one small weight moves no output out of tolerance. It is found here all the same, for
conversion and quantization are the same to the bit wherever they are done again.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import torch
from torch import Tensor

from mmdit_deploy.checkpoint import SafetensorsFile
from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.checkpoint.weights import WeightSource
from mmdit_deploy.model.partition import call_of
from mmdit_deploy.precision import PrecisionPlan
from mmdit_deploy.precision.weights import stream_planned
from mmdit_deploy.spec import ModelSpec
from mmdit_deploy.verify.exposed import Body

FILE_NAME = "weights.safetensors"


@dataclass(frozen=True)
class WeightDifference:
    """A tensor of the weights file that is not what its source gives.

    Args:
        key: in the file.
        path: the model's parameter that it is of, ``blocks.3.img.qkv.proj.weight``; of what belongs to a quantized
            layer, the key.
        count, total: how many of its elements differ, of how many. All, where the file has it in another type or shape.
        index: of the first that differs.
        received, expected: that element in the file, and from the source; None where the file has no such element.
            Where two weights lie in a byte, it is the byte.
        resembles: the key of another tensor that should have these bytes.
    """

    key: str
    path: str
    count: int
    total: int
    index: tuple[int, ...]
    received: float | None
    expected: float
    resembles: str | None = None

    def __str__(self) -> str:
        place = f"[{', '.join(map(str, self.index))}]" if self.index else "its value"
        received = "not there, or of another type or shape" if self.received is None else f"{self.received:.6g}"
        instead = f"; it holds what {self.resembles} should" if self.resembles else ""
        return (
            f"{self.key}: {self.count} of {self.total} values are not the source's; {place} is {received}, "
            f"the source gives {self.expected:.6g}{instead}"
        )


class StoredWeights:
    """The weights file of a bundle.

    Args:
        folder: the bundle's.
    """

    def __init__(self, folder: Path, spec: ModelSpec):
        self._spec, self._path = spec, folder / FILE_NAME
        self._paths = {part.key: p.path for p in parameters(spec) for part in p.parts}
        with SafetensorsFile(self._path) as file:
            self._infos = dict(file.tensors)

    def differences(self, source: WeightSource, plan: PrecisionPlan) -> dict[str, list[WeightDifference]]:
        """What differs from the source, by call, with one parameter in memory.

        Raises:
            CheckpointError: the source cannot be read.
        """
        found: list[tuple[WeightDifference, tuple[int, int] | None]] = []
        known: dict[tuple[int, int], str] = {}
        with SafetensorsFile(self._path) as file:
            for key, expected in stream_planned(self._spec, source, plan):
                mark = _fingerprint(expected)
                if mark is not None:
                    known.setdefault(mark, key)
                info = file.tensors.get(key)
                same = info is not None and (info.dtype, tuple(info.shape)) == (expected.dtype, tuple(expected.shape))
                received = file.read(key) if same else None
                difference = _difference(key, self._paths.get(key, key), received, expected)
                if difference is not None:
                    found.append((difference, None if received is None else _fingerprint(received)))
        by_call: dict[str, list[WeightDifference]] = {}
        for difference, mark in found:
            named = replace(difference, resembles=None if mark is None else known.get(mark))
            by_call.setdefault(call_of(difference.path), []).append(named)
        return by_call

    def keys_of(self, path: str) -> tuple[str, ...]:
        """The keys of the tensors that a parameter is made of; of what belongs to a quantized layer, its own."""
        return tuple(k for k, p in self._paths.items() if p == path) or ((path,) if path in self._infos else ())

    def misplaced(self, model: onnx.ModelProto, body: Body) -> Iterator[tuple[str, str]]:
        """Weights of a call that the graph takes from elsewhere in the file, by their names in the function.

        Returns:
            Each one's name, and what lies there, or what else it is, in words.
        """
        initializers = {i.name: i for i in model.graph.initializer}
        producers = {out: n for n in model.graph.node for out in n.output}
        for name, value in zip(body.function.input, body.node.input, strict=False):
            keys = self.keys_of(f"{body.call}.{name}")
            if not keys:
                continue  # an activation, or a table of the model's own
            while value in producers and producers[value].op_type == "Cast":
                value = producers[value].input[0]
            if value not in initializers:
                if value not in producers:
                    yield name, f"the input {value} of the graph"
                continue
            wanted = (self._infos[keys[0]].offset, sum(self._infos[k].nbytes for k in keys))
            place = _place(initializers[value])
            if place != wanted:
                yield name, self._shown(place)

    def _shown(self, place: tuple[int, int] | None) -> str:
        if place is None:
            return "a tensor inside the graph"
        there = [k for k, i in self._infos.items() if place[0] <= i.offset < place[0] + place[1]]
        return ", ".join(there[:3]) or f"bytes {place[0]} to {sum(place)}"


def _place(tensor: onnx.TensorProto) -> tuple[int, int] | None:
    """Offset and length of a tensor's bytes in the weights file; None where they are in the graph."""
    said = {e.key: e.value for e in tensor.external_data}
    return (int(said["offset"]), int(said["length"])) if {"offset", "length"} <= said.keys() else None


def _difference(key: str, path: str, received: Tensor | None, expected: Tensor) -> WeightDifference | None:
    flat = expected.contiguous().reshape(-1)
    first, count = 0, flat.numel()
    if received is not None:
        theirs = received.contiguous().reshape(-1)
        if torch.equal(_bytes(theirs), _bytes(flat)):
            return None
        # By their bits: NaN is equal to itself, and zero has two signs.
        differ = (_bytes(theirs) != _bytes(flat)).reshape(flat.numel(), -1).any(1)
        first, count = int(differ.int().argmax()), int(differ.sum())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), expected.shape)) if expected.dim() else ()
    element = None if received is None else float(received.reshape(-1)[first].float())
    return WeightDifference(key, path, count, flat.numel(), index, element, float(flat[first].float()))


def _bytes(flat: Tensor) -> Tensor:
    return flat.view(torch.uint8)


def _fingerprint(tensor: Tensor) -> tuple[int, int] | None:
    """The same for equal bytes; None where all values are equal: a scale, or a bias of zeros, resembles too many."""
    flat = tensor.contiguous().reshape(-1)
    if not flat.numel() or bool((flat.float() == flat[0].float()).all()):
        return None
    return flat.nbytes, zlib.crc32(_bytes(flat).numpy().data)
