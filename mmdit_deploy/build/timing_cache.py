"""Enterprise TensorRT's timing cache: how fast each kernel was on this GPU, kept between builds."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from mmdit_deploy.build.build_log import BuildLog
from mmdit_deploy.build.flavours import Flavour
from mmdit_deploy.cache_folder import cache_folder, read_cached, write_cached


class TimingCache:
    """The timing cache of one build, and its file. Where either cannot be had, the build times its kernels anew.

    Args:
        config: the builder's `IBuilderConfig`; takes the cache.
        log: gets a line for what cannot be had.
    """

    def __init__(self, flavour: Flavour, config: Any, log: BuildLog):
        self._log = log
        self._file = timing_cache_file(flavour)
        if self._file is None:
            log.note("no timings are kept: the user has no home")
        stored = b"" if self._file is None else read_cached(self._file, log.note)
        self._cache = self._taken(config, stored)
        if self._cache is None and stored:
            log.note(f"TensorRT does not take the timings of {self._file}")
            self._cache = self._taken(config, b"")

    def save(self) -> None:
        """Write the file, whole or not at all. That it cannot be written is no error."""
        blob = None if self._cache is None else self._cache.serialize()
        if self._file is not None and blob is not None:
            write_cached(self._file, bytes(blob), self._log.note)

    @staticmethod
    def _taken(config: Any, content: bytes) -> Any:
        """A cache with this content that the builder uses; None where TensorRT makes or takes none."""
        cache = config.create_timing_cache(content)
        # False: timings of another GPU are refused, and not used all the same
        return cache if cache is not None and config.set_timing_cache(cache, False) else None


def timing_cache_file(flavour: Flavour) -> Path | None:
    """Where timings of torch's current GPU are kept: ``~/.cache/mmdit-deploy/<TensorRT>-<version>-<GPU>.timing``."""
    import torch

    root = cache_folder()
    gpu = hashlib.sha256(torch.cuda.get_device_name().encode()).hexdigest()[:16]
    return None if root is None else root / f"{flavour.module}-{flavour.version()}-{gpu}.timing"
