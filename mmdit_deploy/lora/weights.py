"""Weights with LoRAs merged into them, one tensor at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmdit_deploy.checkpoint import convert
from mmdit_deploy.checkpoint.keys import Part
from mmdit_deploy.checkpoint.weights import WeightSource
from mmdit_deploy.lora.delta import Delta
from mmdit_deploy.lora.lora import Lora


class LoraWeights:
    """A source of weights, and LoRAs that are added to it in fp32. Nothing is rounded here: who reads it does, once.

    Args:
        source: of the weights that the LoRAs were trained on.
        loras: opened for the same model; they add up.
    """

    def __init__(self, source: WeightSource, loras: Sequence[Lora]):
        self.source = source
        self.description = " + ".join([source.description, *(f"LoRA {lora.path} × {lora.scale:g}" for lora in loras)])
        self._deltas: dict[str, list[tuple[Delta, float]]] = {}
        for lora in loras:
            if lora.scale != 0:
                for key, delta in lora.deltas.items():
                    self._deltas.setdefault(key, []).append((delta, lora.scale))

    def part(self, part: Part) -> Tensor:
        """One canonical tensor: in fp32 where a LoRA changes it, and the source's very tensor where none does.

        Raises:
            CheckpointError: NaN or Inf in the LoRA or in what it is added to; it names the key.
        """
        base = self.source.part(part)
        deltas = self._deltas.get(part.key)
        if deltas is None:
            return base
        merged = convert(base, torch.float32, part.key)
        if merged is base:
            merged = base.clone(memory_format=torch.contiguous_format)
        matrix = merged.view(part.shape[0], -1)
        for delta, scale in deltas:
            delta.add(matrix, scale)
        return merged
