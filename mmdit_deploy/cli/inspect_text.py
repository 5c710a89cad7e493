"""What `mmdit-inspect` says to people, section by section, of each kind of thing that it describes."""

from __future__ import annotations

from typing import Any

from mmdit_deploy.build import EngineRecord
from mmdit_deploy.cli.describe_bundle import tensorrt_entries
from mmdit_deploy.cli.engine_text import engine_file_text, profiles_text, targets_text
from mmdit_deploy.cli.plain import in_units, plain, shown_axes, titled

_LISTED = 40  # tensors of a file; --json has them all


def text_of(data: dict[str, Any]) -> str:
    """The text for people.

    Args:
        data: what `mmdit_deploy.cli.describe.describe` gave.
    """
    return "\n\n".join(section for section in _SECTIONS[data["kind"]](data) if section)


def _bundle(data: dict[str, Any]) -> list[str]:
    contract = data["contract"]
    tensors = [
        (role, tensor["name"], shown_axes(tensor["axes"]), tensor["dtype"])
        for role, tensors in (("input", contract["inputs"]), ("output", contract["outputs"]))
        for tensor in tensors
    ]
    ranges = [(axis, *sizes) for axis, sizes in contract["ranges"].items()]
    engines = [
        (name, " and ".join(part["graph"] for part in (e.get("conditioning"), e) if part), e.get("execution", ""))
        for name, e in data["engines"].items()
    ]
    entries = tensorrt_entries(data["engines"])
    records = {name: EngineRecord.from_json(target, entry) for name, (target, entry) in entries.items()}
    return [
        f"bundle {plain(data['path'])}: {plain(data['name'])}, {data['precision']}, {in_units(data['bytes'])}, "
        "every byte as it was written",
        f"weights: {plain(data['weights']['origin'])}",
        _precision(data),
        _spec(data["spec"]),
        titled("contract", tensors),
        titled("ranges", [("axis", "min", "opt", "max"), *ranges]),
        profiles_text(contract["profiles"]) if len(contract["profiles"]) > 1 else "",
        _split(data["split"]),
        titled("engines", engines) or "engines: none",
        *targets_text(records, data["traffic"]),
        "\n".join(_verdict(verdict) for verdict in data["verdicts"]) or "parity: not verified when it was exported",
        titled("versions", list(data["versions"].items())),
        titled("files", [(name, in_units(nbytes)) for name, nbytes in data["files"].items()]),
    ]


def _split(split: dict[str, Any] | None) -> str:
    """The parts of a bundle in two."""
    if split is None:
        return ""
    total = sum(part["weight_bytes"] for part in split.values())
    when = {"conditioning": "run once for a schedule", "trunk": "run for each step"}
    rows = [
        (name, in_units(part["weight_bytes"]), f"{part['weight_bytes'] / total:.1%} of the weights", when[name])
        for name, part in split.items()
    ]
    (table,) = split["conditioning"]["contract"]["outputs"]
    tensor = ("between them", table["name"], shown_axes(table["axes"]), table["dtype"])
    return titled("parts", [*rows, tensor])


def _precision(data: dict[str, Any]) -> str:
    """What is quantized, and what stays in fp32."""
    plan = data["precision_plan"]
    rows: list[tuple[Any, ...]] = [(scheme, f"{count} linear layers") for scheme, count in plan["linears"].items()]
    if plan["fp8_attentions"]:
        rows.append(("fp8", f"{plan['fp8_attentions']} attentions"))
    if plan["fp32_values"]:
        names = list(plan["fp32_values"])
        rows.append(("fp32", f"{sum(plan['fp32_values'].values())} values of {', '.join(names[:6])}"))
    if plan["bf16_attentions"]:
        rows.append(("bf16", f"the attentions of {', '.join(plan['bf16_attentions'][:6])}"))
    return titled(f"precision plan; the rest is {data['base']}", rows) if rows else ""


