"""Models as fixtures: the graph is kept, the weights are not.

Large tensors become external data of a file that is not there, so that nothing can read them while it optimizes; `fill`
makes them up where a model is to run. Small ones stay: shapes, scalars and tables are part of the graph.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

WEIGHTS = "weights.bin"
LARGEST_KEPT = 64  # elements


def strip(model: onnx.ModelProto) -> onnx.ModelProto:
    """Take the large tensors out, in place."""
    offset = 0
    for tensor in list(_large_floats(model)):
        nbytes = numpy_helper.to_array(tensor).nbytes
        name, dims, data_type = tensor.name, tuple(tensor.dims), tensor.data_type
        tensor.Clear()
        tensor.name, tensor.data_type, tensor.data_location = name, data_type, onnx.TensorProto.EXTERNAL
        tensor.dims.extend(dims)
        for key, value in (("location", WEIGHTS), ("offset", offset), ("length", nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        offset += nbytes
    return model


def write(model: onnx.ModelProto, path: Path) -> None:
    """Write a model without weights; the same model gives the same bytes."""
    path.write_bytes(gzip.compress(model.SerializeToString(deterministic=True), mtime=0))


def read(path: Path) -> onnx.ModelProto:
    """Read what `write` wrote."""
    return onnx.ModelProto.FromString(gzip.decompress(path.read_bytes()))


def fill(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make up the weights that `strip` took out, in place: the same each time, none too large or small.

    They follow from where each would lie in the file, so they are the same before and after optimization.
    """
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
            values = np.random.default_rng(offset).standard_normal(tuple(tensor.dims), dtype=np.float32)
            # Biases and the weights of norms are vectors, or rows.
            vector = len(tensor.dims) < 2 or max(tensor.dims) == np.prod(tensor.dims)
            values = 0.7 + values / 5 if vector else values / np.sqrt(max(tensor.dims))
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            tensor.CopyFrom(numpy_helper.from_array(values.astype(dtype), tensor.name))
    return model


def _large_floats(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    return (t for t in model.graph.initializer if t.data_type in floats and np.prod(t.dims) > LARGEST_KEPT)
