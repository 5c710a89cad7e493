"""What a builder says: warnings and errors to the user, everything to a file, and the layer list to the gate."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from mmdit_deploy.build.progress import BuildProgress
from mmdit_deploy.errors import GraphError

Log = Callable[[str], None]

# Said once per node and call: a local function's nodes have the same names wherever it is called. The layer list names
# the call site as well, so nothing is lost.
_REPEATED_NAME = re.compile(r"A node named .* already exists, the output tensors of this new instance")
# The fix of what TensorRT fails at; where the log is comes after it.
REPORT = "export again with the versions in constraints.txt; if that does not help, report this as a bug"
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
_LAYERS = "Layers:\n"  # how the message with the layer list begins


class BuildLog:
    """The messages of one target's builds. A context manager: it owns the file.

    Args:
        path: the file that gets every message, in order.
        warn: gets a line for each message of warning and above, but for the repeated ones.

    Attributes:
        errors: messages of errors, of the engine that was begun last, as are the next two.
        layers: its layer list; empty until TensorRT says it.
        activation_bytes: memory that running it takes besides weights, at its profiles' maxima; None until it is said.
        repeated_names: warnings about them that were kept from the user.
    """

    def __init__(self, path: Path, warn: Log):
        self._path, self._warn = path, warn
        self._file: IO[str] | None = None
        self._warned: set[str] = set()
        self.errors: list[str] = []
        self.layers = ""
        self.activation_bytes: int | None = None
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
        self.errors, self.layers, self.activation_bytes = [], "", None
        self._write(f"== {title}")

    def note(self, text: str) -> None:
        """A line of ours, for who reads the file."""
        self._write(f"-- {text}")

    @contextmanager
    def kept_on_failure(self) -> Iterator[None]:
        """What TensorRT fails at inside keeps a copy of this log: the bundle that it lies in will not be.

        Raises:
            GraphError: that was raised inside; its fix names the copy, in the system's folder for temporary files.
        """
        try:
            yield
        except GraphError as error:
            raise GraphError(error.rule, received=error.received, fix=f"{error.fix}; {self._keep()}") from error

    def _keep(self) -> str:
        try:
            if self._file is not None:
                self._file.flush()
            with tempfile.NamedTemporaryFile(prefix="mmdit-deploy-build-", suffix=".log", delete=False) as copy:
                try:
                    shutil.copyfile(self._path, copy.name)
                except OSError:
                    Path(copy.name).unlink()
                    raise
        except OSError as error:
            return f"its build log could not be kept: {error}"
        return f"build log: {copy.name}"

    def message(self, severity: str, text: str) -> None:
        """One message of the builder.

        Args:
            severity: ``INTERNAL_ERROR``, ``ERROR``, ``WARNING``, ``INFO`` or ``VERBOSE``.
        """
        self._write(f"[{severity}] {text}")
        if text.startswith(_LAYERS):
            self.layers += text
        elif said := _ACTIVATIONS.search(text):
            self.activation_bytes = int(said[1])
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


def trt_logger(trt: Any, log: BuildLog, progress: BuildProgress) -> Any:
    """The log as TensorRT wants it. The class can only be made where the module is.

    Args:
        progress: of the build; is cancelled where a message cannot be written or told.
    """

    class _Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            with progress.callback():
                log.message(severity.name, message)

    return _Logger()
