"""Where a LoRA lies: one safetensors file, or the folder that PEFT or diffusers saved."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mmdit_deploy.checkpoint.strict_json import quote
from mmdit_deploy.checkpoint.weight_files import PICKLE_SUFFIXES, SAFETENSORS_SUFFIXES, is_gguf, name_some, refuse_file
from mmdit_deploy.errors import CheckpointError

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
_RULE = f"a LoRA is a .safetensors file, or a PEFT folder with {PEFT_CONFIG} and {PEFT_WEIGHTS}"


def find_lora(path: Path) -> tuple[Path, Path | None]:
    """The file with the tensors, and PEFT's config where there is one.

    A file that PEFT saved is looked up together with the config beside it: without it, alpha would be unknown.

    Raises:
        CheckpointError: there is nothing, or something that is not read.
    """
    if path.is_dir():
        return _in_folder(path)
    if not path.exists():
        raise CheckpointError(_RULE, received=f"no such path: {quote(str(path))}", fix="check the path")
    if path.suffix.lower() in PICKLE_SUFFIXES or is_gguf(path):
        raise refuse_file(path)
    if path.suffix.lower() not in SAFETENSORS_SUFFIXES:
        raise CheckpointError(_RULE, received=f"the file {path}", fix="save the LoRA as safetensors")
    config = path.parent / PEFT_CONFIG
    return path, config if path.name == PEFT_WEIGHTS and config.is_file() else None


def sha256_of(weights: Path) -> str:
    """Of the whole file, in lower-case hex."""
    with weights.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _in_folder(folder: Path) -> tuple[Path, Path | None]:
    if (folder / PEFT_WEIGHTS).is_file() and (folder / PEFT_CONFIG).is_file():
        return folder / PEFT_WEIGHTS, folder / PEFT_CONFIG
    if (folder / _DIFFUSERS_WEIGHTS).is_file():
        return folder / _DIFFUSERS_WEIGHTS, None
    names = sorted(p.name for p in folder.iterdir())
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLE_SUFFIXES]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise refuse_file(folder / pickles[0])
    raise CheckpointError(
        _RULE, received=f"{folder} with the files {name_some(names) or '(none)'}", fix="pass the file itself"
    )
