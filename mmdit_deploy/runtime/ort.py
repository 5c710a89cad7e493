"""ONNX Runtime sessions over torch tensors: the tensors' own memory, no copies."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmdit_deploy.build import Target, parse_target
from mmdit_deploy.errors import MachineError, MissingPackageError
from mmdit_deploy.runtime.fit import check_gpu, gpu

if TYPE_CHECKING:
    import onnxruntime

# TensorProto.DataType, by torch dtype (onnx.proto)
_ONNX_TYPE = {
    torch.float32: 1,
    torch.bool: 9,
    torch.float16: 10,
    torch.bfloat16: 16,
}
# What a model's time goes into: products, attention, norms and activations of all tokens. Beside them, ONNX Runtime
# puts nodes on the CPU on purpose (arithmetic on shapes), or for want of a CUDA kernel of that opset (Sin and Cos of
# opset 22, ReduceMax of 20: the tables of timesteps and positions): session.disable_cpu_ep_fallback would refuse them.
_MODEL_OPS = frozenset(
    {
        "Attention",
        "BiasGelu",
        "FastGelu",
        "FusedGemm",
        "FusedMatMul",
        "Gelu",
        "Gemm",
        "LayerNormalization",
        "MatMul",
        "MultiHeadAttention",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "Softmax",
    }
)


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


def check_provider(target: Target) -> Any:
    """Check that a target's execution provider is installed, and has its device.

    Returns:
        The onnxruntime package.

    Raises:
        MissingPackageError: onnxruntime is not installed.
        MachineError: it lacks the provider, or there is no GPU.
    """
    ort = import_onnxruntime(target.name)
    if target.provider not in ort.get_available_providers():
        raise MachineError(
            f"the target {target.name} runs on ONNX Runtime's {target.provider}",
            received=f"this installation has {', '.join(ort.get_available_providers())}",
            fix="on a machine with an NVIDIA GPU: pip install 'mmdit-deploy[gpu]'",
        )
    # ONNX Runtime lists the CUDA provider that it was built with, also where there is no GPU.
    if target.device == "cuda":
        check_gpu(f"the target {target.name} needs an NVIDIA GPU")
    return ort


def open_session(
    model: Path | bytes,
    target: str,
    *,
    weights_folder: Path | None = None,
    device: torch.device | None = None,
    in_turn: bool = False,
) -> onnxruntime.InferenceSession:
    """A session on the target's execution provider, and on no other.

    Args:
        model: the graph's file, or its bytes.
        target: ``ort-cpu`` or ``ort-cuda``.
        weights_folder: where a graph given as bytes finds its weights file.
        device: the GPU; by default torch's current one.
        in_turn: another session's runs come between this one's. Its threads then leave the cores when a run is over;
            otherwise they spin for a while, which makes the next run of this one a little shorter, and the other's
            much longer (calls with all inputs in bench/split_conditioning.py).

    Raises:
        MissingPackageError: onnxruntime is not installed.
        MachineError: the provider is not available here, the graph does not load, or ONNX Runtime would run the model
            on another provider than asked for.
    """
    parsed = parse_target(target)
    ort = check_provider(parsed)
    provider = parsed.provider
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Q/DQ are to be computed as they are written: what ONNX Runtime makes of them on CPU fails to load with FP8, and
    # for INT4 weights rounds the input to INT8, which nobody planned.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if in_turn:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if weights_folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights_folder))
    provider_options: dict[str, str] = {}
    if parsed.device == "cuda":
        index = torch.cuda.current_device() if device is None or device.index is None else device.index
        provider_options["device_id"] = str(index)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    source = model if isinstance(model, bytes) else os.fspath(model)
    try:
        # Its own fallback prints to standard output and tries again on the CPU.
        session = ort.InferenceSession(source, options, providers=[(provider, provider_options)], enable_fallback=0)
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
    if parsed.device == "cuda":
        _check_assignment(session, parsed, ort.__version__)
    return session


def _check_assignment(session: onnxruntime.InferenceSession, target: Target, version: str) -> None:
    """That the provider got the model, and not the CPU for want of kernels."""
    elsewhere = Counter(
        node.op_type
        for subgraph in session.get_provider_graph_assignment_info()
        if subgraph.ep_name != target.provider
        for node in subgraph.get_nodes()
        if node.op_type in _MODEL_OPS
    )
    if elsewhere:
        counts = ", ".join(f"{count} {op}" for op, count in sorted(elsewhere.items()))
        raise MachineError(
            f"the target {target.name} runs the model on {target.provider} or not at all",
            received=f"ONNX Runtime {version} has no kernel there for {counts}, and would run them on the CPU",
            fix="install a newer onnxruntime-gpu, or export with --fp16",
        )


def run_session(
    session: onnxruntime.InferenceSession,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    into: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Run once, reading inputs from and writing outputs to torch memory.

    Args:
        inputs: by the session's names.
        outputs: name, dtype and shape of each output.
        into: contiguous tensors to write to, by output name; new ones on the first input's device for the others.

    Returns:
        The outputs by name. Inputs are never written to.
    """
    binding = session.io_binding()
    device = next(iter(inputs.values())).device
    held = _bind_inputs(binding, inputs)
    results = {}
    for name, dtype, shape in outputs:
        given = (into or {}).get(name)
        results[name] = torch.empty(shape, dtype=dtype, device=device) if given is None else given
        binding.bind_output(
            name, device.type, device.index or 0, _ONNX_TYPE[dtype], list(shape), results[name].data_ptr()
        )
    for used in {tensor.device for tensor in inputs.values()}:
        if used.type == "cuda":
            torch.cuda.current_stream(used).synchronize()  # ONNX Runtime has a stream of its own
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    del held
    return results


