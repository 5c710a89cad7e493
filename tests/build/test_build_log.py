"""What a builder says: to the user what matters, once; to the file everything; to the gate the layer list."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmdit_deploy.build.build_log import BuildLog, trt_logger
from mmdit_deploy.build.progress import BuildProgress
from mmdit_deploy.errors import GraphError, MachineError

REPEATED = (
    "A node named node_linear already exists, the output tensors of this new instance will be renamed. "
    "There may be multiple graphs with that node"
)


@pytest.fixture
def warned() -> list[str]:
    """What reached the user."""
    return []


@pytest.fixture
def log(tmp_path: Path, warned: list[str]) -> Any:
    """An open log of ``build.log``."""
    with BuildLog(tmp_path / "build.log", warned.append) as log:
        yield log


def written(tmp_path: Path, log: BuildLog) -> list[str]:
    log.__exit__(None, None, None)
    return (tmp_path / "build.log").read_text(encoding="utf-8").splitlines()


def test_everything_is_in_the_file_in_order(tmp_path: Path, log: BuildLog, warned: list[str]) -> None:
    log.begin("rtx:sm89")
    for severity, text in (("VERBOSE", "a"), ("INFO", "b ü"), ("WARNING", "c"), ("ERROR", "d"), ("WARNING", REPEATED)):
        log.message(severity, text)
    assert written(tmp_path, log) == [
        "== rtx:sm89", "[VERBOSE] a", "[INFO] b ü", "[WARNING] c", "[ERROR] d", f"[WARNING] {REPEATED}"
    ]  # fmt: skip
    assert warned == ["warning: c", "error: d"]


def test_a_warning_reaches_the_user_once(tmp_path: Path, log: BuildLog, warned: list[str]) -> None:
    for segment in range(3):
        log.begin(f"segment {segment}")
        log.message("WARNING", "int64 is cast to int32 ")
        log.message("WARNING", f"of segment {segment}")
    assert warned == ["warning: int64 is cast to int32", *(f"warning: of segment {i}" for i in range(3))]
    assert sum("int64" in line for line in written(tmp_path, log)) == 3


def test_repeated_names_are_for_the_file_only(tmp_path: Path, log: BuildLog, warned: list[str]) -> None:
    """Once for each node and call: hundreds, of which no one is of use."""
    for i in range(40):
        log.message("WARNING", REPEATED.replace("node_linear", f"node_{i}"))
    assert warned == [] and log.repeated_names == 40
    assert sum("already exists" in line for line in written(tmp_path, log)) == 40


def test_a_long_warning_is_cut_for_the_user_alone(tmp_path: Path, log: BuildLog, warned: list[str]) -> None:
    log.message("WARNING", "x" * 5000)
    assert warned == ["warning: " + "x" * 1000]
    assert written(tmp_path, log) == ["[WARNING] " + "x" * 5000]


def test_errors_are_those_of_the_engine_that_is_built(log: BuildLog, warned: list[str]) -> None:
    log.begin("first")
    log.message("INTERNAL_ERROR", "Assertion failed")
    log.message("ERROR", "cannot build")
    log.message("ERROR", "cannot build")
    assert log.errors == ["Assertion failed", "cannot build", "cannot build"]
    assert warned == ["internal_error: Assertion failed", "error: cannot build"]
    log.begin("second")
    assert log.errors == []


def test_the_layer_list_is_kept_whole(tmp_path: Path, log: BuildLog) -> None:
    """One message for each of the compiler's graphs, with the control characters that separate metadata."""
    log.begin("first")
    log.message("VERBOSE", "Layers of the network: 9")
    log.message("VERBOSE", "Layers:\nName: a, Metadata: [x]\x1e[y]\n")
    log.message("VERBOSE", "Layers:\nName: b\n")
    assert log.layers == "Layers:\nName: a, Metadata: [x]\x1e[y]\nLayers:\nName: b\n"
    log.begin("second")
    assert log.layers == ""
    assert "Name: b" in written(tmp_path, log)


def test_what_is_said_after_the_end_is_dropped(tmp_path: Path, log: BuildLog, warned: list[str]) -> None:
    """A builder may speak when it is freed."""
    written(tmp_path, log)
    log.message("WARNING", "late")
    log.message("VERBOSE", "later")
    assert warned == ["warning: late"] and (tmp_path / "build.log").read_text() == ""


def test_tensorrt_is_given_a_logger_of_its_kind(log: BuildLog, warned: list[str]) -> None:
    class ILogger:
        def __init__(self) -> None:
            self.made = True

    logger = trt_logger(SimpleNamespace(ILogger=ILogger), log, BuildProgress(None))
    assert isinstance(logger, ILogger) and logger.made
    logger.log(SimpleNamespace(name="WARNING"), "careful")
    assert warned == ["warning: careful"]


def test_what_cannot_be_told_ends_the_build(tmp_path: Path) -> None:
    """No exception may cross the builder."""

    def gone(line: str) -> None:
        raise BrokenPipeError(errno.EPIPE, line)

    progress = BuildProgress(None)
    with BuildLog(tmp_path / "build.log", gone) as log:
        logger = trt_logger(SimpleNamespace(ILogger=object), log, progress)
        logger.log(SimpleNamespace(name="VERBOSE"), "fine")
        assert not progress.cancelled
        logger.log(SimpleNamespace(name="WARNING"), "first")
        logger.log(SimpleNamespace(name="WARNING"), "second")
    assert progress.cancelled
    with pytest.raises(BrokenPipeError, match="first"):
        progress.check()


def test_what_tensorrt_fails_at_keeps_a_copy_and_names_it(log: BuildLog, temporary: Path) -> None:
    log.message("VERBOSE", "the cause")
    with pytest.raises(GraphError) as caught, log.kept_on_failure():
        raise GraphError("a rule", received="something", fix="report this as a bug")
    (copy,) = temporary.iterdir()
    assert (caught.value.rule, caught.value.received) == ("a rule", "something")
    assert caught.value.fix == f"report this as a bug; build log: {copy}"
    assert copy.read_text(encoding="utf-8") == "[VERBOSE] the cause\n"


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), MachineError("the disk is full"), OSError(errno.ENOSPC, "full")]
)
def test_other_ends_keep_none(log: BuildLog, temporary: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, log.kept_on_failure():
        raise error
    assert caught.value is error and not list(temporary.iterdir())


def test_a_copy_that_cannot_be_made_hides_nothing(
    log: BuildLog, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(GraphError, match="a rule") as caught, log.kept_on_failure():
        raise GraphError("a rule", fix="report this")
    assert str(caught.value.fix).startswith("report this; its build log could not be kept: ")
    assert "No space left" in str(caught.value.fix) and not list(temporary.iterdir())


def test_the_real_one(log: BuildLog, warned: list[str], tensorrt_rtx: Any) -> None:
    logger = trt_logger(tensorrt_rtx, log, BuildProgress(None))
    network = tensorrt_rtx.Builder(logger).create_network(0)
    assert not tensorrt_rtx.OnnxParser(network, logger).parse(b"no graph")
    assert log.errors and warned and all(line.startswith("error: ") for line in warned)
