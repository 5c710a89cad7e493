"""The weight files of a diffusers folder: which to read, what the index says, and which kinds are refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdit_deploy.checkpoint.safetensors_file import SafetensorsFile
from mmdit_deploy.checkpoint.strict_json import parse_json_object, quote
from mmdit_deploy.errors import CheckpointError

WEIGHTS_STEM = "diffusion_pytorch_model"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
_MAX_JSON_BYTES = 64 * 2**20  # an index of 100,000 keys takes about 10 MB
PASS_CHECKPOINT = (
    "pass a diffusers folder (config.json with diffusion_pytorch_model.safetensors), or one .safetensors file"
)
_AGAIN = "get the folder again (hf download), or save it again with save_pretrained"

# variant in a name: diffusion_pytorch_model.fp16.safetensors, ….safetensors.index.fp16.json
_SINGLE = re.compile(rf"{WEIGHTS_STEM}(?:\.([^.]+))?\.safetensors")
_INDEX = re.compile(rf"{WEIGHTS_STEM}(?:\.([^.]+))?\.safetensors\.index(?:\.([^.]+))?\.json")


def name_some(names: Iterable[str], limit: int = 8) -> str:
    """Lists untrusted names in a message, the first few and how many more."""
    listed = sorted(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(quote(name) for name in listed[:limit]) + more


def _refuse_pickle(path: Path, received: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: pickle checkpoints are not read, because loading a pickle executes code "
        "(CVE-2025-32434: even with weights_only before torch 2.6)",
        received=received,
        fix="where you trust it, load it in diffusers and save_pretrained(..., safe_serialization=True)",
    )


def is_gguf(path: Path) -> bool:
    """Whether a file is one of llama.cpp's, by its name or its first bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False  # a folder, or one that the reader of its kind says more about


def refuse_file(path: Path) -> CheckpointError:
    """Says why one file is not a checkpoint that we read, and what to pass instead."""
    suffix = path.suffix.lower()
    if is_gguf(path):  # first: whatever its name
        return CheckpointError(
            f"{path}: GGUF files are not read: their weights come quantized, in blocks that no engine runs",
            received="a GGUF file",
            fix="pass the diffusers folder or the .safetensors file that it was made from",
        )
    if suffix in PICKLE_SUFFIXES:
        return _refuse_pickle(path, f"a {suffix} file")
    beside = (path.parent / "config.json").is_file()
    return CheckpointError(
        "a checkpoint must be a folder, or a .safetensors file",
        received=f"the file {path}",
        fix=f"pass its folder: {path.parent}" if beside else PASS_CHECKPOINT,
    )


def read_json_file(path: Path) -> dict[str, Any]:
    """Reads a file with one JSON object; a `CheckpointError` says what is wrong with it."""
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} must be readable", received=str(error), fix=_AGAIN) from error
    if len(raw) > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path} must have at most {_MAX_JSON_BYTES} bytes", received="a larger file", fix=_AGAIN)
    return parse_json_object(raw, str(path), _AGAIN)


def lacking(folder: Path, rule: str) -> CheckpointError:
    """The error for a folder that lacks something: pickle and GGUF weights get their own reason."""
    names = [p.name for p in folder.iterdir()]
    suffixes = {Path(name).suffix.lower() for name in names}
    if not suffixes.intersection(SAFETENSORS_SUFFIXES):
        for name in sorted(names):
            if Path(name).suffix.lower() in PICKLE_SUFFIXES or is_gguf(folder / name):
                return refuse_file(folder / name)
    lone = [name for name in names if Path(name).suffix.lower() in SAFETENSORS_SUFFIXES]
    fix = f"pass the file itself: {folder / lone[0]}" if len(lone) == 1 else PASS_CHECKPOINT
    return CheckpointError(rule, received=f"the files {name_some(names) or '(none)'}", fix=fix)


def find_weights(folder: Path) -> Path:
    """Chooses the weight file or index: the plain one, or the only variant."""
    variants: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if single := _SINGLE.fullmatch(path.name):
            variants.setdefault(single[1] or "", []).append(path)
        elif (index := _INDEX.fullmatch(path.name)) and not (index[1] and index[2]):
            variants.setdefault(index[1] or index[2] or "", []).append(path)
    if not variants:
        raise lacking(folder, f"{folder} must hold {WEIGHTS_STEM}.safetensors or its .index.json")
    if "" not in variants and len(variants) > 1:
        raise CheckpointError(
            f"{folder} must hold {WEIGHTS_STEM}.safetensors, or one variant only",
            received=f"the variants {name_some(p.name for paths in variants.values() for p in paths)}",
            fix="keep the one that you mean in a folder of its own, with config.json",
        )
    chosen = variants.get("") or next(iter(variants.values()))
    if len(chosen) > 1:
        raise CheckpointError(
            f"{folder} must hold either one weight file or shards with an index",
            received=f"both: {name_some(p.name for p in chosen)}",
            fix="remove the one that you do not mean",
        )
    return chosen[0]


def read_index(index: Path) -> dict[str, set[str]]:
    """Reads which keys each shard must hold; the shards must be files of the index's own folder."""
    weight_map = read_json_file(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CheckpointError(
            f"weight_map of {index} must map every key to a shard", received=quote(weight_map), fix=_AGAIN
        )
    keys_of: dict[str, set[str]] = {}
    for key, shard in weight_map.items():
        keys_of.setdefault(shard, set()).add(key)
    for shard in keys_of:
        if not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise CheckpointError(
                f"weight_map of {index} must name .safetensors files in its own folder",
                received=quote(shard),
                fix="do not use this checkpoint: its index points outside, or to another kind of file",
            )
    missing = [shard for shard in keys_of if not (index.parent / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} must hold all {len(keys_of)} shards that its index names",
            received=f"{len(missing)} missing: {name_some(missing)}",
            fix="download the missing shards",
        )
    return keys_of


def check_shards(index: Path, files: Sequence[SafetensorsFile], keys_of: Mapping[str, set[str]]) -> None:
    """Checks that no tensor lies in two shards, and that each shard holds just what the index says.

    Args:
        index: the index file, for messages.
        files: the open shards, all in the index's folder.
        keys_of: what the index says, from `read_index`.

    Raises:
        CheckpointError: on the first shard that does not agree.
    """
    seen: dict[str, Path] = {}
    for file in files:
        for key in file.tensors:
            if key in seen:
                raise CheckpointError(
                    f"every tensor in {index.parent} must lie in one shard",
                    received=f"{quote(key)} lies in {seen[key].name} and in {file.path.name}",
                    fix=_AGAIN,
                )
            seen[key] = file.path
    for file in files:
        found, listed = set(file.tensors), keys_of[file.path.name]
        faults = []
        if listed - found:
            faults.append(f"it lacks {name_some(listed - found)}")
        if found - listed:
            faults.append(f"it holds {name_some(found - listed)}, which the index does not expect there")
        if faults:
            raise CheckpointError(
                f"{file.path} must hold exactly the tensors that {index.name} says",
                received="; ".join(faults),
                fix=_AGAIN,
            )
