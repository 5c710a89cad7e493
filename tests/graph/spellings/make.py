"""Write the fixtures of `tests/graph/fixtures`: each case through every exporter at every opset, each spelling once.

    python tests/graph/spellings/make.py                 all subjects
    python tests/graph/spellings/make.py sdpa rms_norm   some

A subject is a module beside this one with a tuple ``CASES`` of `Case`. What two exporters or opsets write alike is one
file; `index.json` says who writes it. Exporting takes minutes, so the fixtures are committed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from case import Case

HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parent / "fixtures"
NO_SUBJECTS = {"make", "case", "foreign", "optimum", "torch_calls", "whole_models", "without_weights"}
OPSETS = {"dynamo": range(17, 24), "torchscript": range(14, 21)}


def dynamo(case: Case, opset: int) -> onnx.ModelProto:
    """torch.onnx.export(dynamo=True)."""
    dims = {axis: torch.export.Dim(axis) for axes in case.axes.values() for axis in axes.values()}
    dynamic = {n: {i: dims[axis] for i, axis in case.axes.get(n, {}).items()} for n in case.inputs}
    program = torch.onnx.export(
        case.module,
        (),
        kwargs=dict(case.inputs),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=dynamic,
        verbose=False,
    )
    assert program is not None
    return program.model_proto


def torchscript(case: Case, opset: int) -> onnx.ModelProto:
    """torch.onnx.export(dynamo=False), the exporter of before."""
    buffer = io.BytesIO()
    torch.onnx.export(
        case.module,
        tuple(case.inputs.values()),
        buffer,
        dynamo=False,
        opset_version=opset,
        input_names=list(case.inputs),
        output_names=["out"],
        dynamic_axes={name: dict(axes) for name, axes in case.axes.items()},
    )
    return onnx.load_from_string(buffer.getvalue())


EXPORTERS = {"dynamo": dynamo, "torchscript": torchscript}


def spellings(case: Case) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Each exporter and opset that writes the case, and what it writes; one that cannot is named and left out."""
    for exporter in case.exporters:
        for opset in OPSETS[exporter]:
            try:
                model = EXPORTERS[exporter](case, opset)
            except Exception as error:  # an exporter fails with whatever it runs into
                print(f"  {case.name}: {exporter} {opset} cannot: {type(error).__name__}: {str(error)[:150]}")
                continue
            yield f"{exporter} {opset}", bare(model)


def bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without stack traces, and with no more than a graph needs."""
    model.ClearField("metadata_props")
    for nodes in (model.graph.node, *(f.node for f in model.functions)):
        for node in nodes:
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        value.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    return model


def _fingerprint(model: onnx.ModelProto) -> str:
    """Of all but the opset and the exporter's version."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for name in ("opset_import", "producer_name", "producer_version", "ir_version"):
        copy.ClearField(name)
    for function in copy.functions:
        function.ClearField("opset_import")
    return hashlib.sha256(copy.SerializeToString(deterministic=True)).hexdigest()


def make(subject: str) -> None:
    """Write one subject's folder anew."""
    folder = FIXTURES / subject
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    index: dict[str, dict[str, object]] = {}
    for case in importlib.import_module(subject).CASES:
        case.module.eval()
        written: dict[str, str] = {}
        for who, model in spellings(case):
            fingerprint = _fingerprint(model)
            if fingerprint not in written:
                written[fingerprint] = file = f"{case.name}.{who.replace(' ', '-')}.onnx"
                (folder / file).write_bytes(model.SerializeToString(deterministic=True))
                index[file] = {"case": case.name, "written_by": [], "expect": dict(case.expect)}
            by = index[written[fingerprint]]["written_by"]
            assert isinstance(by, list)
            by.append(who)
        print(f"{subject}/{case.name}: {len(written)} spellings")
    document = {"torch": torch.__version__.split("+")[0], "files": index}
    (folder / "index.json").write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    """Parse arguments and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("subjects", nargs="*")
    named = parser.parse_args().subjects
    for logger in ("torch.onnx", "onnxscript"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    beside = {p.stem for p in HERE.glob("*.py")} - NO_SUBJECTS
    for subject in named or sorted(beside):
        torch.manual_seed(0)
        make(subject)


if __name__ == "__main__":
    main()
