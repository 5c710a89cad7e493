"""LoRAs: low-rank changes of weights, merged into a checkpoint while it is streamed.

W' = W + scale · (alpha / rank) · B·A (Hu et al. 2021, arXiv:2106.09685), computed in fp32, before weights are rounded
or quantized. What is not understood is refused, never dropped: a LoRA that is half applied looks like one that works.
"""

from __future__ import annotations

from mmdit_deploy.lora.argument import parse_lora
from mmdit_deploy.lora.lora import Lora, open_lora
from mmdit_deploy.lora.record import open_recorded
from mmdit_deploy.lora.weights import LoraWeights

__all__ = ["Lora", "LoraWeights", "open_lora", "open_recorded", "parse_lora"]
