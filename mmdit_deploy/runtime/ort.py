"""ONNX Runtime sessions over torch tensors: the tensors' own memory, no copies."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmdit_deploy.errors import MachineError, MissingPackageError

if TYPE_CHECKING:
    import onnxruntime

# TensorProto.DataType, by torch dtype (onnx.proto)
_ONNX_TYPE = {
    torch.float32: 1,
    torch.bool: 9,
    torch.float16: 10,
    torch.bfloat16: 16,
}
PROVIDERS = {"ort-cpu": "CPUExecutionProvider", "ort-cuda": "CUDAExecutionProvider"}
DEVICES = {"ort-cpu": "cpu", "ort-cuda": "cuda"}  # of torch, where a target's inputs are


def import_onnxruntime(target: str) -> Any:
    """The onnxruntime package, in whichever of its builds is installed.

    Raises:
        MissingPackageError: neither is; it names the extra to install. The two overwrite each other, so the base
            installation has none.
    """
    try:
        import onnxruntime
    except ImportError:
        extra = "gpu" if target == "ort-cuda" else "cpu"
        raise MissingPackageError(
            "onnxruntime", purpose=f"the target {target}", install=f"pip install 'mmdit-deploy[{extra}]'"
        ) from None
    return onnxruntime


def open_session(
    model: Path | bytes, target: str, *, weights_folder: Path | None = None
) -> onnxruntime.InferenceSession:
    """A session on the target's execution provider, and on no other.

    Args:
        model: the graph's file, or its bytes.
        target: ``ort-cpu`` or ``ort-cuda``.
        weights_folder: where a graph given as bytes finds its weights file.

    Raises:
        MissingPackageError: onnxruntime is not installed.
        MachineError: the provider is not available here, or the graph does not load.
    """
    ort = import_onnxruntime(target)
    provider = PROVIDERS[target]
    if provider not in ort.get_available_providers():
        raise MachineError(
            f"the target {target} runs on ONNX Runtime's {provider}",
            received=f"this installation has {', '.join(ort.get_available_providers())}",
            fix="on a machine with an NVIDIA GPU: pip install 'mmdit-deploy[gpu]'",
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if weights_folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(weights_folder)
        )
    source = model if isinstance(model, bytes) else os.fspath(model)
    try:
        session = ort.InferenceSession(source, options, providers=[provider])
    except Exception as error:  # ONNX Runtime raises bare classes of its binding
        raise MachineError(
            f"ONNX Runtime {ort.__version__} could not load the graph",
            received=str(error).strip()[:600],
            fix="check that the bundle fits this version (mmdit-inspect BUNDLE)",
        ) from error
    if session.get_providers()[0] != provider:
        raise MachineError(
            f"the target {target} runs on {provider} or not at all",
            received=f"ONNX Runtime fell back to {session.get_providers()[0]}",
            fix="check the CUDA driver and libraries of this machine",
        )
    return session


def run_session(
    session: onnxruntime.InferenceSession,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
) -> dict[str, Tensor]:
    """Run once, reading inputs from and writing outputs to torch memory.

    Args:
        inputs: by the session's names.
        outputs: name, dtype and shape of each output.

    Returns:
        New tensors on the first input's device. Inputs are never written to.
    """
    binding = session.io_binding()
    device = next(iter(inputs.values())).device
    held = []  # contiguous copies must outlive the run
    for name, tensor in inputs.items():
        contiguous = tensor.contiguous()
        held.append(contiguous)
        binding.bind_input(
            name,
            tensor.device.type,
            tensor.device.index or 0,
            _ONNX_TYPE[tensor.dtype],
            list(tensor.shape),
            contiguous.data_ptr(),
        )
    results = {}
    for name, dtype, shape in outputs:
        results[name] = torch.empty(shape, dtype=dtype, device=device)
        binding.bind_output(
            name, device.type, device.index or 0, _ONNX_TYPE[dtype], list(shape), results[name].data_ptr()
        )
    for used in {tensor.device for tensor in inputs.values()}:
        if used.type == "cuda":
            torch.cuda.current_stream(used).synchronize()  # ONNX Runtime has a stream of its own
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    return results
