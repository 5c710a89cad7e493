"""Opens a checkpoint as people have it: a diffusers transformer folder, sharded or not, a pipeline, or one file."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mmdit_deploy.checkpoint.foreign import refuse_quantized
from mmdit_deploy.checkpoint.safetensors_file import SafetensorsFile
from mmdit_deploy.checkpoint.safetensors_header import TensorInfo
from mmdit_deploy.checkpoint.strict_json import quote
from mmdit_deploy.checkpoint.weight_files import (
    PASS_CHECKPOINT,
    PICKLE_SUFFIXES,
    SAFETENSORS_SUFFIXES,
    check_shards,
    find_weights,
    lacking,
    name_some,
    read_index,
    read_json_file,
    refuse_file,
)
from mmdit_deploy.errors import CheckpointError

# a hub name, or the address of its page (pathlib merges the slashes of https://)
_HUB_NAME = re.compile(r"(?:https?:/+huggingface\.co/)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)")


class Checkpoint:
    """An open checkpoint: its config, and the tensors of all its files as one table.

    Attributes:
        path: the folder that holds config.json and the weights, or the one file.
        config: the config, as in the file; None for one file.
        files: the weight files.
        tensors: every tensor by key; offsets are those in the file that holds it.
        total_bytes: of all tensors.
        dtypes: how many tensors there are of each dtype.
    """

    def __init__(self, path: Path, config: dict[str, Any] | None, files: Iterable[SafetensorsFile]) -> None:
        self.path = path
        self.config = config
        self._files = tuple(files)
        self._file_of = {key: file for file in self._files for key in file.tensors}
        self.files: tuple[Path, ...] = tuple(file.path for file in self._files)
        self.tensors: dict[str, TensorInfo] = {k: i for file in self._files for k, i in file.tensors.items()}
        self.total_bytes = sum(info.nbytes for info in self.tensors.values())
        self.dtypes: dict[torch.dtype, int] = dict(Counter(info.dtype for info in self.tensors.values()))

    def read(self, key: str) -> torch.Tensor:
        """Gives one tensor as a view of its mapped file; see `SafetensorsFile.read`.

        Args:
            key: one of `tensors`.

        Returns:
            The tensor, in the dtype and shape stored.

        Raises:
            CheckpointError: if there is no such tensor.
        """
        file = self._file_of.get(key)
        if file is None:
            raise CheckpointError(
                f"{self.path} must hold the tensor {quote(key)}",
                received=f"{len(self.tensors)} tensors, without it",
                fix="check that the checkpoint fits the architecture",
            )
        return file.read(key)

    def close(self) -> None:
        """Lets go of the files; tensors that were read stay valid."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def download_command(repository: str) -> str:
    """How to get a transformer from the Hugging Face hub, and what to pass then."""
    folder = repository.rpartition("/")[2]
    return (
        f'download it first: hf download {repository} --include "transformer/*" --local-dir {folder}, '
        f"then pass {folder}"
    )


def _transformer_folder(path: Path) -> Path:
    """Finds the folder with the transformer's config.json, from what the user gave."""
    if not path.is_dir():
        if path.exists():
            raise refuse_file(path)
        name = str(path)
        hub = _HUB_NAME.fullmatch(name)
        if hub and path.suffix not in (*SAFETENSORS_SUFFIXES, ".gguf", *PICKLE_SUFFIXES):
            fix = f"if this is a model on the Hugging Face hub, {download_command(hub[1])}"
        else:
            fix = PASS_CHECKPOINT
        raise CheckpointError("the checkpoint must exist", received=f"no such path: {quote(name)}", fix=fix)
    inside = path / "transformer"
    if (path / "model_index.json").is_file():
        if not inside.is_dir():
            raise CheckpointError(
                f"{path} is a pipeline folder, and must have a sub-folder transformer",
                received=f"sub-folders: {name_some(p.name for p in path.iterdir() if p.is_dir()) or 'none'}",
                fix='download it too (hf download … --include "transformer/*"); a UNet pipeline has none',
            )
        return inside
    # `hf download --include "transformer/*"` leaves the sub-folder without model_index.json
    if not (path / "config.json").is_file() and (inside / "config.json").is_file():
        return inside
    return path


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise lacking(folder, f"{folder} must hold config.json, which says what the architecture is")
    config = read_json_file(path)
    refuse_quantized(config, str(path))
    name = config.get("_class_name")
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"{path} must name the diffusers class in _class_name",
            received=f"_class_name {quote(name)}",
            fix="pass the folder that save_pretrained of the transformer wrote",
        )
    return config


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a diffusers transformer folder, that of a pipeline folder, or one safetensors file of whatever is in it.

    Weights are mapped, not read.

    Args:
        path: the folder or file. It, and files in it, may be symbolic links, as in a hub cache.

    Returns:
        The open checkpoint, with every file checked for consistency.

    Raises:
        CheckpointError: if there is no such folder or file, or anything in it is missing, broken, ambiguous or of a
            kind that is not read.
    """
    folder = Path(path)
    if folder.suffix.lower() in SAFETENSORS_SUFFIXES and folder.is_file():
        return Checkpoint(folder, None, [SafetensorsFile(folder)])
    try:
        folder = _transformer_folder(folder)
        config = _read_config(folder)
        weights = find_weights(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} must be readable", received=str(error), fix="check its permissions") from error
    if weights.suffix == ".safetensors":
        return Checkpoint(folder, config, [SafetensorsFile(weights)])
    keys_of = read_index(weights)
    files = [SafetensorsFile(folder / shard) for shard in sorted(keys_of)]
    check_shards(weights, files, keys_of)
    return Checkpoint(folder, config, files)
