"""What the machine lacks, and what is out of tolerance: the right exit status, and nothing left behind."""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from mmdit_deploy.bundle import open_bundle
from mmdit_deploy.export import pipeline

SMALL_DISK = "33m"  # as much as is asked for, and less than may be there in the end


def test_onnxruntime_is_missed_by_the_name_of_its_extra(
    refuse: Callable[..., str], run: Callable[..., Any], exported: tuple[Path, Any], checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("mmdit_deploy.export.pipeline.write_safetensors", lambda *_: pytest.fail("said too late"))
    refuse(3, [checkpoint], "mmdit-deploy[cpu]")
    for command in ("verify", "bench"):
        run(command, exported[0]).refused(3, "mmdit-deploy[cpu]")


def test_graphs_and_unverified_bundles_need_no_onnxruntime(
    run: Callable[..., Any], checkpoint: Path, dist: Path, quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run("export", checkpoint, *quick, "--no-verify", "-o", dist / "a").status == 0
    assert run("export", checkpoint, *quick, "--graph-only", "-o", dist / "b").status == 0
    open_bundle(dist / "a")


def test_a_disk_that_is_too_small_from_the_start(
    run: Callable[..., Any], checkpoint: Path, small_disk: Path, quick: tuple[str, ...]
) -> None:
    (small_disk / "mine").write_bytes(bytes(8 * 2**20))
    run("export", checkpoint, *quick, "-o", small_disk / "b").refused(3, str(small_disk), "-o")
    assert os.listdir(small_disk) == ["mine"]


@pytest.mark.parametrize("options", [["--no-verify"], ["--graph-only"], []])
def test_a_disk_that_fills_up(
    run: Callable[..., Any], checkpoint: Path, small_disk: Path, options: list[str], quick: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    build = pipeline.build_graphs

    def others_write_too(*args: Any, **kwargs: Any) -> Any:
        graphs = build(*args, **kwargs)
        with open(small_disk / "theirs", "wb", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue
        return graphs

    monkeypatch.setattr(pipeline, "build_graphs", others_write_too)
    run("export", checkpoint, *options, *quick, "-o", small_disk / "b").refused(3)
    assert os.listdir(small_disk) == ["theirs"]


def test_an_engine_out_of_tolerance_is_not_written(
    run: Callable[..., Any],
    checkpoint: Path,
    dist: Path,
    quick: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = pipeline.build_graphs

    def other_activation(*args: Any, **kwargs: Any) -> Any:
        graphs = build(*args, **kwargs)
        (dialect,) = graphs.lowered
        model = copy.deepcopy(graphs.lowered[dialect])
        block = next(f for f in model.functions if f.name == "MMDiTJointBlock")
        gelu = next(n for n in block.node if n.op_type == "Gelu")
        gelu.CopyFrom(onnx.helper.make_node("Relu", list(gelu.input), list(gelu.output)))
        return dataclasses.replace(graphs, lowered={dialect: model})

    monkeypatch.setattr(pipeline, "build_graphs", other_activation)
    said = run("export", checkpoint, *quick, "-o", dist / "b").refused(1, "blocks.0 (local)", "rel-L2")
    assert "FAIL" in said and os.listdir(dist) == []
