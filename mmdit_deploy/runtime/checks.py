"""What a caller hands to an engine, checked before any runtime sees it: a wrong address ends the process."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mmdit_deploy.contract import Contract, TensorSpec
from mmdit_deploy.errors import ContractError
from mmdit_deploy.runtime.tensors import from_numpy, span

KEPT = 256  # combinations of shapes that are known to be in order


class InputCheck:
    """A contract's inputs on one device. Tensors like those of a call before are not checked again.

    Args:
        device: of the engine.
        target: that it was built for.
    """

    def __init__(self, contract: Contract, device: torch.device, target: str):
        self._contract, self._device, self._target = contract, device, target
        self._known: dict[object, Mapping[str, int]] = {}

    def __call__(self, tensors: Mapping[str, Tensor]) -> Mapping[str, int]:
        """Check inputs by name.

        Returns:
            The size of each symbolic axis; not to be changed.

        Raises:
            ContractError: names the tensor, the rule, what was received, and the fix.
        """
        alike = tuple([(name, t.dtype, t.shape, t.device, t.layout) for name, t in tensors.items()])
        sizes = self._known.get(alike)
        if sizes is None:
            sizes = self._check(tensors)
            if len(self._known) >= KEPT:
                self._known.clear()
            self._known[alike] = sizes
        for name, tensor in tensors.items():
            if not tensor.data_ptr():  # of which nothing that was looked at so far speaks
                raise ContractError(
                    f"{name} has memory",
                    received=f"{type(tensor).__name__} without",
                    fix="pass values",
                )
        return sizes

    def _check(self, tensors: Mapping[str, Tensor]) -> Mapping[str, int]:
        sizes = self._contract.check({name: (_dtype(t), tuple(t.shape)) for name, t in tensors.items()})
        for name, tensor in tensors.items():
            if tensor.layout != torch.strided:
                raise ContractError(f"{name} is dense", received=str(tensor.layout), fix=f"{name}.to_dense()")
            check_place(name, tensor, self._device, self._target)
        return sizes


def check_place(name: str, tensor: Tensor, device: torch.device, target: str) -> None:
    """Check that a tensor is where the engine runs. Nothing is moved there: that would be a copy in every call.

    Raises:
        ContractError: it is not.
    """
    if tensor.device != device:
        raise ContractError(
            f"{name} is on the device that this {target} engine runs on: {device}",
            received=str(tensor.device),
            fix=f'torch.as_tensor({name}, device="{device}")',
        )


def check_stream(stream: torch.cuda.Stream, device: torch.device, target: str) -> None:
    """Check that a stream is one of the device that the engine runs on.

    Raises:
        ContractError: it is not.
    """
    if stream.device != device:
        raise ContractError(
            f"the stream is one of the device that this {target} engine runs on: {device}",
            received=f"one of {stream.device}",
            fix="pass none, or torch.cuda.Stream(engine.device) on a GPU",
        )


def output_tensors(
    given: Mapping[str, Tensor | np.ndarray], specs: Mapping[str, TensorSpec], sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    """The caller's outputs as tensors over their own memory.

    Args:
        given: by name.
        specs: of all outputs.
        sizes: of each symbolic axis.

    Raises:
        ContractError: one is not what the engine makes of these inputs, or cannot be written to in place.
    """
    tensors = {}
    for name, array in given.items():
        if name not in specs:
            raise ContractError(f"the outputs are {', '.join(specs)}", received=name, fix="pass one of them")
        tensors[name] = _as_output(name, array)
        dtype, shape = specs[name].dtype, specs[name].shape(sizes)
        wrong = _unwritable(array)
        if not wrong and isinstance(array, np.ndarray) and tensors[name].data_ptr() != array.ctypes.data:
            wrong.append("with an axis that runs backwards")
        if wrong or tensors[name].shape != shape or tensors[name].dtype != getattr(torch, dtype):
            received = f"{_dtype(tensors[name])} {list(tensors[name].shape)}"
            raise ContractError(
                f"the output {name} is contiguous, and {dtype} {list(shape)} for these inputs",
                received=", ".join([received, *wrong]),
                fix="pass an array like that, or none to get a new one",
            )
    return tensors


def check_apart(outputs: Mapping[str, Tensor | np.ndarray], inputs: Mapping[str, Tensor | np.ndarray]) -> None:
    """Check that an output shares no memory with an input, nor with another output. Inputs are never written to.

    Args:
        outputs: by name.
        inputs: by name; of a strided one, what lies between its elements counts as its own.

    Raises:
        ContractError: it does.
    """
    read = [(name, *span(array)) for name, array in inputs.items()]
    written = [(name, *span(array)) for name, array in outputs.items()]
    for i, (name, start, end) in enumerate(written):
        for kind, others in (("input", read), ("output", written[:i])):
            for other, begin, stop in others:
                if start < stop and begin < end:
                    raise ContractError(
                        "an output's memory is its own: inputs are never written to",
                        received=f"the output {name} overlaps the {kind} {other}",
                        fix="pass another array, or none to get a new one",
                    )


def _as_output(name: str, array: object) -> Tensor:
    if isinstance(array, Tensor):
        return array
    if isinstance(array, np.ndarray):
        return from_numpy(name, array)
    raise ContractError(
        f"the output {name} is a torch tensor or a numpy array",
        received=type(array).__name__,
        fix=f"torch.from_dlpack({name}), of an array that may be written to",
    )


def _unwritable(array: Tensor | np.ndarray) -> list[str]:
    """What keeps an array from being written to in place, in words."""
    if isinstance(array, Tensor):
        contiguous = array.layout == torch.strided and array.is_contiguous()
        failings = [
            ("not contiguous", not contiguous),
            ("with gradients", array.requires_grad),
            ("negated", array.is_neg()),
        ]
    else:
        flags = array.flags
        failings = [("not contiguous", not flags.c_contiguous), ("read-only or not aligned", not flags.behaved)]
    return [words for words, fails in failings if fails]


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
