"""`reference.safetensors`: what the eager fp32 model computed, kept so that a bundle can be verified anywhere.

It holds the inputs of each case, the conditioning vector and the final output whole, and of every other call's
outputs a digest: elements spread over it. A few hundred kB stand for gigabytes of activations, and an error in a
block moves its digest. Very large inputs (a ControlNet's residuals) are left out: they are made again, from the seed.
The noise floor, where it was measured, is in the header.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmdit_deploy.checkpoint import SafetensorsFile, plan_layout, write_safetensors
from mmdit_deploy.errors import BundleError
from mmdit_deploy.verify.noise_floor import Measurement
from mmdit_deploy.verify.records import Case

DIGEST_SIZE = 256  # elements per tensor: the norm of an error is then known to about 6 %
MAX_BYTES = 16 * 2**20
MAX_INPUT_BYTES = 4 * 2**20  # of one input
FILE_NAME = "reference.safetensors"
WHOLE = ("conditioning", "sample")  # the one is small, and what every modulation is made of; the other is the result
_GOLDEN = (5**0.5 - 1) / 2


def pick(tensor: Tensor) -> Tensor:
    """The elements that a digest keeps, in fp32.

    Multiples of the golden ratio are spread evenly at every scale: no width or number of tokens is in step with
    them, so that all parts of the channels and of the tokens are in it.
    """
    flat = tensor.flatten()
    places = torch.arange(DIGEST_SIZE, dtype=torch.float64) * _GOLDEN % 1.0 * flat.numel()
    return flat[places.long()].float()


class ReferenceRecorder:
    """Collects what goes into the file while the eager model runs."""

    def __init__(self, cases: Sequence[Case]):
        self._cases = tuple(cases)
        self._tensors: dict[str, Tensor] = {}
        self._inputs: list[dict[str, str]] = []  # by case: input name → key
        self.floors: Sequence[Measurement] = ()

    def inputs(self, values: Sequence[Mapping[str, Tensor]]) -> None:
        """Keep the inputs of every case but the largest; equal tensors of different cases are kept once."""
        for i, tensors in enumerate(values):
            keys = {}
            for name, tensor in tensors.items():
                if tensor.nbytes > MAX_INPUT_BYTES:
                    continue
                same = (k for k, t in self._tensors.items() if t.dtype == tensor.dtype and torch.equal(t, tensor))
                keys[name] = next(same, f"case.{i}.input.{name}")
                self._tensors[keys[name]] = tensor
            self._inputs.append(keys)

    def outputs(self, case: int, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Keep one call's outputs for one case."""
        for name, tensor in zip(names, tensors, strict=True):
            self._tensors[f"case.{case}.{name}"] = tensor.float() if name in WHOLE else pick(tensor)

    def write(self, directory: Path) -> int:
        """Write the file into a bundle's directory.

        Returns:
            How many cases are in it: as many of the first ones as `MAX_BYTES` holds. For none there is no file.
        """
        for count in range(len(self._cases), 0, -1):
            metadata = {
                "cases": json.dumps([dataclasses.asdict(c) for c in self._cases[:count]]),
                "inputs": json.dumps(self._inputs[:count]),
                "noise_floors": json.dumps([floor.to_json() for floor in self.floors]),
            }
            kept = [(k, t) for k, t in self._tensors.items() if int(k.split(".")[1]) < count]
            # Wide types first, so that every tensor is aligned.
            items = sorted(kept, key=lambda item: -item[1].dtype.itemsize)
            layout = plan_layout([(key, t.dtype, tuple(t.shape)) for key, t in items], metadata)
            if layout.total_bytes <= MAX_BYTES:
                write_safetensors(directory / FILE_NAME, layout, items)
                return count
        return 0


class Reference:
    """An open `reference.safetensors`."""

    def __init__(self, path: Path):
        self._file = SafetensorsFile(path)
        try:
            self.cases = tuple(Case(**c) for c in json.loads(self._file.metadata["cases"]))
            self._inputs: list[dict[str, str]] = json.loads(self._file.metadata["inputs"])
            # Bundles of earlier versions have none.
            floors = json.loads(self._file.metadata.get("noise_floors", "[]"))
            self.floors = tuple(Measurement.from_json(floor) for floor in floors)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"{FILE_NAME} lists its cases, their inputs and noise floors in the header",
                received=repr(error),
                fix="export the bundle again",
            ) from error

    def inputs(self, case: int) -> dict[str, Tensor]:
        """The inputs of a case by name, in the contract's dtypes; none above `MAX_INPUT_BYTES`."""
        return {name: self._read(key) for name, key in self._inputs[case].items()}

    def sample(self, case: int) -> Tensor:
        """The eager model's final output, fp32 [batch, img_tokens, C_out]."""
        return self._read(f"case.{case}.sample")

    def conditioning(self, case: int) -> Tensor:
        """The eager model's conditioning vector, fp32 [batch, C_cond]."""
        return self._read(f"case.{case}.conditioning")

    def digest(self, case: int, name: str) -> Tensor:
        """What `pick` takes of one value: fp32 [DIGEST_SIZE]."""
        kept = self._read(f"case.{case}.{name}")
        return pick(kept) if name in WHOLE else kept

    def _read(self, key: str) -> Tensor:
        if key not in self._file.tensors:
            raise BundleError(f"{FILE_NAME} holds {key}", received="it is not there", fix="export the bundle again")
        return self._file.read(key)
