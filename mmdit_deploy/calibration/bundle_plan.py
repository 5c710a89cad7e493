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
    wide = _wide(bundle.manifest.fields.get("precision_plan"), bundle)
    if not bundle.precision.quantized:
        return PrecisionPlan(bundle.precision, wide=wide)
    scales = read_scales(bundle.file(CALIBRATION), bundle.spec)
    return PrecisionPlan(bundle.precision, scales.linears, scales.attentions, wide)


def _wide(field: Any, bundle: Bundle) -> dict[str, frozenset[str]]:
    """By call, from the manifest; nothing in bundles of earlier versions."""
    if field is None:
        return {}
    found = field.get("wide", {}) if isinstance(field, dict) else None
    if not isinstance(found, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in found.values()
    ):
        raise BundleError(
            f"the precision_plan of {bundle.path} names the values that stay in fp32 by call",
            received=ascii(field)[:120],
            fix="copy the bundle again, or export it again",
        )
    return {call: frozenset(names) for call, names in found.items()}
