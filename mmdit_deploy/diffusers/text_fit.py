"""Does text, which encoders make in wider types, fit an fp16 engine? As infinity it would make a black image.

Steps bring the same tensors again, and to look at one waits for the GPU: each is looked at once, and again where it
was written to. Of tensors made in `torch.inference_mode`, torch does not count the writes: they are looked at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mmdit_deploy.errors import ContractError

_TEXTS = ("encoder_hidden_states", "pooled_projections")


class TextFit:
    """Which texts were seen to fit.

    Args:
        dtype: of the engine. Only fp16 has a narrower range than what encoders compute in.
    """

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._seen = WeakIdKeyDictionary()  # the version of a tensor that was looked at

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Check the texts among a call's arguments.

        Raises:
            ContractError: one has values beyond the type's range.
        """
        if self._dtype != torch.float16:
            return
        for name in _TEXTS:
            text = arguments.get(name)
            if text is None or text.dtype == self._dtype or not text.numel():
                continue
            if self._seen.get(text) == _version(text):
                continue
            most, allowed = float(text.abs().amax()), torch.finfo(self._dtype).max
            if most > allowed:
                raise ContractError(
                    f"{name} fits this engine's type, fp16: at most {allowed:.0f}",
                    received=f"{text.dtype} with {most:.4g}",
                    fix="export with --bf16",
                )
            self._seen[text] = _version(text)


def _version(tensor: Tensor) -> int:
    """How often it was written to; 0 where torch does not count that."""
    return 0 if tensor.is_inference() else tensor._version
