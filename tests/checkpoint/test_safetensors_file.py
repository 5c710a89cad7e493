"""The reader gives what the safetensors library gives, or refuses with the file's and the tensor's name."""

from __future__ import annotations

import json
import os
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mmdit_deploy.checkpoint import SafetensorsFile
from mmdit_deploy.checkpoint.safetensors_header import DTYPE_NAMES, MAX_HEADER_BYTES
from mmdit_deploy.errors import CheckpointError

F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def raw_file(header: Any, data: bytes = b"\0" * 24) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refusal(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "some.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    message = str(caught.value)
    assert "some.safetensors" in message and caught.value.fix and caught.value.received
    return message


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (b"", ["empty file (0 bytes)"]),
        (b"\1\2\3", ["3 bytes", "too short"]),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", [f"header length of {MAX_HEADER_BYTES + 1}"]),
        (b"\xff" * 40, ["header length of 18446744073709551615"]),
        (struct.pack("<Q", 100) + b"{}", ["truncated", "98 bytes of the header"]),
        (struct.pack("<Q", 0), ["begin with '{'"]),
        (struct.pack("<Q", 0) + b"{}", ["begin with '{'"]),
        (raw_file(b" {}", b""), ["begin with '{'"]),
        (raw_file(b"[1]", b""), ["begin with '{'"]),
        (raw_file(b'{"a\xff": 1}'), ["not UTF-8 at byte 3"]),
        (raw_file(b'{"a": }'), ["not JSON"]),
        (raw_file(b'{"a\\ud800": 1}'), ["not UTF-8"]),
        (raw_file(b'{"a": ' + b"9" * 5000 + b"}"), ["not JSON"]),
        (raw_file(b'{"a":' * 100_000), ["nested too deeply"]),
        (raw_file(b'{"w": %b, "w": %b}' % ((json.dumps(F32).encode(),) * 2)), ["repeated key 'w'"]),
        (raw_file(b'{"w": {"dtype": "F32", "dtype": "F16"}}'), ["repeated key 'dtype'"]),
        (raw_file({"__metadata__": {"a": 1}, "w": F32}), ["__metadata__", "strings"]),
        (raw_file({"__metadata__": [], "w": F32}), ["__metadata__", "strings"]),
        (raw_file({"__metadata__": None, "w": F32}), ["__metadata__", "strings"]),
    ],
)
def test_refuses_broken_headers(tmp_path: Path, content: bytes, fragments: list[str]) -> None:
    message = refusal(tmp_path, content)
    assert all(fragment in message for fragment in fragments), message


@pytest.mark.parametrize(
    ("entry", "fragment"),
    [
        ("text", "must be an object"),
        ({"dtype": "F32", "shape": [2, 3]}, "must be an object"),
        ({**F32, "more": 1}, "nothing else"),
        ({**F32, "dtype": "F4"}, "dtype 'F4'"),
        ({**F32, "dtype": ["F32"]}, "dtype ['F32']"),
        ({**F32, "shape": [-2, -3]}, "shape [-2, -3]"),
        ({**F32, "shape": [2.0, 3]}, "shape [2.0, 3]"),
        ({**F32, "shape": [True, 6]}, "shape [True, 6]"),
        ({**F32, "shape": 6}, "shape 6"),
        ({**F32, "shape": [1] * 65}, "at most 64"),
        ({**F32, "shape": [2**32, 2**32]}, "63 bits"),
        ({**F32, "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}, "63 bits"),
        ({**F32, "data_offsets": [0]}, "two integers"),
        ({**F32, "data_offsets": [0, 24.0]}, "two integers"),
        ({**F32, "data_offsets": "024"}, "two integers"),
        ({**F32, "data_offsets": [24, 0]}, "begin <= end"),
        ({**F32, "data_offsets": [-24, 0]}, "0 <= begin"),
        ({**F32, "data_offsets": [0, 2**70]}, "begin <= end"),
        ({**F32, "data_offsets": [0, 20]}, "24"),
        ({**F32, "dtype": "F16"}, "12"),
    ],
)
def test_refuses_broken_entries_by_name(tmp_path: Path, entry: Any, fragment: str) -> None:
    message = refusal(tmp_path, raw_file({"blocks.7.weight": entry}))
    assert "'blocks.7.weight'" in message and fragment in message, message


def test_refuses_ranges_that_do_not_cover_the_data(tmp_path: Path) -> None:
    def second(begin: int) -> dict[str, Any]:
        return {"a": F32, "b": {**F32, "data_offsets": [begin, begin + 24]}}

    assert "'b'" in (message := refusal(tmp_path, raw_file(second(20), b"\0" * 48))) and "overlaps" in message
    assert "'b'" in (message := refusal(tmp_path, raw_file(second(28), b"\0" * 52))) and "gap" in message
    assert "gap after the header" in refusal(tmp_path, raw_file({"b": second(4)["b"]}, b"\0" * 28))
    message = refusal(tmp_path, raw_file(second(24), b"\0" * 41))
    assert "truncated, 7 bytes are missing, from tensor 'b' on" in message
    assert "3 trailing bytes after tensor 'b'" in refusal(tmp_path, raw_file(second(24), b"\0" * 51))
    assert "5 trailing bytes" in refusal(tmp_path, raw_file({}, b"\0" * 5))


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"PK\x03\x04" + b"\0" * 60, "zip archive"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + b"\0" * 60, "pickle"),
        (b"\x80\x05\x95\x10\0\0\0\0\0\0\0" + b"\0" * 60, "pickle"),
        (b"GGUF\x03\0\0\0" + b"\0" * 60, "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "HTML"),
    ],
)
def test_names_other_formats(tmp_path: Path, content: bytes, fragment: str) -> None:
    assert fragment in refusal(tmp_path, content)


