"""Which bytes of the weights file a graph reads: what is resident while an engine of it is loaded."""

from __future__ import annotations

from collections import defaultdict

import onnx

from mmdit_deploy.graph.checks.external_data import is_external
from mmdit_deploy.graph.walk import model_tensors


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes beside the file that a graph's tensors lie in, each once: spans may overlap, or be read as two tensors."""
    spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for tensor, _ in model_tensors(model):
        if is_external(tensor):
            said = {entry.key: entry.value for entry in tensor.external_data}
            begin = _number(said.get("offset", "0"))
            spans[said.get("location", "")].append((begin, begin + _number(said.get("length", ""))))
    return sum(map(_covered, spans.values()))


def _number(text: str) -> int:
    """A count of bytes; what is none counts as nothing, as in `external_files`."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else 0


def _covered(spans: list[tuple[int, int]]) -> int:
    """How much spans cover together."""
    total = reached = 0
    for begin, end in sorted(spans):
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return total
