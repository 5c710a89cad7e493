"""What the writer writes, the safetensors library reads; what it cannot write leaves no file behind."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mmdit_deploy.checkpoint import SafetensorsFile, plan_layout, write_safetensors
from mmdit_deploy.checkpoint.writer import DATA_ALIGNMENT
from mmdit_deploy.errors import MachineError

TENSORS = {
    "i64": torch.arange(3),
    "f32": torch.arange(12.0).reshape(3, 4),
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "scalar": torch.tensor(-2.5),
    "bf16": torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "empty": torch.empty(4, 0, dtype=torch.float16),
    "f16": torch.ones(2, 3, dtype=torch.float16),
    "fp8": torch.arange(7.0).to(torch.float8_e4m3fn),
    "fp8b": torch.arange(7.0).to(torch.float8_e5m2),
    "bool": torch.tensor([True, False]),
}
ENTRIES = [(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in TENSORS.items()]


def content(tensor: torch.Tensor) -> bytes:
    return b"" if tensor.numel() == 0 else tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_round_trip_through_the_library_and_our_reader(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    layout = plan_layout(ENTRIES, {"format": "pt", "a": "ü"})
    written = write_safetensors(path, layout, TENSORS.items())
    raw = path.read_bytes()
    assert (written.path, written.size) == (path, len(raw)) and written.size == layout.total_bytes
    assert written.sha256 == hashlib.sha256(raw).hexdigest()
    with safe_open(path, "pt") as theirs, SafetensorsFile(path) as ours:
        assert theirs.metadata() == ours.metadata == {"format": "pt", "a": "ü"}
        assert ours.tensors == layout.tensors and set(theirs.keys()) == set(TENSORS)
        for key, tensor in TENSORS.items():
            for read in (theirs.get_tensor(key), ours.read(key)):
                assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
                assert content(read) == content(tensor)


def test_layout_is_in_order_adjacent_and_aligned() -> None:
    layout = plan_layout(ENTRIES)
    assert list(layout.tensors) == list(TENSORS)
    end = len(layout.header)
    assert end % DATA_ALIGNMENT == 0
    for info in layout.tensors.values():
        assert info.offset == end
        end += info.nbytes
    assert layout.total_bytes == end


def test_a_file_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, plan_layout([]), [])
    assert SafetensorsFile(path).tensors == {}


def test_layouts_that_cannot_be() -> None:
    f32 = ("a", torch.float32, (2,))
    with pytest.raises(ValueError, match="repeated"):
        plan_layout([f32, f32])
    with pytest.raises(ValueError, match="reserved"):
        plan_layout([("__metadata__", torch.float32, (2,))])
    with pytest.raises(ValueError, match="dtype"):
        plan_layout([("a", torch.complex128, (2,))])
    with pytest.raises(ValueError, match="multiple of 4"):
        plan_layout([("byte", torch.uint8, (3,)), f32])


@pytest.mark.parametrize(
    ("tensors", "fragment"),
    [
        ({"b": torch.ones(2), "a": torch.ones(2)}, "next"),
        ({"a": torch.ones(3)}, "next"),
        ({"a": torch.ones(2).half()}, "next"),
        ({"a": torch.ones(2)}, "end before 'b'"),
        ({"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}, "after the end"),
        ({"a": torch.ones(2, device="meta")}, "on the CPU"),
    ],
)
def test_tensors_that_are_not_the_layouts(tmp_path: Path, tensors: dict[str, torch.Tensor], fragment: str) -> None:
    layout = plan_layout([("a", torch.float32, (2,)), ("b", torch.float32, (2,))])
    with pytest.raises(ValueError, match=fragment):
        write_safetensors(tmp_path / "w.safetensors", layout, tensors.items())
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_known_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 990, 10))
    layout = plan_layout(ENTRIES)
    with pytest.raises(MachineError) as caught:
        write_safetensors(tmp_path / "w.safetensors", layout, TENSORS.items())
    assert str(layout.total_bytes) in str(caught.value) and "10 bytes" in str(caught.value)
    assert caught.value.exit_status == 3 and list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    layout = plan_layout(ENTRIES)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(MachineError, match=f"{layout.total_bytes} bytes.*\n.*No space left"):
            write_safetensors(tmp_path / "w.safetensors", layout, TENSORS.items())
    assert list(tmp_path.iterdir()) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: whole(fd, data[:7]))
    path = tmp_path / "w.safetensors"
    written = write_safetensors(path, plan_layout(ENTRIES), TENSORS.items())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == written.sha256


def test_tensors_of_many_chunks(tmp_path: Path) -> None:
    big = torch.arange(9 * 2**20 + 3, dtype=torch.int32)  # 36 MiB: two chunks and a bit
    path = tmp_path / "w.safetensors"
    written = write_safetensors(path, plan_layout([("big", big.dtype, tuple(big.shape))]), [("big", big)])
    assert hashlib.sha256(path.read_bytes()).hexdigest() == written.sha256
    assert torch.equal(SafetensorsFile(path).read("big"), big)


def test_existing_files_and_links_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"precious")
    (tmp_path / "w.safetensors").symlink_to("other")
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "w.safetensors", plan_layout(ENTRIES), TENSORS.items())
    assert (tmp_path / "other").read_bytes() == b"precious"


def test_a_failing_source_leaves_nothing_behind(tmp_path: Path) -> None:
    def tensors():  # type: ignore[no-untyped-def]
        yield "i64", TENSORS["i64"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "w.safetensors", plan_layout(ENTRIES), tensors())
    assert list(tmp_path.iterdir()) == []
