"""TensorRT engine files: deserialized, and their tensors compared with the record."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from mmdit_deploy.build import SegmentRecord
from mmdit_deploy.errors import MachineError
from mmdit_deploy.runtime.chain import unlike_record

# torch's names of those members of trt.DataType that a record may have
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "BOOL": "bool"}


def deserialize(trt: Any, runtime: Any, log: Any, record: SegmentRecord, file: Path, fix: str) -> Any:
    """Make an engine of its file.

    Through a mapping, so that its gigabytes never are this process's own memory. A stream reader in Python hands over
    copies, and takes longer and more memory than reading the file whole (NVIDIA/TensorRT issue 4327).

    Args:
        trt: the module.
        runtime: its `Runtime`.
        log: what it says goes there; of `error_log`.
        fix: the command that builds the engine again.

    Returns:
        The `ICudaEngine`.

    Raises:
        MachineError: TensorRT does not load it.
        BundleError: its tensors are not those of the record.
    """
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise MachineError(f"TensorRT {trt.__version__} loads {file.name}", received=log.last(), fix=fix)
    _check_tensors(trt, engine, record)
    return engine


def _check_tensors(trt: Any, engine: Any, record: SegmentRecord) -> None:
    """The engine reads and writes the addresses that it is given: its tensors must be those of the record."""
    expected = {
        spec.name: (mode, spec.dtype, len(spec.axes))
        for mode, specs in (("INPUT", record.inputs), ("OUTPUT", record.outputs))
        for spec in specs
    }
    found = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise unlike_record(record, f"{name} is in the host's memory")
        dtype, rank = engine.get_tensor_dtype(name).name, len(tuple(engine.get_tensor_shape(name)))
        found[name] = (engine.get_tensor_mode(name).name, _DTYPES.get(dtype, dtype), rank)
    if found != expected:
        names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        differing = "; ".join(f"{name}: {found.get(name)}, not {expected.get(name)}" for name in names)
        raise unlike_record(record, differing)


def error_log(trt: Any) -> Any:
    """Keeps what TensorRT says is wrong, for the message of the error that follows."""
    wrong = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 ends the process without
            self._said: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in wrong:
                self._said = [*self._said[-7:], message]

        def last(self) -> str:
            """What was said since this was last asked, the cause first."""
            said, self._said = self._said, []
            return " | ".join(said)[:600] or "it gave no reason"

    return Log()