def test_a_length_that_looks_like_a_pickle_is_no_pickle(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_file(b"{}" + b" " * 638, b""))  # 640 is 0x80 0x02
    assert path.read_bytes().startswith(b"\x80\x02")
    assert SafetensorsFile(path).tensors == {}


def test_refuses_what_is_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name in ("pipe.safetensors", ""):
        with pytest.raises(CheckpointError, match="not a regular file"):
            SafetensorsFile(tmp_path / name)
    with pytest.raises(CheckpointError, match="No such file"):
        SafetensorsFile(tmp_path / "none.safetensors")


def sample() -> dict[str, torch.Tensor]:
    numbers = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4) - 7
    tensors = {name: numbers.to(dtype) for name, dtype in DTYPE_NAMES.items() if name != "F8_E8M0"}
    return {**tensors, "scalar": torch.tensor(3.5), "empty": torch.empty(0, 5, dtype=torch.float16)}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numel() == 0 or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def test_agrees_with_the_library_on_every_dtype(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(sample(), path, {"format": "pt", "note": "ü"})
    expected = load_file(path)
    with warnings.catch_warnings(), SafetensorsFile(path) as file:
        warnings.simplefilter("error")
        assert file.metadata == {"format": "pt", "note": "ü"}
        assert set(file.tensors) == set(expected)
        for key, info in file.tensors.items():
            tensor = file.read(key)
            assert same(tensor, expected[key]) and (info.dtype, info.shape) == (
                tensor.dtype,
                tuple(tensor.shape),
            )
            if info.nbytes:
                at = path.read_bytes()[info.offset : info.offset + info.nbytes]
                assert at == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_tensors_are_private_views_that_outlive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(1024)}, path)
    before = path.read_bytes()
    file = SafetensorsFile(path)
    first, second = file.read("w"), file.read("w")
    assert first.data_ptr() == second.data_ptr()
    file.close()
    first.mul_(2)
    assert second[0] == 2 and path.read_bytes() == before
    with pytest.raises(ValueError, match="closed"):
        file.read("w")


def test_an_unknown_key_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(2)}, path)
    with SafetensorsFile(path) as file, pytest.raises(CheckpointError, match="'v'"):
        file.read("v")


def test_unaligned_tensors_are_read_as_copies(tmp_path: Path) -> None:
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_file(header, b"\7" + struct.pack("<2f", 1.5, -2)))
    with SafetensorsFile(path) as file:
        tensor = file.read("w")
    assert tensor.tolist() == [1.5, -2] and tensor.data_ptr() % 4 == 0


def test_mapped_weights_are_not_anonymous_memory(tmp_path: Path) -> None:
    def anonymous_kib() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(2**24)}, path)  # 64 MiB
    with SafetensorsFile(path) as file:
        before = anonymous_kib()
        tensor = file.read("w")
        assert tensor.sum() == 2**24
        assert anonymous_kib() - before < 16 * 1024


def valid_bytes() -> bytes:
    return raw_file(
        {
            "__metadata__": {"format": "pt"},
            "a": F32,
            "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
            "c": {"dtype": "F8_E4M3", "shape": [], "data_offsets": [32, 33]},
        },
        bytes(range(33)),
    )


def read_or_refuse(path: Path, content: bytes) -> None:
    """Whatever the bytes, the reader refuses, or reads exactly what the library reads."""
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    expected = load_file(path)
    assert set(file.tensors) == set(expected)
    for key in file.tensors:
        assert same(file.read(key), expected[key])


FUZZ = settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(data=st.data())
def test_fuzz_changed_bytes(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(valid_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        kind = data.draw(st.sampled_from(["set", "delete", "insert", "cut"]))
        byte = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789{}[]",:-.eE ')))
        if kind == "set":
            content[at : at + 1] = bytes([byte])
        elif kind == "delete":
            del content[at : at + 1]
        elif kind == "insert":
            content.insert(at, byte)
        else:
            del content[max(at, 1) :]
    read_or_refuse(tmp_path / "a.safetensors", bytes(content))


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)
ENTRIES = st.one_of(
    JSON_VALUES,
    st.fixed_dictionaries(
        {
            "dtype": st.one_of(st.sampled_from(list(DTYPE_NAMES)), JSON_VALUES),
            "shape": st.one_of(st.lists(st.integers(-1, 4), max_size=3), JSON_VALUES),
            "data_offsets": st.one_of(st.lists(st.integers(-1, 40), min_size=2, max_size=2), JSON_VALUES),
        }
    ),
)


@FUZZ
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), ENTRIES, max_size=3),
    size=st.integers(0, 40),
)
def test_fuzz_headers(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    read_or_refuse(tmp_path / "a.safetensors", raw_file(header, bytes(size)))
