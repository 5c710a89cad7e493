"""Attributes that a call of the function around a node gives: what they are differs from call to call."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter._pattern_ir import AttrPattern


def given_by_call(node: ir.Node) -> ir.Attr | None:
    """One of a node's attributes that is an attribute of the function around it."""
    return next((a for a in node.attributes.values() if a.is_ref()), None)


class Ints(AttrPattern):
    """A pattern: an attribute of just these ints. (onnxscript's own fails on what the function around gives.)"""

    def __init__(self, *numbers: int):
        super().__init__(None)
        self._numbers = numbers

    def matches(self, attr: ir.Attr) -> bool:
        """Whether a node's attribute is."""
        return not attr.is_ref() and attr.type == ir.AttributeType.INTS and tuple(attr.as_ints()) == self._numbers
