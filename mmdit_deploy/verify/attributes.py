"""What a node of a graph says and hardly any input shows: the epsilon of a norm, the spelling of a GELU.

Behind a variance of about 1, an epsilon of 1e-5 in the place of 1e-6 moves a norm by 5e-6, and GELU's two spellings
differ by 5e-4: nothing at 16 bits. Where a channel is all but silent, or after many steps, it matters all the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from mmdit_deploy.errors import GraphError
from mmdit_deploy.model.layers import EPS

_NORMS = ("LayerNormalization", "RMSNormalization")
_CLOSE = 1e-6  # attributes are fp32, and EPS is not


def check_attributes(model: onnx.ModelProto) -> None:
    """Compare every norm and GELU with the model's.

    Raises:
        GraphError: the first node that says something else.
    """
    for function in model.functions:
        for rule, received in wrong_attributes(function):
            raise GraphError(f"in {function.name}, {rule}", received=received, fix=FIX)


def wrong_attributes(function: onnx.FunctionProto) -> Iterator[tuple[str, str]]:
    """What nodes of a function should say, and what they say."""
    for node in function.node:
        said = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if not a.ref_attr_name}
        if node.op_type in _NORMS:
            epsilon = said.get("epsilon", 1e-5)  # ONNX's default
            if abs(epsilon - EPS) > _CLOSE * EPS:
                yield f"the norm that makes {node.output[0]} must have an epsilon of {EPS:g}", f"{epsilon:g}"
        elif node.op_type == "Gelu":
            spelling = said.get("approximate", b"none").decode()
            if spelling != "tanh":
                yield f"the GELU that makes {node.output[0]} must be tanh's approximation", repr(spelling)


FIX = "export the bundle again; if that does not help, report this as a bug"
