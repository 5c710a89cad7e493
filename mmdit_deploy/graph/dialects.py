"""The dialects that a user may ask for: the one table that the command line and its errors go by.

Importing this takes milliseconds; what each dialect is made of stands in `mmdit_deploy.graph.lower`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Companion:
    """A second file that a dialect comes with.

    Args:
        dialect: what its graph is lowered to; one that users need not know of.
        suffix: goes before the extension: ``OUT.<suffix>.onnx``.
    """

    dialect: str
    suffix: str


@dataclass(frozen=True)
class Dialect:
    """What a graph is lowered to.

    Args:
        meaning: a few words for people.
        companion: of its second file, where it has one.
    """

    meaning: str
    companion: Companion | None = None


STANDARD = "standard"

USER_DIALECTS: Mapping[str, Dialect] = {
    STANDARD: Dialect("ONNX's own ops, opset 23"),
    "ort": Dialect("what ONNX Runtime runs fastest on CPU"),
    "trt": Dialect("the standard ops, arranged so that TensorRT builds and runs them in less memory"),
    "trt-plugin": Dialect(
        "plugin nodes for TensorRT 9.0 to 10.13, and a second file for ONNX Runtime, with what they compute",
        Companion("trt-plugin-bodies", "bodies"),
    ),
    "decomposed": Dialect("only ops of opset 17, for other runtimes"),
}


def outputs(target: Path, dialect: str) -> dict[Path, str]:
    """The files to write for a dialect, and what each is lowered to.

    Args:
        target: the file that the user named.
        dialect: one of `USER_DIALECTS`.
    """
    files = {target: dialect}
    companion = USER_DIALECTS[dialect].companion
    if companion is not None:
        files[target.with_name(f"{target.stem}.{companion.suffix}{target.suffix}")] = companion.dialect
    return files
