"""What calibration found, in a file: a bundle has one, and ``--scales FILE`` takes it for the next.

A safetensors file, of calibrated numbers alone:

    <linear>.input_amax        [] fp32     the largest |x| that the layer takes
    <linear>.pre_quant_scale   [in] fp32   what its input is multiplied by
    <call>.attention.<i>.amax  [3] fp32    the largest |Q|, |K| and |V| of a block's attention
    metadata                   format, spec, schemes (by linear layer), record (method, seed, samples)

They fit any checkpoint of the architecture, and are right for the one that they were calibrated on.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdit_deploy.atomic import written_together
from mmdit_deploy.checkpoint import SafetensorsFile, plan_layout, write_safetensors
from mmdit_deploy.checkpoint.strict_json import parse_json_object, quote
from mmdit_deploy.errors import MMDiTError, UsageError
from mmdit_deploy.precision import SCHEMES, AttentionScales, LinearPlan, Scheme, linears
from mmdit_deploy.precision.structure import attentions
from mmdit_deploy.spec import ModelSpec

FORMAT = "mmdit-deploy scales 1"
_AGAIN = "pass a bundle's calibration.safetensors, or calibrate again without --scales"


@dataclass(frozen=True)
class Scales:
    """Calibrated numbers of a model.

    Args:
        linears: by path.
        attentions: by call.
        record: what made them, as JSON: the recipe, the seed, what the samples were.
    """

    spec: ModelSpec
    linears: Mapping[str, LinearPlan]
    attentions: Mapping[str, tuple[AttentionScales, ...]]
    record: Mapping[str, Any] = field(default_factory=dict)


def write_scales(path: str | Path, scales: Scales) -> None:
    """Write the file; one that exists is replaced. Equal scales give equal bytes."""
    tensors = dict(_tensors(scales))
    metadata = {
        "format": FORMAT,
        "spec": json.dumps(scales.spec.to_json()),
        "schemes": json.dumps({path: plan.scheme.name for path, plan in scales.linears.items()}),
        "record": json.dumps(scales.record),
    }
    layout = plan_layout([(key, t.dtype, tuple(t.shape)) for key, t in tensors.items()], metadata)
    with written_together([Path(path)]) as (partial,):
        write_safetensors(partial, layout, tensors.items())


def read_scales(path: str | Path, spec: ModelSpec) -> Scales:
    """Read the file, and check that it is for this architecture and whole.

    Raises:
        CheckpointError: it is no safetensors file.
        UsageError: it is of another format or architecture, or a number is missing, unknown or not one that scales
            have.
    """
    file = SafetensorsFile(path)
    if file.metadata.get("format") != FORMAT:
        raise _unfit(file, f"say format = {FORMAT!r}", quote(file.metadata.get("format")))
    texts = {name: _object(file, name) for name in ("spec", "schemes", "record")}
    _check_spec(file, spec, texts["spec"])
    widths = {path: parameter.shape[1] for path, parameter in linears(spec).items()}
    schemes = _schemes(file, spec, texts["schemes"], widths)
    numbers = {key: _number(file, key) for key in file.tensors}
    plans = {}
    for name, scheme in schemes.items():
        wants = scheme.activations in ("tensor", "block")
        amax = _take(file, numbers, f"{name}.input_amax", ()) if wants else None
        factors = _take(file, numbers, f"{name}.pre_quant_scale", (widths[name],)) if scheme.smooth else None
        plans[name] = LinearPlan(scheme, None if amax is None else float(amax), factors)
    found: dict[str, tuple[AttentionScales, ...]] = {}
    for call, count in attentions(spec).items():
        keys = [f"{call}.attention.{i}.amax" for i in range(count)]
        if any(key in numbers for key in keys):
            found[call] = tuple(AttentionScales(*_take(file, numbers, key, (3,)).tolist()) for key in keys)
    if numbers:
        raise _unfit(file, "belong to layers that they name a scheme for", ", ".join(map(quote, sorted(numbers)[:3])))
    return Scales(spec, plans, found, texts["record"])


def _tensors(scales: Scales) -> list[tuple[str, Tensor]]:
    made = []
    for path, plan in scales.linears.items():
        if plan.input_amax is not None:
            made.append((f"{path}.input_amax", torch.tensor(plan.input_amax)))
        if plan.pre_quant_scale is not None:
            made.append((f"{path}.pre_quant_scale", plan.pre_quant_scale))
    for call, each in scales.attentions.items():
        for i, a in enumerate(each):
            made.append((f"{call}.attention.{i}.amax", torch.tensor([a.q_amax, a.k_amax, a.v_amax])))
    return made


def _object(file: SafetensorsFile, name: str) -> dict[str, Any]:
    what = f"{name} in the metadata of {file.path}"
    return parse_json_object(file.metadata.get(name, "").encode("utf-8", "surrogatepass"), what, _AGAIN)


def _check_spec(file: SafetensorsFile, spec: ModelSpec, text: dict[str, Any]) -> None:
    try:
        differs = spec.differences(ModelSpec.from_json(text))
    except (MMDiTError, TypeError, ValueError, AttributeError) as error:
        raise _unfit(file, "hold the spec of the model", type(error).__name__) from error
    if differs:
        received = ", ".join(f"{key} {theirs!r}, not {ours!r}" for key, (ours, theirs) in differs.items())
        raise _unfit(file, f"are of the architecture of {spec.name}", received)


def _schemes(
    file: SafetensorsFile, spec: ModelSpec, text: dict[str, Any], layers: Collection[str]
) -> dict[str, Scheme]:
    wrong = [p for p, name in text.items() if p not in layers or not isinstance(name, str) or name not in SCHEMES]
    if wrong:
        raise _unfit(file, f"name schemes of {spec.name}'s linear layers", quote({p: text[p] for p in wrong[:3]}))
    return {path: SCHEMES[name] for path, name in text.items()}


def _number(file: SafetensorsFile, key: str) -> Tensor:
    value = file.read(key)
    sound = value.dtype == torch.float32 and bool(value.isfinite().all()) and not bool((value < 0).any())
    if not sound or (key.endswith("pre_quant_scale") and not bool(value.all())):
        raise _unfit(file, "are finite fp32 numbers, none below 0, and no factor is 0", quote(key))
    return value


def _take(file: SafetensorsFile, numbers: dict[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    value = numbers.pop(key, None)
    if value is None or tuple(value.shape) != shape:
        received = "it is not there" if value is None else f"shape {list(value.shape)}"
        raise _unfit(file, f"hold {key} {list(shape)}", received)
    return value


def _unfit(file: SafetensorsFile, rule: str, received: str) -> UsageError:
    return UsageError(f"recorded scales {rule}", received=f"{received} (in {file.path})", fix=_AGAIN)