def _verdict(verdict: dict[str, Any]) -> str:
    worst = verdict["worst_rel_l2"]
    figure = "NaN" if worst is None else f"{worst:.2e}"
    executed = verdict["engine_executed"]
    outcome = ("PASS" if executed else "NOT EXECUTED") if verdict["passed"] else "NOT PASSED"
    target, checks = plain(verdict["target"]), verdict["checks"]
    what = "checks" if executed else "checks of its graph"
    line = f"parity: {outcome} on {target}, {checks} {what}, largest rel-L2 {figure}"
    return "\n".join([line, *(f"  not executed: {plain(item)}" for item in verdict["not_executed"])])


def _checkpoint(data: dict[str, Any]) -> list[str]:
    parts = [
        (part, f"{p['parameters']:,}", f"{p['share']:.1%}", in_units(p["bytes"])) for part, p in data["parts"].items()
    ]
    total = ("all", f"{data['parameters']:,}", "", in_units(sum(p["bytes"] for p in data["parts"].values())))
    only = data["conditioning_only"]
    return [
        f"checkpoint {plain(data['path'])}: {data['title']} ({data['class']}), {data['layout']} layout, "
        f"{data['parameters']:,} parameters, {in_units(data['bytes'])}",
        "\n".join(plain(note) for note in data["notes"]),
        _spec(data["spec"]),
        titled("parameters", [("part", "count", "share", "size"), *parts, total])
        + f"\n  depend on conditioning only, and on no token: {only['parameters']:,} ({only['share']:.1%})",
        _dtypes(data),
        titled("files", [(name, in_units(nbytes)) for name, nbytes in data["files"].items()]),
    ]


def _onnx(data: dict[str, Any]) -> list[str]:
    opsets = ", ".join(f"{plain(domain)} {version}" for domain, version in data["opsets"].items())
    ios = [
        (role, tensor["name"], shown_axes(tensor["axes"]), tensor["dtype"])
        for role in ("inputs", "outputs")
        for tensor in data[role]
    ]
    external = [
        (f["location"], f"{f['tensors']} tensors", in_units(f["bytes"]), "" if f["found"] else "NOT FOUND")
        for f in data["external"]
    ]
    functions = [(name, f"{nodes} nodes") for name, nodes in data["functions"].items()]
    return [
        f"ONNX model {plain(data['path'])}: {in_units(data['bytes'])}, {data['nodes']} nodes, opset {opsets}, "
        f"IR version {data['ir_version']}, by {plain(data['producer']) or 'unknown'}",
        "\n".join(plain(line) for line in (data["problem"] or "").splitlines()),
        titled("inputs and outputs", ios),
        titled("functions", functions),
        titled("executed nodes", list(data["ops"].items())),
        f"weights: {data['initializers']} initializers, {in_units(data['inline_bytes'])} in the file",
        titled("weights beside it", external),
    ]


def _safetensors(data: dict[str, Any]) -> list[str]:
    rows = [
        (key, tensor["dtype"], tensor["shape"], in_units(tensor["bytes"]))
        for key, tensor in list(data["tensors"].items())[:_LISTED]
    ]
    more = len(data["tensors"]) - len(rows)
    listing = titled("tensors", rows) + (f"\n  and {more} more (--json lists all)" if more else "")
    metadata = [(key, value[:100]) for key, value in data["metadata"].items()]
    return [
        f"safetensors file {plain(data['path'])}: {in_units(data['bytes'])}, {len(data['tensors'])} tensors, "
        f"{data['parameters']:,} values",
        "\n".join(plain(line) for line in (data["problem"] or "").splitlines()),
        _dtypes(data),
        titled("metadata", metadata),
        listing,
    ]


def _dtypes(data: dict[str, Any]) -> str:
    rows = [(name, f"{entry['tensors']} tensors", in_units(entry["bytes"])) for name, entry in data["dtypes"].items()]
    return titled("dtypes", rows)


def _spec(spec: dict[str, Any]) -> str:
    return titled("spec", [(field, value) for field, value in spec.items() if value not in ([], ())])


_SECTIONS = {
    "bundle": _bundle,
    "checkpoint": _checkpoint,
    "engine": engine_file_text,
    "onnx": _onnx,
    "safetensors": _safetensors,
}
