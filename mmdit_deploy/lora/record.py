"""LoRAs of a bundle, opened again from what its manifest says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdit_deploy.checkpoint.strict_json import quote
from mmdit_deploy.errors import UsageError
from mmdit_deploy.lora.lora import Lora, open_lora
from mmdit_deploy.spec import ModelSpec


def open_recorded(records: Sequence[Mapping[str, Any]], spec: ModelSpec) -> tuple[Lora, ...]:
    """Open the LoRAs that a bundle was made with, from where they lay.

    Args:
        records: what `Lora.to_json` wrote.
        spec: the bundle's.

    Raises:
        UsageError: one has another content now.
        CheckpointError: one is not there any more.
    """
    return tuple(_open(record, spec) for record in records)


def _open(record: Mapping[str, Any], spec: ModelSpec) -> Lora:
    lora = open_lora(Path(record["file"]), spec, record["scale"])
    if lora.sha256 != record["sha256"]:
        raise UsageError(
            "the LoRA must be the one that the bundle was made with",
            received=f"{lora.path} with the SHA-256 {lora.sha256}",
            fix=f"put the file with the SHA-256 {quote(record['sha256'])} back",
        )
    return lora
