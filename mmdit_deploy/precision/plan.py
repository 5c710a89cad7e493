"""What is decided for each linear layer, attention and value: the input of the graph's precision passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from mmdit_deploy.precision.schemes import Scheme
from mmdit_deploy.spec import Precision


@dataclass(frozen=True)
class LinearPlan:
    """How one linear layer is quantized, with what calibration found.

    Args:
        scheme: one of `SCHEMES`.
        input_amax: largest |x| that calibration says the layer takes, after smoothing. INT8 saturates beyond it, FP8
            and FP4 beyond twice as much: floats have an octave to spare. None where it is found while running.
        pre_quant_scale: of a smoothed input: [in] fp32, what it is multiplied by.
    """

    scheme: Scheme
    input_amax: float | None = None
    pre_quant_scale: Tensor | None = None


@dataclass(frozen=True)
class AttentionScales:
    """Largest magnitudes of Q, K and V at one FP8 attention, after norms and RoPE; Q before its scale 1/√D."""

    q_amax: float
    k_amax: float
    v_amax: float


@dataclass(frozen=True)
class PrecisionPlan:
    """The precision of a model, tensor by tensor.

    Args:
        precision: the compute type, and the name of what is quantized on top of it.
        linears: how linear layers are quantized, by path in `MMDiT` (``blocks.3.img.mlp.up``); those that are not named
            are in the compute type.
        attentions: by call (``blocks.3``): its FP8 attentions, in the order of the block; the others are in the compute
            type.
        wide: by call: the values of its function that stay in fp32, by their names in the standard graph's function.
        bf16_attentions: calls whose attention reads wide values: it is computed in bf16, for none is fused in fp32.
    """

    precision: Precision
    linears: Mapping[str, LinearPlan] = field(default_factory=dict)
    attentions: Mapping[str, tuple[AttentionScales, ...]] = field(default_factory=dict)
    wide: Mapping[str, frozenset[str]] = field(default_factory=dict)
    bf16_attentions: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether everything is in the compute type."""
        return not (self.linears or self.attentions or self.wide)
