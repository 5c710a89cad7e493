"""ONNX's own checker, on a copy without weights: what ops there are, and which inputs and attributes they take.

    w = float32 [1536, 6144], 38 MB   ⇒   w = float32 [0]

So it copies no weight, and opens no file. It comes after our own checks, which see to all that concerns the weights.
"""

from __future__ import annotations

import onnx

from mmdit_deploy.errors import UsageError
from mmdit_deploy.graph.checks.external_data import is_external
from mmdit_deploy.graph.walk import model_tensors

_SMALL = 1024  # bytes
# Ops that ONNX does not know are left as they are: ONNX Runtime's optimizer writes some into ONNX's own domain.
_UNKNOWN_OP = "No Op registered for"


def check_with_onnx(model: onnx.ModelProto) -> None:
    """Let ONNX's checker look at a model.

    Args:
        model: one that `mmdit_deploy.graph.checks.well_formed` has checked.

    Raises:
        UsageError: the checker refuses it.
    """
    light = _without_weights(model)
    try:
        onnx.checker.check_model(light)
    except MemoryError:
        raise
    except Exception as error:  # a ValidationError, or what its parser says, which is stricter than Python's
        if _UNKNOWN_OP not in str(error):
            said = " ".join(str(error).replace("==>", "").split())
            raise UsageError(
                "the ONNX graph must be one that ONNX's checker accepts", received=said[:400],
                fix="get the file again, or export it again",
            ) from error  # fmt: skip


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = model.graph
    light = onnx.ModelProto(
        ir_version=model.ir_version,
        opset_import=model.opset_import,
        functions=model.functions,
        graph=onnx.GraphProto(
            name=graph.name,
            node=graph.node,
            input=graph.input,
            output=graph.output,
            value_info=graph.value_info,
            initializer=[_emptied(tensor) if _is_weight(tensor) else tensor for tensor in graph.initializer],
        ),
    )
    for tensor, _ in model_tensors(light):  # those of constants and branches
        if _is_weight(tensor):
            tensor.CopyFrom(_emptied(tensor))
    return light


def _is_weight(tensor: onnx.TensorProto) -> bool:
    return is_external(tensor) or tensor.ByteSize() > _SMALL


def _emptied(tensor: onnx.TensorProto) -> onnx.TensorProto:
    return onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0])
