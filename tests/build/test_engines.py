"""All engines of a target, with a builder that is none: what becomes of the log when one of them fails."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from mmdit_deploy.build import engines, parse_target
from mmdit_deploy.build.build_log import BuildLog
from mmdit_deploy.build.engine_builder import BuiltEngine
from mmdit_deploy.contract import Contract
from mmdit_deploy.errors import GraphError, MachineError
from mmdit_deploy.hashed_file import WrittenFile
from mmdit_deploy.model import calls
from mmdit_deploy.spec import PRECISIONS, ModelSpec

Ends = Callable[[BaseException | None], Callable[[], Any]]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The folder that a bundle is made in."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    return folder


@pytest.fixture
def building(bundle: Path, graphs_of: Any, tiny_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> Ends:
    """``building(error)``: a build in a bundle's folder whose builder ends so; without an error, in an empty engine."""

    def ending(error: BaseException | None) -> Callable[[], Any]:
        def build_engine(flavour: Any, graph: onnx.ModelProto, weights: Path, to: Path, log: BuildLog, **_: Any) -> Any:
            log.message("ERROR", "what the builder said")
            if error is not None:
                raise error
            return BuiltEngine(WrittenFile(to, 1, "0" * 64), (), None, 0.0)

        monkeypatch.setattr(engines, "build_engine", build_engine)
        precision, target = PRECISIONS["fp16"], parse_target("rtx:sm89")
        contract = Contract.of(tiny_spec, precision)
        paths = [call.path for call in calls(tiny_spec)]
        standard = graphs_of(tiny_spec, "fp16").standard
        return lambda: engines.build_target(
            target, tiny_spec, precision, contract, standard, bundle, [paths], lambda line: None
        )

    return ending


@pytest.mark.parametrize(
    ("error", "fix"), [(GraphError("no", fix="report it"), "report it"), (None, "report this as a bug")]
)
def test_what_tensorrt_or_the_gate_fails_at_names_a_log_that_outlives_the_bundle(
    building: Ends, bundle: Path, temporary: Path, error: GraphError | None, fix: str
) -> None:
    with pytest.raises(GraphError) as caught:
        building(error)()
    shutil.rmtree(bundle)
    told, path = str(caught.value.fix).split("; build log: ")
    assert told.endswith(fix) and "what the builder said" in Path(path).read_text(encoding="utf-8")
    assert [str(file) for file in temporary.glob("*.log")] == [path]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), MachineError("the disk is full"), OSError(errno.EIO, "Input/output error")]
)
def test_other_ends_leave_nothing(building: Ends, temporary: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        building(error)()
    assert caught.value is error and not list(temporary.glob("*.log"))
