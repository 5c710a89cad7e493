"""TensorRT-RTX's runtime cache: kernels that it compiled, kept between processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdit_deploy.build import EngineRecord
from mmdit_deploy.runtime import TensorRTEngine
from mmdit_deploy.runtime.runtime_cache import RuntimeCache, runtime_cache_file

Build = Callable[..., tuple[EngineRecord, list[Path]]]
GPU = torch.device("cpu")


class Runtime:
    """A runtime cache: takes what begins with ``kernels``, as the real one takes what its version and GPU wrote."""

    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"kernels"):
            return False
        self.content = blob
        return True

    def serialize(self) -> bytes | None:
        return self.content or None


def test_it_is_in_the_users_cache_folder(fake: Any, build: Build, own_cache: Path) -> None:
    file = runtime_cache_file(build()[0], {"spec": 1}, GPU)
    assert file is not None
    folder = own_cache / "mmdit-deploy" / "tensorrt-rtx" / "1.7.1.116" / "nvidia-geforce-rtx-4090-sm89"
    assert file.parent == folder and file.suffix == ".kernels"


def test_without_a_cache_folder_there_is_none(fake: Any, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmdit_deploy.runtime.runtime_cache.cache_folder", lambda: None)
    assert runtime_cache_file(build()[0], 0, GPU) is None


def test_one_file_for_what_gives_the_same_kernels(fake: Any, build: Build, chain: Any) -> None:
    """Not for each build: two of one thing differ in bytes."""
    record = build()[0]
    file = runtime_cache_file(record, {"spec": 1}, GPU)
    again = build(change=lambda content: content.update(note="another build"))[0]
    assert again.segments != record.segments
    assert runtime_cache_file(again, {"spec": 1}, GPU) == file
    others = [
        runtime_cache_file(record, {"spec": 2}, GPU),
        runtime_cache_file(build(profiles=(chain.narrow,))[0], {"spec": 1}, GPU),
        runtime_cache_file(build(version="1.8.0.1")[0], {"spec": 1}, GPU),
    ]
    fake.gpu = (12, 0)
    others.append(runtime_cache_file(record, {"spec": 1}, GPU))
    assert len({file, *others}) == 5


def test_what_was_kept_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "x.kernels"
    first = Runtime()
    cache = RuntimeCache(first, file)
    cache.save()
    assert not file.exists()  # there is nothing to keep
    first.content = b"kernels 1"
    cache.save()
    assert file.read_bytes() == b"kernels 1" and os.stat(file.parent).st_mode & 0o077 == 0
    second = Runtime()
    RuntimeCache(second, file)
    assert second.content == b"kernels 1"
    assert [path.name for path in file.parent.iterdir()] == ["x.kernels"]


def test_only_new_kernels_are_written(tmp_path: Path) -> None:
    file = tmp_path / "x.kernels"
    file.write_bytes(b"kernels 1")
    runtime = Runtime()
    cache = RuntimeCache(runtime, file)
    file.unlink()
    cache.save()
    assert not file.exists()
    runtime.content = b"kernels 1, kernels 2"
    cache.save()
    assert file.read_bytes() == b"kernels 1, kernels 2"


@pytest.mark.parametrize("broken", [b"", b"something else", b"\0" * 100])
def test_a_broken_file_is_ignored_and_written_anew(tmp_path: Path, broken: bytes) -> None:
    file = tmp_path / "x.kernels"
    file.write_bytes(broken)
    runtime = Runtime()
    cache = RuntimeCache(runtime, file)
    assert runtime.content == b""
    runtime.content = b"kernels"
    cache.save()
    assert file.read_bytes() == b"kernels"


def test_a_place_that_cannot_be_used_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.kernels").mkdir()
    for file in (tmp_path / "file" / "x.kernels", tmp_path / "folder.kernels", None):
        runtime = Runtime()
        cache = RuntimeCache(runtime, file)
        runtime.content = b"kernels"
        cache.save()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.kernels"]


def test_an_engine_keeps_kernels_at_load_at_close_and_when_it_is_dropped(
    fake: Any, chain: Any, build: Build, tmp_path: Path
) -> None:
    file = tmp_path / "x.kernels"
    engine = TensorRTEngine(*build(), cache=file)
    assert file.read_bytes() == b"kernels"  # a process that is killed keeps these
    # One cache for all segments, held as long as their contexts: TensorRT-RTX does not hold it.
    assert len({id(config.cache) for config in fake.configs}) == 1
    fake.compiled = b"kernels and more"
    engine.close()
    assert file.read_bytes() == b"kernels and more"
    fake.events.clear()
    second = TensorRTEngine(*build(), cache=file)
    assert fake.events.count("cache read") == 1
    fake.configs[-1].cache.content = b"kernels of the second"
    del second
    assert file.read_bytes() == b"kernels of the second"
