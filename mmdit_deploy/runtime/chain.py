"""The segments of a TensorRT engine at one profile, run one after another over torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmdit_deploy.build import SegmentRecord
from mmdit_deploy.contract import TensorSpec
from mmdit_deploy.errors import BundleError, MachineError


class Context:
    """An execution context of one segment, at one profile.

    Args:
        execution: TensorRT's `IExecutionContext`.
    """

    def __init__(self, segment: SegmentRecord, execution: Any):
        self.segment, self._execution = segment, execution
        self._sizes: Mapping[str, int] | None = None

    def bind(self, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
        """Set shapes, where they changed, and addresses.

        Raises:
            BundleError: the engine has other shapes than the record.
        """
        if sizes != self._sizes:
            self._sizes = None
            for spec in self.segment.inputs:
                if not self._execution.set_input_shape(spec.name, spec.shape(sizes)):
                    raise unlike_record(self.segment, f"{spec.name} of shape {list(spec.shape(sizes))} is refused")
            for spec in self.segment.outputs:
                # It writes as much as it says, whatever memory it is given.
                shape = tuple(self._execution.get_tensor_shape(spec.name))
                if shape != spec.shape(sizes):
                    raise unlike_record(self.segment, f"{spec.name} is {list(shape)}, not {list(spec.shape(sizes))}")
            self._sizes = dict(sizes)
        for spec in (*self.segment.inputs, *self.segment.outputs):
            if not self._execution.set_tensor_address(spec.name, tensors[spec.name].data_ptr()):
                raise unlike_record(self.segment, f"the address of {spec.name} is refused")

    def enqueue(self, stream: torch.cuda.Stream) -> bool:
        """Whether TensorRT took it."""
        return bool(self._execution.execute_async_v3(stream.cuda_stream))


class Chain:
    """All segments at one profile.

    Args:
        contexts: in the order in which they run.
        device: where tensors between segments are made.
        failed: the error for what TensorRT did not do, with what it said.
    """

    def __init__(self, contexts: Sequence[Context], device: torch.device, failed: Callable[[str], MachineError]):
        self._contexts, self._device, self._failed = tuple(contexts), device, failed
        self._last_read = last_read([context.segment for context in contexts])

    def tensors(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """New tensors for all that the segments read and write, by name: to be written to again and again."""
        specs = [s for context in self._contexts for s in (*context.segment.inputs, *context.segment.outputs)]
        with torch.inference_mode(False):  # made in it, they could not be written to outside of it
            return {spec.name: self._empty(spec, sizes) for spec in specs}

    def enqueue(self, tensors: Mapping[str, Tensor], sizes: Mapping[str, int], stream: torch.cuda.Stream) -> None:
        """Run on a stream, which is torch's current one.

        Args:
            tensors: by name. What a segment writes that is not in it lives until its last reader is enqueued: torch
                gives the memory to work on this stream only, which comes after that reader.
        """
        live = dict(tensors)
        for context, over in zip(self._contexts, self._last_read, strict=True):
            for spec in context.segment.outputs:
                if spec.name not in live:
                    live[spec.name] = self._empty(spec, sizes)
            context.bind(live, sizes)
            if not context.enqueue(stream):
                raise self._failed(f"enqueues {context.segment.file}")
            for name in over:
                del live[name]

    def _empty(self, spec: TensorSpec, sizes: Mapping[str, int]) -> Tensor:
        return torch.empty(spec.shape(sizes), dtype=getattr(torch, spec.dtype), device=self._device)


def last_read(segments: Sequence[SegmentRecord]) -> list[frozenset[str]]:
    """By segment: those of its tensors that no later one reads."""
    later: set[str] = set()
    over = []
    for segment in reversed(segments):
        over.append(frozenset(spec.name for spec in (*segment.inputs, *segment.outputs)) - later)
        later |= {spec.name for spec in segment.inputs}
    return over[::-1]


def unlike_record(record: SegmentRecord, received: str) -> BundleError:
    """The error for an engine file that is not what the manifest says."""
    return BundleError(
        f"{record.file} has the tensors that the manifest says", received=received, fix="export the bundle again"
    )
