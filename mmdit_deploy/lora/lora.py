"""A LoRA file, opened and checked against a model: what it changes, how strongly, and what of it is ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdit_deploy.checkpoint import SafetensorsFile
from mmdit_deploy.checkpoint.weight_files import name_some, read_json_file
from mmdit_deploy.errors import CheckpointError, UsageError
from mmdit_deploy.lora.alpha import config_in_metadata, read_config
from mmdit_deploy.lora.delta import Delta
from mmdit_deploy.lora.files import find_lora, sha256_of
from mmdit_deploy.lora.keys import Role, is_text_encoder, refuse_variants, split_key
from mmdit_deploy.lora.modules import Module, read_module
from mmdit_deploy.lora.targets import Target, resolve, targets
from mmdit_deploy.spec import ModelSpec

_LISTED = 20  # keys in a message
_MAX_SCALE = 1e6  # far beyond use, and far within fp32


@dataclass(frozen=True)
class Lora:
    """An open LoRA that fits a model.

    Args:
        path: as given.
        sha256: of the file with the tensors.
        scale: how many times it is added.
        modules: by name, as the file calls them, without prefix.
        ignored: tensors of text encoders.
    """

    path: Path
    sha256: str
    scale: float
    modules: Mapping[str, Module]
    ignored: tuple[str, ...]

    @property
    def deltas(self) -> dict[str, Delta]:
        """What is added, by canonical key."""
        return {key: delta for module in self.modules.values() for key, delta in module.deltas}

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({m.rank for m in self.modules.values() if m.rank is not None}))

    @property
    def alphas(self) -> tuple[float, ...]:
        """Those that were used: the rank, where the file does not say."""
        used = {m.rank if m.alpha is None else m.alpha for m in self.modules.values()}
        return tuple(sorted(float(alpha) for alpha in used if alpha is not None))

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, in lines."""
        many = f"{_count(len(self.modules), 'module')}, {_count(len(self.deltas), 'tensor')} changed"
        lines = [f"lora: {self.path} × {self.scale:g}: {many}, rank {_list(self.ranks)}, alpha {_list(self.alphas)}"]
        if self.ignored:
            lines.append(f"lora: {self.path}: {_count(len(self.ignored), 'tensor')} of text encoders ignored")
        unknown = sum(m.rank is not None and m.alpha is None for m in self.modules.values())
        if unknown:
            which = _count(unknown, "module")
            lines.append(f"warning: {self.path} does not say alpha for {which}: taken to be the rank")
        return tuple(lines)

    def to_json(self) -> dict[str, Any]:
        """What a bundle's manifest says about it."""
        return {
            "file": str(self.path),
            "resolved": str(self.path.resolve()),
            "sha256": self.sha256,
            "scale": self.scale,
            "ranks": list(self.ranks),
            "alphas": list(self.alphas),
            "keys": sorted(self.deltas),
            "ignored_text_encoder_keys": len(self.ignored),
        }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _list(numbers: tuple[float, ...]) -> str:
    return ", ".join(f"{number:g}" for number in numbers) or "–"


def open_lora(path: str | Path, spec: ModelSpec, scale: float = 1.0) -> Lora:
    """Open a LoRA and check that all of it can be merged into a model. Its factors are mapped, not read.

    Args:
        path: a safetensors file, or the folder that PEFT or diffusers saved.
        spec: of the model.
        scale: how many times it is added; may be negative, and 0 leaves the weights as they are.

    Raises:
        CheckpointError: the file is broken, is no plain LoRA, or does not fit the model; it names the keys.
        UsageError: the scale is no number of a sensible size.
    """
    if not abs(scale) <= _MAX_SCALE:
        raise UsageError(
            f"the scale of a LoRA is a number from -{_MAX_SCALE:g} to {_MAX_SCALE:g}",
            received=f"{path}: {scale:g}",
            fix="1 adds it as it was trained",
        )
    weights, config_file = find_lora(Path(path))
    file = SafetensorsFile(weights)
    ignored = tuple(key for key in file.tensors if is_text_encoder(key))
    keys = [key for key in file.tensors if not is_text_encoder(key)]
    refuse_variants(keys, str(weights))
    found = _modules(keys, targets(spec), file, spec)
    stored = config_file and read_config(read_json_file(config_file), str(config_file))
    config = stored or config_in_metadata(file)
    modules = {name: read_module(name, roles, target, file, config) for name, (target, roles) in found.items()}
    _check_apart(modules, file)
    return Lora(Path(path), sha256_of(weights), scale, modules, ignored)


def _modules(
    keys: list[str], table: Mapping[str, Target], file: SafetensorsFile, spec: ModelSpec
) -> dict[str, tuple[Target, dict[Role, str]]]:
    """The tensors by module and role."""
    found: dict[str, tuple[Target, dict[Role, str]]] = {}
    unknown = []
    for key in keys:
        split = split_key(key)
        module = split and resolve(split[0], table)
        if split is None or module is None:
            unknown.append(key)
            continue
        name, target = module
        roles = found.setdefault(name, (target, {}))[1]
        if split[1] in roles:
            raise _twice(file, name_some([key, roles[split[1]]]))
        roles[split[1]] = key
    if unknown or not found:
        raise CheckpointError(
            f"every tensor of {file.path} must belong to a module of {spec.name}, or to a text encoder",
            received=f"{len(unknown)} of {len(keys)} do not: {name_some(unknown, _LISTED)}" if unknown else "no others",
            fix="check that the LoRA was trained on this model",
        )
    return found


def _check_apart(modules: Mapping[str, Module], file: SafetensorsFile) -> None:
    """No tensor is changed under two names: a file that holds one LoRA in two layouts would be added twice."""
    changed: dict[str, str] = {}
    for name, module in modules.items():
        for key, _ in module.deltas:
            if key in changed:
                raise _twice(file, f"{name_some([name, changed[key]])}: both change {key}")
            changed[key] = name


def _twice(file: SafetensorsFile, received: str) -> CheckpointError:
    return CheckpointError(
        f"{file.path} must hold each change once", received=received, fix="keep one of them in the file"
    )
