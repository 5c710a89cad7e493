"""What is fused of whole models that others exported: ours against ONNX Runtime's own MMDiT optimizer.

    python bench/fusion_coverage.py [--exporter NAME]… [--model NAME]… [--again]

Tiny models of diffusers' classes (tests/graph/spellings/whole_models.py), exported by torch's dynamo exporter, its
TorchScript exporter, and optimum (which needs an environment of its own, so those graphs are fixtures, with made-up
weights). The graphs are kept in dist/bench/fusion_coverage; --again exports them anew.

What an exporter cannot write is given to it in another form: RMS norms as diffusers' own modules to TorchScript,
Qwen-Image's RoPE in real numbers to all. TorchScript writes the sizes of FLUX's inputs into the graph, so those graphs
are static.

What there is to fuse is counted in PyTorch, by a hook on one real forward pass: calls of
scaled_dot_product_attention, RMS norms, and RoPE applications. The gate: every attention and every norm is one op, and
ONNX Runtime computes the same before and after (relative L2 at most 1e-5), with unlike and other sizes than those that
the models were exported with. Where ONNX Runtime rejects a graph as it was exported, PyTorch's output is what to equal.
The exit status is 1 where the gate is not met.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from measure import write_result

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY / "tests" / "graph" / "spellings"))

from make import EXPORTERS, bare  # noqa: E402
from whole_models import FIXTURES, OPTIMUM, TINY, file_name, run_inputs  # noqa: E402
from without_weights import fill, read  # noqa: E402

from mmdit_deploy.graph.calls import executed_ops  # noqa: E402
from mmdit_deploy.graph.optimize import optimize_file  # noqa: E402

OUT = REPOSITORY / "dist" / "bench" / "fusion_coverage"
OPSETS: Mapping[str, Sequence[int]] = {"dynamo": (18, 20, 23), "torchscript": (14, 17, 20)}
MAX_REL_L2 = 1e-5
# What each call of PyTorch's may be in a fused graph.
FUSED: Mapping[str, Sequence[str]] = {
    "Attention": ("Attention", "com.microsoft.Attention", "com.microsoft.MultiHeadAttention"),
    "RMSNormalization": (
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "com.microsoft.SimplifiedLayerNormalization",
        "com.microsoft.SkipSimplifiedLayerNormalization",
    ),
    "RotaryEmbedding": ("RotaryEmbedding", "com.microsoft.RotaryEmbedding"),
    "LayerNormalization": ("LayerNormalization", "com.microsoft.SkipLayerNormalization"),
    "Gelu": ("Gelu", "com.microsoft.Gelu", "com.microsoft.FastGelu", "com.microsoft.BiasGelu"),
}
GATE = ("Attention", "RMSNormalization")


@dataclass(frozen=True)
class Fused:
    """What one optimizer made of one graph.

    Args:
        counts: by what PyTorch calls.
        nodes: that one run executes.
        rel_l2: of the output against the unoptimized graph's, both in ONNX Runtime (against PyTorch's where that does
            not run); None where this one does not.
        failed: why not.
    """

    counts: Mapping[str, int]
    nodes: int
    rel_l2: float | None
    failed: str = ""

    def passes(self, calls: Mapping[str, int]) -> bool:
        """Whether the gate is met."""
        equal = self.rel_l2 is not None and self.rel_l2 <= MAX_REL_L2
        return equal and all(self.counts[op] == calls[op] for op in GATE)


@dataclass(frozen=True)
class Row:
    """One graph.

    Args:
        calls: what PyTorch calls.
        left: the near misses of our rules, with reasons.
    """

    model: str
    exporter: str
    opset: int
    calls: Mapping[str, int]
    before: Fused
    ours: Fused
    onnxruntime: Fused
    left: Sequence[str]


def main() -> int:
    """Parse arguments, run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=tuple(TINY))
    parser.add_argument("--exporter", action="append", choices=(*OPSETS, "optimum"))
    parser.add_argument("--again", action="store_true", help="export again what is there already")
    args = parser.parse_args()
    for logger in ("torch.onnx", "onnxscript", "onnxruntime", "fusion_base"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    OUT.mkdir(parents=True, exist_ok=True)
    rows = []
    print(_header())
    for row in _rows(args.model or tuple(TINY), args.exporter or (*OPSETS, "optimum"), again=args.again):
        rows.append(row)
        print(_line(row), flush=True)
    met = all(row.ours.passes(row.calls) for row in rows)
    for row in rows:
        for who, fused in (("as exported", row.before), ("ours", row.ours), ("ONNX Runtime's", row.onnxruntime)):
            if fused.failed:
                print(f"{row.model} {row.exporter} {row.opset}, {who}: {fused.failed}")
        for reason in row.left:
            print(f"left in {row.model} {row.exporter} {row.opset}: {reason}")
    print(f"gate: {'met' if met else 'NOT met'} by {sum(r.ours.passes(r.calls) for r in rows)} of {len(rows)} graphs")
    if args.model is None and args.exporter is None:
        packages = ("diffusers", "onnxscript", "onnx-ir")
        optimum = {name: value for name, value in json.loads((FIXTURES / "index.json").read_text())["optimum"].items()}
        write_result(
            "fusion_coverage",
            {
                "exported_with": {name: version(name) for name in packages},
                "optimum_fixtures_exported_with": optimum,
                "replaced_for_export": {
                    "torchscript": "torch.nn.RMSNorm by diffusers' RMSNorm; FLUX.1 and FLUX.2 with static axes",
                    "qwen-image": "complex RoPE by real RoPE; frequencies of the image's tokens as a table",
                },
                "max_rel_l2": MAX_REL_L2,
                "gate_met": met,
                "graphs": [dataclasses.asdict(row) for row in rows],
            },
        )
    return 0 if met else 1


def _rows(models: Sequence[str], exporters: Sequence[str], *, again: bool) -> Iterator[Row]:
    for name in models:
        opsets = {e: OPSETS[e] for e in exporters if e in OPSETS}
        opsets["optimum"] = [o for m, _, o in OPTIMUM if m == name and "optimum" in exporters]
        for exporter, numbers in opsets.items():
            for opset in numbers:
                yield _row(name, exporter, opset, again=again)


def _row(name: str, exporter: str, opset: int, *, again: bool) -> Row:
    """Export, unless that is done, and optimize by both."""
    path = OUT / f"{name}.{exporter}-{opset}" / "model.onnx"
    calls_file = path.parent / "calls.json"
    if again or not calls_file.exists():
        path.parent.mkdir(exist_ok=True)
        calls_file.write_text(json.dumps(_export(name, exporter, opset, path)))
    calls = {op: 0 for op in FUSED} | json.loads(calls_file.read_text())
    try:
        expected = _execute(path.read_bytes())
    except Exception:  # ONNX Runtime rejects what was exported; `before` will say why
        expected = np.load(path.with_name("pytorch.npy"))
    left: list[str] = []
    before, ours, theirs = (
        _fused(path, optimize, expected) for optimize in (_as_it_is, partial(_ours, left=left), _theirs)
    )
    return Row(name, exporter, opset, calls, before, ours, theirs, left)


def _export(name: str, exporter: str, opset: int, path: Path) -> Mapping[str, int]:
    """Write the graph and PyTorch's output, and return what PyTorch calls."""
    case = TINY[name].case(name, exporter)
    if exporter == "optimum":
        model = fill(read(FIXTURES / file_name(name, exporter, opset)))
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            model = bare(EXPORTERS[exporter](case, opset))
        inputs = run_inputs({n: _with_axes(t.shape, case.axes.get(n, {})) for n, t in case.inputs.items()})
        with torch.inference_mode():
            np.save(path.with_name("pytorch.npy"), case.module(*map(torch.from_numpy, inputs.values())).numpy())
    onnx.save(model, path)
    return case.expect


def _with_axes(sizes: Sequence[int], axes: Mapping[int, str]) -> list[int | str]:
    return [axes.get(i, size) for i, size in enumerate(sizes)]


def _fused(path: Path, optimize: Callable[[Path], onnx.ModelProto], expected: np.ndarray) -> Fused:
    try:
        model = optimize(path)
    except Exception as error:  # a rival may run into anything
        if optimize is not _theirs:
            raise
        return Fused(dict.fromkeys(FUSED, 0), 0, None, f"optimizing fails: {type(error).__name__}: {str(error)[:300]}")
    ops = Counter(executed_ops(model))
    counts = {call: sum(ops[op] for op in names) for call, names in FUSED.items()}
    try:
        result = _execute(model.SerializeToString())
    except Exception as error:  # whatever ONNX Runtime does not like
        return Fused(counts, sum(ops.values()), None, f"running fails: {type(error).__name__}: {str(error)[:300]}")
    difference = np.linalg.norm(result - expected) / np.linalg.norm(expected)
    return Fused(counts, sum(ops.values()), float(difference))


def _as_it_is(path: Path) -> onnx.ModelProto:
    return onnx.load(path)


def _ours(path: Path, left: list[str]) -> onnx.ModelProto:
    """What `mmdit-optimize` makes of the file."""
    target = path.with_name("optimized.onnx")
    for done in optimize_file(path, target, force=True).passes:
        left += [f"{done.name}: {at.node}: {at.reason}" for at in done.left]
    return onnx.load(target)


def _theirs(path: Path) -> onnx.ModelProto:
    """ONNX Runtime's script for MMDiTs, and none of its C++ optimizations."""
    from onnxruntime.transformers.optimizer import optimize_model

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return optimize_model(str(path), model_type="mmdit", opt_level=0).model


def _execute(model: bytes) -> np.ndarray:
    """The output in ONNX Runtime as written: none of its own fusions."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    types = {i.name: {"tensor(int64)": np.int64, "tensor(bool)": np.bool_}.get(i.type) for i in session.get_inputs()}
    values = run_inputs({i.name: i.shape for i in session.get_inputs()})
    return np.asarray(session.run(None, {n: v.astype(types[n] or np.float32) for n, v in values.items()})[0])


_COLUMNS = {"Attention": "attention", "RMSNormalization": "RMS norm", "RotaryEmbedding": "RoPE",
            "LayerNormalization": "LayerNorm", "Gelu": "GELU"}  # fmt: skip


def _header() -> str:
    columns = "".join(f"{title:>14}" for title in _COLUMNS.values())
    return (
        "fused of called: by us, by ONNX Runtime's optimizer (mmdit); relative L2 to the unoptimized graph's output\n"
        f"{'graph':32}{columns}{'nodes':>19}{'relative L2':>15}"
    )


def _line(row: Row) -> str:
    ours, theirs = row.ours, row.onnxruntime
    counts = (f"{ours.counts[op]}, {theirs.counts[op]} of {row.calls[op]}" for op in _COLUMNS)
    nodes = f"{ours.nodes}, {theirs.nodes} of {row.before.nodes}"
    errors = ", ".join("fails" if f.rel_l2 is None else f"{f.rel_l2:.0e}" for f in (ours, theirs))
    graph = f"{row.model} {row.exporter} {row.opset}"
    return f"{graph:32}{''.join(f'{text:>14}' for text in counts)}{nodes:>19}{errors:>15}"


if __name__ == "__main__":
    sys.exit(main())
