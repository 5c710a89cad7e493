"""TensorRT-RTX's runtime cache: the kernels that it compiles when an engine first runs, kept between processes.

TensorRT-RTX itself checks a cache before it takes anything from it: its own version, the GPU, the driver. What it does
not take is compiled again and written anew, so a cache may be deleted, copied or broken at any time.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from mmdit_deploy.build import EngineRecord
from mmdit_deploy.cache_folder import cache_folder, read_cached, write_cached


def runtime_cache_file(record: EngineRecord, built_from: object, device: torch.device) -> Path | None:
    """Where the kernels of an engine are kept, in the user's cache folder.

    Two builds of one thing differ in bytes and agree in kernels. So the file is named after what was built, not after
    the engine's hash: building a bundle again, or with other weights, keeps the kernels.

    Args:
        built_from: what decides the graph, as JSON values: the spec, the precision, the contract.

    Returns:
        ``~/.cache/mmdit-deploy/tensorrt-rtx/<version>/<GPU>/<name>.kernels``; None where the user has no home.
    """
    root = cache_folder()
    if root is None:
        return None
    calls = [list(segment.calls) for segment in record.segments]
    named_after = json.dumps([record.target, record.to_json()["profiles"], calls, built_from], sort_keys=True)
    gpu = torch.cuda.get_device_name(device) + " sm{}{}".format(*torch.cuda.get_device_capability(device))
    name = hashlib.sha256(named_after.encode()).hexdigest()[:32]
    return root / _slug(record.flavour) / record.version / _slug(gpu) / f"{name}.kernels"


class RuntimeCache:
    """A runtime cache of TensorRT-RTX, and its file.

    Args:
        cache: the `IRuntimeCache`. It is kept alive here: an execution context that outlives it ends the process.
        file: None to keep nothing.
    """

    def __init__(self, cache: Any, file: Path | None):
        self.cache = cache
        self._file = file
        self._written: bytes | None = None
        content = b"" if file is None else read_cached(file)
        if content and cache.deserialize(content):
            self._written = hashlib.sha256(content).digest()

    def save(self) -> None:
        """Write the file, whole or not at all, if there are new kernels. A disk that cannot be written to is no error.

        Of several processes that write one file, the last wins; the next run of the others compiles theirs again.
        """
        if self._file is None:
            return
        blob = self.cache.serialize()
        content = b"" if blob is None else bytes(blob)
        digest = hashlib.sha256(content).digest()
        if content and digest != self._written and write_cached(self._file, content):
            self._written = digest


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
