"""How figures, cases, bounds and names are written, alike in every report."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

from mmdit_deploy.verify.records import Case, Check, Errors

METRICS = {
    "rel_l2": "rel-L2",
    "cosine": "cosine",
    "max_abs": "max-abs",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
}


def printable(text: str) -> str:
    """One line that any terminal, XML file or page can hold.

    Names and paths come from files. Control characters could steer a terminal, and XML 1.0 can hold neither
    them nor lone surrogates and noncharacters, however escaped. A space stands for white space, U+FFFD
    for the rest.
    """
    return "".join(_printable(char) for char in text).strip()


def _printable(char: str) -> str:
    if char.isspace():
        return " "
    # Cf holds the bidirectional overrides, with which a name could disguise itself.
    return "\N{REPLACEMENT CHARACTER}" if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Cn") else char


def figure(value: float) -> str:
    """An error in three digits: ``1.23e-03``; 0 only if it is exactly 0."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return "0" if value == 0 else f"{value:.2e}"


def cosine_figure(value: float) -> str:
    """A cosine in nine decimals: fp32 is judged on the seventh."""
    return f"{value:.9f}" if math.isfinite(value) else figure(value)


def errors_words(errors: Errors) -> str:
    """All figures of one comparison, in a line."""
    if errors.nonfinite:
        return f"{errors.nonfinite} values are NaN or Inf"
    cosine, max_abs = cosine_figure(errors.cosine), figure(errors.max_abs)
    words = f"rel-L2 {figure(errors.rel_l2)}, cosine {cosine}, max-abs {max_abs}"
    image = image_words(errors)
    return f"{image}; {words}" if image else words


def image_words(errors: Errors) -> str:
    """What is measured of images alone: ``PSNR 41.2 dB, SSIM 0.9912``; empty of what is none."""
    measured = {name: getattr(errors, name) for name in ("psnr", "ssim", "lpips")}
    return ", ".join(
        f"{METRICS[name]} {_written(name, value)}" for name, value in measured.items() if value is not None
    )


def times(multiple: float | None) -> str:
    """A multiple of the noise floor: ``1.3 ×``; a dash where it is not known."""
    if multiple is None:
        return "–"
    if not math.isfinite(multiple):
        return figure(multiple)
    return f"{multiple:.0f} ×" if multiple >= 99.5 else f"{multiple:.2g} ×"


def case_words(case: Case) -> str:
    """A case, short enough for a table."""
    img = f"{case.rows}\N{MULTIPLICATION SIGN}{case.cols}"
    return f"batch {case.batch}, {img} img, {case.txt_tokens} txt, t={case.timestep:g}"


def duration(seconds: float) -> str:
    """Wall time as a person says it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def bounds(tolerance: Mapping[str, Any]) -> str:
    """The bounds of a tolerance, without its reason: ``cosine ≥ 0.9999, rel-L2 ≤ 0.005``."""
    return ", ".join(
        f"{METRICS[metric]} {'≥' if side == 'min' else '≤'} {bound:.12g}" for side, metric, bound in _sides(tolerance)
    )


def breaches(check: Check, tolerance: Mapping[str, Any]) -> str:
    """Which bounds a check breaks: ``rel-L2 1.20e-01 > 0.005``. If none, the figures; of a call's value, its name."""
    errors, where = check.errors, f"{printable(check.value)}: " if check.value else ""
    if errors.nonfinite:
        return where + errors_words(errors)
    broken = []
    for side, metric, bound in _sides(tolerance) if check.binding else ():
        value = getattr(errors, metric)
        if value is None:
            broken.append(f"{METRICS[metric]} was not measured, bound {bound:.12g}")
        elif not (value >= bound if side == "min" else value <= bound):
            relation = "is not a number, bound" if math.isnan(value) else "<" if side == "min" else ">"
            broken.append(f"{METRICS[metric]} {_written(metric, value)} {relation} {bound:.12g}")
    return where + ("; ".join(broken) or errors_words(errors))


def machine_words(machine: Mapping[str, Any]) -> str:
    """A machine in a line, of what is known of it: processor; GPU, driver and CUDA; versions. Empty if nothing is."""
    fields = dict(machine)
    system, cpu, cores, memory = (fields.pop(name, None) for name in ("system", "cpu", "cores", "memory_gb"))
    gpu, driver, cuda = (fields.pop(name, None) for name in ("gpu", "driver", "cuda"))
    groups = (
        (system, cpu, cores and f"{cores} cores", memory and f"{memory} GB"),
        (gpu or (machine and "torch finds no GPU"), driver and f"driver {driver}", cuda and f"CUDA {cuda}"),
        tuple(f"{name} {version}" for name, version in fields.items()),
    )
    return "; ".join(", ".join(str(part) for part in group if part) for group in groups if any(group))


def _written(metric: str, value: float) -> str:
    if metric == "cosine":
        return cosine_figure(value)
    if not math.isfinite(value) or metric in ("rel_l2", "max_abs"):
        return figure(value)
    return f"{value:.1f} dB" if metric == "psnr" else f"{value:.4f}"


def _sides(tolerance: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """(min or max, metric, bound) for every bound: the keys of a tolerance say what they bind."""
    pairs = [(side, metric) for metric in METRICS for side in ("min", "max")]
    return [(s, m, tolerance[f"{s}_{m}"]) for s, m in pairs if f"{s}_{m}" in tolerance]
