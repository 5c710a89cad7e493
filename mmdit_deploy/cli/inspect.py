"""`mmdit-inspect PATH`: what is in a bundle, a checkpoint, an ONNX file or a safetensors file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from mmdit_deploy.cli.terminal import emit, run_command, table

_LISTED = 40  # tensors of a file; --json has them all


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its arguments; those of the process by default.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        "mmdit-inspect",
        description="Say what is in a bundle (every byte is checked), a diffusers checkpoint folder, an "
        ".onnx file or a .safetensors file. No weight is loaded.",
    )
    parser.add_argument("path", metavar="BUNDLE|CHECKPOINT|FILE", help="the folder or file")
    return run_command(parser, _work, argv)


def _work(args: argparse.Namespace) -> int:
    from mmdit_deploy.cli.describe import describe

    data = describe(args.path)
    sections = _TEXT[data["kind"]](data)
    emit(args, "\n\n".join(section for section in sections if section), data)
    return 0


def _bundle(data: dict[str, Any]) -> list[str]:
    contract = data["contract"]
    tensors = [
        (role, tensor["name"], _axes(tensor["axes"]), tensor["dtype"])
        for role, tensors in (("input", contract["inputs"]), ("output", contract["outputs"]))
        for tensor in tensors
    ]
    ranges = [(axis, *(str(size) for size in sizes)) for axis, sizes in contract["ranges"].items()]
    engines = [(name, str(e.get("graph", "")), str(e.get("execution", ""))) for name, e in data["engines"].items()]
    return [
        f"bundle {data['path']}: {_plain(data['name'])}, {data['precision']}, {_size(data['bytes'])}, "
        "every byte as it was written",
        f"weights: {_plain(data['weights'].get('origin', 'not said'))}",
        _spec(data["spec"]),
        _titled("contract", tensors),
        _titled("ranges", [("axis", "min", "opt", "max"), *ranges]),
        _titled("engines", engines) or "engines: none",
        "\n".join(_verdict(verdict) for verdict in data["verdicts"]) or "parity: not verified when it was exported",
        _titled("files", [(name, _size(size)) for name, size in data["files"].items()]),
    ]


def _verdict(verdict: dict[str, Any]) -> str:
    worst = verdict["worst_rel_l2"]
    figure = "NaN" if worst is None else f"{worst:.2e}"
    outcome = "PASS" if verdict["passed"] else "NOT PASSED"
    target, checks = _plain(verdict["target"]), verdict["checks"]
    line = f"parity: {outcome} on {target}, {checks} checks, largest rel-L2 {figure}"
    return "\n".join([line, *(f"  not executed: {_plain(item)}" for item in verdict["not_executed"])])


def _checkpoint(data: dict[str, Any]) -> list[str]:
    parts = [
        (part, f"{p['parameters']:,}", f"{p['share']:.1%}", _size(p["bytes"])) for part, p in data["parts"].items()
    ]
    total = ("all", f"{data['parameters']:,}", "", _size(sum(p["bytes"] for p in data["parts"].values())))
    return [
        f"checkpoint {data['path']}: {_plain(data['class'])}, {data['parameters']:,} parameters, "
        f"{_size(data['bytes'])}",
        _spec(data["spec"]),
        _titled("parameters", [("part", "count", "share", "size"), *parts, total]),
        _dtypes(data),
        _titled("files", [(_plain(name), _size(size)) for name, size in data["files"].items()]),
    ]


def _onnx(data: dict[str, Any]) -> list[str]:
    opsets = ", ".join(f"{_plain(domain)} {version}" for domain, version in data["opsets"].items())
    ios = [
        (role, _plain(tensor["name"]), _axes(tensor["axes"]), tensor["dtype"])
        for role in ("inputs", "outputs")
        for tensor in data[role]
    ]
    external = [
        (
            _plain(f["location"]),
            f"{f['tensors']} tensors",
            _size(f["bytes"]),
            "" if f["found"] else "NOT FOUND",
        )
        for f in data["external"]
    ]
    functions = [(_plain(name), f"{nodes} nodes") for name, nodes in data["functions"].items()]
    return [
        f"ONNX model {data['path']}: {_size(data['bytes'])}, {data['nodes']} nodes, opset {opsets}, "
        f"IR version {data['ir_version']}, by {_plain(data['producer']) or 'unknown'}",
        _titled("inputs and outputs", ios),
        _titled("functions", functions),
        _titled("executed nodes", [(_plain(op), str(count)) for op, count in data["ops"].items()]),
        f"weights: {data['initializers']} initializers, {_size(data['inline_bytes'])} in the file",
        _titled("weights beside it", external),
    ]


def _safetensors(data: dict[str, Any]) -> list[str]:
    rows = [
        (_plain(key), tensor["dtype"], str(tensor["shape"]), _size(tensor["bytes"]))
        for key, tensor in list(data["tensors"].items())[:_LISTED]
    ]
    more = len(data["tensors"]) - len(rows)
    listing = _titled("tensors", rows) + (f"\n  and {more} more (--json lists all)" if more else "")
    metadata = [(_plain(key), _plain(value)[:100]) for key, value in data["metadata"].items()]
    return [
        f"safetensors file {data['path']}: {_size(data['bytes'])}, {len(data['tensors'])} tensors, "
        f"{data['parameters']:,} values",
        _dtypes(data),
        _titled("metadata", metadata),
        listing,
    ]


def _dtypes(data: dict[str, Any]) -> str:
    rows = [(name, f"{entry['tensors']} tensors", _size(entry["bytes"])) for name, entry in data["dtypes"].items()]
    return _titled("dtypes", rows)


def _spec(spec: dict[str, Any]) -> str:
    return _titled("spec", [(field, _plain(value)) for field, value in spec.items() if value not in ([], ())])


def _titled(title: str, rows: Sequence[Sequence[str]]) -> str:
    return f"{title}\n{table(rows)}" if rows else ""


def _axes(axes: list[str | int]) -> str:
    return "[" + ", ".join(_plain(axis) for axis in axes) + "]"


def _plain(value: object) -> str:
    """One line that cannot steer a terminal: names come from files."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(value))


def _size(nbytes: int) -> str:
    """Bytes in decimal units, as disks are sold: ``4.06 GB``."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} B"


_TEXT = {"bundle": _bundle, "checkpoint": _checkpoint, "onnx": _onnx, "safetensors": _safetensors}


if __name__ == "__main__":
    sys.exit(main())
