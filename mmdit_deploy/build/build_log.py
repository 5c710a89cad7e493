"""What a builder says: warnings and errors to the user, everything to a file, and the layer list to the gate."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

Log = Callable[[str], None]

# Said once per node and call: a local function's nodes have the same names wherever it is called. The layer list names
# the call site as well, so nothing is lost.
_REPEATED_NAME = re.compile(r"A node named .* already exists, the output tensors of this new instance")
_LAYERS = "Layers:\n"  # how the message with the layer list begins


class BuildLog:
    """The messages of one target's builds. A context manager: it owns the file.

    Args:
        path: the file that gets every message, in order.
        warn: gets a line for each message of warning and above, but for the repeated ones.
    """

    def __init__(self, path: Path, warn: Log):
        self._path, self._warn = path, warn
        self._file: IO[str] | None = None
        self._warned: set[str] = set()
        self.errors: list[str] = []
        self.layers = ""
        self.repeated_names = 0

    def __enter__(self) -> BuildLog:
        self._file = self._path.open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def begin(self, title: str) -> None:
        """Start another engine: its errors and layers replace those of the one before."""
        self.errors, self.layers = [], ""
        self._write(f"== {title}")

    def message(self, severity: str, text: str) -> None:
        """One message of the builder.

        Args:
            severity: ``INTERNAL_ERROR``, ``ERROR``, ``WARNING``, ``INFO`` or ``VERBOSE``.
        """
        self._write(f"[{severity}] {text}")
        if text.startswith(_LAYERS):
            self.layers += text
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(text)
        elif severity != "WARNING":
            return
        elif _REPEATED_NAME.search(text):
            self.repeated_names += 1
            return
        if text not in self._warned:
            self._warned.add(text)
            self._warn(f"{severity.lower()}: {text.strip()[:1000]}")

    def _write(self, line: str) -> None:
        if self._file is not None and not self._file.closed:
            self._file.write(line + "\n")


def trt_logger(trt: Any, log: BuildLog) -> Any:
    """The log as TensorRT wants it. The class can only be made where the module is."""

    class _Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.message(severity.name, message)

    return _Logger()
