"""Modulations whose weights alone are quantized are one product too: one span of the file, dequantized as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch

from mmdit_deploy.checkpoint import random_tensor
from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.function_types import callers_first, type_function_inputs
from mmdit_deploy.graph.lower.batched_modulation import batched_modulation
from mmdit_deploy.graph.modulations import check_modulations
from mmdit_deploy.graph.named_functions import SHARED
from mmdit_deploy.precision import SCHEMES, LinearPlan
from mmdit_deploy.precision.quantize import quantize_weight
from mmdit_deploy.runtime import open_session

COLUMNS, ROWS = 128, (6, 6, 2)
CALLS = tuple(f"modulations.{i}.img" for i in range(len(ROWS)))
BODIES = {
    "fp8-weights": "w = DequantizeLinear(weight, scale) t = Transpose<perm = [1, 0]>(w) p = MatMul(x, t) "
    "c = Mul(p, channel) s = Add(c, bias)",
    "w4a16": "w = DequantizeLinear<axis = 1, block_size = 64>(weight, scale) t = Transpose<perm = [1, 0]>(w) "
    "p = MatMul(x, t) s = Add(p, bias)",
}
ROLES = {"fp8-weights": ("weight", "bias", "scale", "channel"), "w4a16": ("weight", "bias", "scale")}
STORED = {"weight": "weight", "scale": "weight_scale", "channel": "channel_scale"}


def write(folder: Path, scheme: str, *, shared: bool = True, moved: str = "") -> onnx.ModelProto:
    """Three calls on weights in a file that are adjacent, but for a role that is moved."""
    outputs = ", ".join(f"float[B,1,{rows}] m{i}" for i, rows in enumerate(ROWS))
    nodes = "\n".join(
        f'["{call}"] m{i} = mmdit.Modulation(x, {", ".join(f"{role}{i}" for role in ROLES[scheme])})'
        for i, call in enumerate(CALLS)
    )
    proto = onnx.parser.parse_model(
        f"""<ir_version: 11, opset_import: ["": 23, "mmdit": 1]>
        g (float[B,{COLUMNS}] x) => ({outputs}) {{ {nodes} }}
        <domain: "mmdit", opset_import: ["": 23]>
        Modulation (x, {", ".join(ROLES[scheme])}) => (y) {{
            one = Constant<value = int64[1] {{1}}>() {BODIES[scheme]} y = Unsqueeze(s, one)
        }}"""
    )
    if shared and scheme == "fp8-weights":
        proto.functions[0].metadata_props.add(key=SHARED, value="scale")
    content = b""
    made = []
    for i, rows in enumerate(ROWS):
        weight = random_tensor(i, "w", (rows, COLUMNS), std=0.1 * (i + 1))
        stored = quantize_weight(weight, LinearPlan(SCHEMES[scheme]), torch.float32)
        bias = random_tensor(i, "b", (rows,), std=1.0)
        made.append({"bias": bias, **{role: stored[name] for role, name in STORED.items() if name in stored}})
    types = {torch.float8_e4m3fn: onnx.TensorProto.FLOAT8E4M3FN, torch.uint8: onnx.TensorProto.INT4}
    for role in ROLES[scheme]:
        for i, tensors in enumerate(made):
            tensor = tensors[role]
            content += bytes(64) if role == moved else b""
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            dims = [ROWS[i], COLUMNS] if role == "weight" else tensor.shape
            entry = proto.graph.initializer.add(
                name=f"{role}{i}", dims=dims, data_type=types.get(tensor.dtype, onnx.TensorProto.FLOAT)
            )
            entry.data_location = onnx.TensorProto.EXTERNAL
            for key, value in {"location": "weights", "offset": len(content), "length": len(data)}.items():
                entry.external_data.add(key=key, value=str(value))
            content += data
    (folder / "weights").write_bytes(content)
    return proto


def execute(model: onnx.ModelProto, folder: Path) -> list[np.ndarray]:
    session = open_session(model.SerializeToString(), "ort-cpu", weights_folder=folder)
    x = random_tensor(9, "x", (3, COLUMNS), std=1.0).numpy()
    return [np.asarray(out) for out in session.run(None, {"x": x})]


def in_ir(proto: onnx.ModelProto) -> ir.Model:
    model = ir.from_proto(proto)
    type_function_inputs(model, callers_first(model))
    return model


@pytest.mark.parametrize("scheme", BODIES)
def test_they_become_one_product_of_the_same_numbers(scheme: str, tmp_path: Path) -> None:
    before = write(tmp_path, scheme)
    model = in_ir(before)
    assert batched_modulation.apply(model) == len(ROWS)
    after = ir.to_proto(model)
    ops = Counter(node.op_type for node in after.graph.node)
    assert ops["MatMul"] == ops["DequantizeLinear"] == ops["Split"] == 1 and not after.functions
    joined = {t.name.rpartition(".")[2]: t for t in after.graph.initializer}
    assert list(joined["weight"].dims) == [sum(ROWS), COLUMNS]
    onnx.save(after, tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    for mine, theirs in zip(execute(after, tmp_path), execute(before, tmp_path), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)
    assert check_modulations(after, before, CALLS) == len(ROWS)
    assert batched_modulation.apply(model) == 0


NEAR_MISSES = {
    "a scale that may differ": {"scheme": "fp8-weights", "shared": False},
    "weights that are not adjacent": {"scheme": "w4a16", "moved": "weight"},
    "scales that are not adjacent": {"scheme": "w4a16", "moved": "scale"},
    "factors that are not adjacent": {"scheme": "fp8-weights", "moved": "channel"},
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_stays(name: str, tmp_path: Path) -> None:
    model = in_ir(write(tmp_path, **NEAR_MISSES[name]))  # type: ignore[arg-type]
    before = ir.to_proto(model)
    assert batched_modulation.apply(model) == 0
    assert ir.to_proto(model).graph == before.graph and len(model.functions) == 1
    assert all(np.isfinite(out).all() for out in execute(before, tmp_path))


def shift(model: onnx.ModelProto, role: str) -> None:
    """What is joined begins a row later."""
    tensor = next(t for t in model.graph.initializer if t.name.endswith(f".{role}"))
    entries = {entry.key: entry for entry in tensor.external_data}
    entries["offset"].value = str(int(entries["offset"].value) + int(entries["length"].value) // tensor.dims[0])


def exchange(model: onnx.ModelProto) -> None:
    """What is to be added is what it is multiplied by, and the other way round."""
    product, summed = (next(n for n in model.graph.node if n.op_type == op) for op in ("Mul", "Add"))
    product.input[1], summed.input[1] = summed.input[1], product.input[1]


FAULTS: dict[str, tuple[str, Callable[[onnx.ModelProto], None]]] = {
    "weights a row on": ("w4a16", lambda model: shift(model, "weight")),
    "scales a row on": ("w4a16", lambda model: shift(model, "scale")),
    "factors a row on": ("fp8-weights", lambda model: shift(model, "channel")),
    "factors and biases exchanged": ("fp8-weights", exchange),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_joined_wrongly_is_refused(fault: str, tmp_path: Path) -> None:
    scheme, change = FAULTS[fault]
    before = write(tmp_path, scheme)
    model = in_ir(before)
    batched_modulation.apply(model)
    after = ir.to_proto(model)
    change(after)
    with pytest.raises(GraphError, match="its own rows of the weights file"):
        check_modulations(after, before, CALLS)
