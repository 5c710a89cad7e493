"""The plan of a bundle, read back: what it was made with, to the bit, so that weights can be quantized again."""

from __future__ import annotations

from typing import Any

from mmdit_deploy.bundle import Bundle
from mmdit_deploy.calibration.scales_file import read_scales
from mmdit_deploy.errors import BundleError
from mmdit_deploy.precision import PrecisionPlan

CALIBRATION = "calibration.safetensors"  # of bundles with quantized layers: their scales, reusable with --scales


def bundle_plan(bundle: Bundle) -> PrecisionPlan:
    """The precision plan that a bundle was made with.

    Raises:
        BundleError: the manifest says of wide values what it cannot, or the scales are not there.
        UsageError: the scales are of another model.
    """
    field: Any = bundle.manifest.fields.get("precision_plan", {})  # nothing in bundles of earlier versions
    wide, bf16 = (field.get("wide", {}), field.get("bf16_attentions", [])) if isinstance(field, dict) else (None, None)
    if not isinstance(wide, dict) or not _are_names(bf16) or not all(map(_are_names, wide.values())):
        raise BundleError(
            f"the precision_plan of {bundle.path} names the values that stay in fp32 by call",
            received=ascii(field)[:120],
            fix="copy the bundle again, or export it again",
        )
    islands = {call: frozenset(names) for call, names in wide.items()}
    if not bundle.precision.quantized:
        return PrecisionPlan(bundle.precision, wide=islands, bf16_attentions=tuple(bf16 or ()))
    scales = read_scales(bundle.file(CALIBRATION), bundle.spec)
    return PrecisionPlan(bundle.precision, scales.linears, scales.attentions, islands, tuple(bf16 or ()))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