def run_for(
    session: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, Tensor]:
    """Run once for outputs whose sizes are not known beforehand.

    Args:
        inputs: by the session's names.
        names: outputs wanted; none in bf16, which numpy does not have.

    Returns:
        The outputs by name, on the CPU.
    """
    binding = session.io_binding()
    held = _bind_inputs(binding, inputs)
    for name in names:
        binding.bind_output(name, "cpu")
    session.run_with_iobinding(binding)
    del held
    return {name: torch.from_numpy(v.numpy()) for name, v in zip(names, binding.get_outputs(), strict=True)}


def _bind_inputs(binding: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Bind the tensors' own memory.

    Returns:
        What must outlive the run: contiguous copies, where a tensor was none.
    """
    held = []
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
    return held


class OrtRunner:
    """A graph that ONNX Runtime runs. Each run waits for torch's current stream, and the host for the run.

    A session may run several calls at once; what is bound to it is bound anew in each.

    Args:
        graph: the file, beside its weights.
        device: of the target's kind; by default torch's current one.
        in_turn: as for `open_session`.

    Raises:
        MissingPackageError, MachineError: as `open_session` does.
    """

    def __init__(self, graph: Path, target: Target, device: torch.device | None = None, *, in_turn: bool = False):
        check_provider(target)
        # As tensors name it: a GPU with its number, the CPU without ("cpu:0" equals no tensor's device).
        self._device = gpu(device) if target.device == "cuda" else torch.device("cpu")
        self._session: onnxruntime.InferenceSession | None = open_session(
            graph, target.name, device=self._device, in_turn=in_turn
        )
        self._target = target.name

    @property
    def device(self) -> torch.device:
        """Where inputs and outputs are."""
        return self._device

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
        """Run once.

        Args:
            inputs: by name; they are never written to.
            outputs: contiguous tensors to write to, by name.
            sizes: what the shapes say already.

        Raises:
            MachineError: it was closed.
        """
        session = self._session  # another thread may close it meanwhile
        if session is None:
            raise MachineError(f"the engine {self._target} is loaded", received="it was closed", fix="load it")
        run_session(session, inputs, [(name, t.dtype, tuple(t.shape)) for name, t in outputs.items()], outputs)

    def close(self) -> None:
        """Free the session, when the last call that still runs has returned. It cannot be run again."""
        self._session = None
