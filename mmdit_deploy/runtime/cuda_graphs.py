"""CUDA graphs: one call of one shape, recorded once over tensors of its own and launched as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdit_deploy.errors import MachineError


@dataclass(frozen=True)
class GraphedCall:
    """A recorded call.

    Args:
        tensors: that it reads and writes, by name: their addresses are in the graph.
        replay: launches it on torch's current stream.
        holds: what must live as long as the graph.
    """

    tensors: Mapping[str, Tensor]
    replay: Callable[[], None]
    holds: object

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Copy in, launch, copy out, on torch's current stream."""
        for name, tensor in inputs.items():
            self.tensors[name].copy_(tensor)
        self.replay()
        for name, tensor in outputs.items():
            tensor.copy_(self.tensors[name])


def capture(
    enqueue: Callable[[torch.cuda.Stream], None], stream: torch.cuda.Stream, device: torch.device, target: str
) -> Callable[[], None]:
    """Record what is enqueued on a stream, without running it.

    Args:
        enqueue: must allocate nothing on the GPU.
        stream: none of the default ones; idle.

    Returns:
        What launches it.

    Raises:
        MachineError: it does something that a graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    try:
        with torch.cuda.stream(stream):
            # Other threads may go on allocating.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                enqueue(stream)
            finally:
                graph.capture_end()
    except RuntimeError as error:
        raise MachineError(
            f"a call of the engine {target} can be captured into a CUDA graph",
            received=str(error).splitlines()[0],
            fix="load it without cuda_graphs",
        ) from error
    return graph.replay
