"""LoRAs of a bundle, opened again from what its manifest says of them: found by their SHA-256, wherever they lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdit_deploy.checkpoint.strict_json import quote
from mmdit_deploy.errors import CheckpointError, UsageError
from mmdit_deploy.lora.files import find_lora, sha256_of
from mmdit_deploy.lora.lora import Lora, open_lora
from mmdit_deploy.spec import ModelSpec

_RULE = "the LoRA must be the one that the bundle was made with"


def open_recorded(
    records: Sequence[Mapping[str, Any]], spec: ModelSpec, files: Sequence[str | Path] = ()
) -> tuple[Lora, ...]:
    """Open the LoRAs that a bundle was made with.

    Each is looked for among the files given, then under the path that was typed at the export, then where that led to.

    Args:
        records: what `Lora.to_json` wrote.
        spec: the bundle's.
        files: where LoRAs lie now, in any order.

    Raises:
        UsageError: one is not found, or a file is none of them; it says which SHA-256 is wanted.
        CheckpointError: a file is no LoRA.
    """
    given = {_sha256(file): Path(file) for file in files}
    wanted = {record["sha256"] for record in records}
    for sha256, path in given.items():
        if sha256 not in wanted:
            raise UsageError(
                f"{_RULE}: {', '.join(f'SHA-256 {quote(each)}' for each in sorted(wanted)) or 'it has none'}",
                received=f"--lora {path} with the SHA-256 {sha256}",
                fix="drop it, or pass the file itself",
            )
    return tuple(_open(record, spec, given) for record in records)


def _sha256(file: str | Path) -> str:
    if not str(file):
        raise UsageError("--lora takes a FILE", received="''", fix="e.g. --lora style.safetensors")
    return sha256_of(find_lora(Path(file))[0])


def _open(record: Mapping[str, Any], spec: ModelSpec, given: Mapping[str, Path]) -> Lora:
    sha256, found = record["sha256"], given.get(record["sha256"])
    tried = []
    for path in [found] if found else _recorded(record):
        try:
            held = sha256_of(find_lora(path)[0])
        except (CheckpointError, OSError):
            tried.append(f"{quote(str(path))}, where there is none")
            continue
        if held == sha256:
            return _checked(open_lora(path, spec, record["scale"]), record)
        tried.append(f"{quote(str(path))} with the SHA-256 {held}")
    raise UsageError(_RULE, received="; ".join(tried), fix=f"--lora FILE, with the SHA-256 {quote(sha256)}")


def _recorded(record: Mapping[str, Any]) -> Iterator[Path]:
    """Where it lay: as typed, and in full, which bundles of earlier versions do not say."""
    yield from dict.fromkeys(Path(record[field]) for field in ("file", "resolved") if field in record)


def _checked(lora: Lora, record: Mapping[str, Any]) -> Lora:
    """PEFT's config lies beside the tensors, and says how strong they are: without it, alpha would be another."""
    if list(lora.alphas) != record["alphas"]:
        raise UsageError(
            f"{_RULE}, with its adapter_config.json",
            received=f"{lora.path} with alpha {list(lora.alphas)}; the bundle was made with {record['alphas']}",
            fix="pass the whole folder that PEFT saved",
        )
    return lora
