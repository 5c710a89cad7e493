"""One product for all modulations: it fires, near misses stay, a second run changes nothing, numbers agree."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch

from mmdit_deploy.checkpoint import random_tensor
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Contract
from mmdit_deploy.graph.lower.batched_modulation import batched_modulation
from mmdit_deploy.graph.pipeline import Graphs
from mmdit_deploy.runtime import open_session, run_session
from mmdit_deploy.spec import PRECISIONS, ModelSpec
from mmdit_deploy.verify import Case
from mmdit_deploy.verify.cases import case_inputs
from mmdit_deploy.verify.metrics import compare

WIDTH = 4
ROWS = (6, 6, 2, 2)  # the last text modulation and that of the head have fewer parts


@dataclass(frozen=True)
class Calls:
    """Calls of one function on weights in a file: all weights, then all biases.

    Args:
        body: of the function.
        inputs: what each call reads.
        weights, biases: their order in the file; without biases the function takes none.
        uses: whose weights each call takes.
        gaps: bytes that are left free in front of a tensor, by its name.
        files: where a tensor is, if not in the one file; None for in the graph itself.
    """

    body: str = "g = Gemm<transB=1>(x, w, b) y = Unsqueeze(g, one)"
    inputs: Sequence[str] = "cccc"
    weights: Sequence[int] = (0, 1, 2, 3)
    biases: Sequence[int] = (0, 1, 2, 3)
    uses: Sequence[int] = (0, 1, 2, 3)
    gaps: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, str | None] = field(default_factory=dict)

    def write(self, folder: Path) -> ir.Model:
        """The model; its weights go to a folder."""
        parameters = "x, w, b" if self.biases else "x, w"
        calls = "\n".join(
            f'["modulations.{i}.img"] m{i} = mmdit.Modulation({x}, w{j}{f", b{j}" if self.biases else ""})'
            for i, (x, j) in enumerate(zip(self.inputs, self.uses, strict=True))
        )
        outputs = ", ".join(f"float[B,1,R{i}] m{i}" for i in range(len(self.inputs)))
        proto = onnx.parser.parse_model(
            f"""<ir_version: 11, opset_import: ["": 23, "mmdit": 1]>
            g (float[B,{WIDTH}] c, float[B,{WIDTH}] d) => ({outputs}) {{ {calls} }}
            <domain: "mmdit", opset_import: ["": 23]>
            Modulation ({parameters}) => (y) {{ one = Constant<value = int64[1] {{1}}>() {self.body} }}"""
        )
        shapes = {f"w{i}": (ROWS[i], WIDTH) for i in self.weights} | {f"b{i}": (ROWS[i],) for i in self.biases}
        files: dict[str, bytes] = {}
        for name, shape in shapes.items():
            tensor = random_tensor(0, name, shape, std=1.0).numpy()
            file = self.files.get(name, "weights")
            if file is None:
                proto.graph.initializer.append(onnx.numpy_helper.from_array(tensor, name))
                continue
            files[file] = files.get(file, b"") + bytes(self.gaps.get(name, 0))
            stored = proto.graph.initializer.add(name=name, dims=shape, data_type=onnx.TensorProto.FLOAT)
            stored.data_location = onnx.TensorProto.EXTERNAL
            place = {"location": file, "offset": len(files[file]), "length": tensor.nbytes}
            for key, value in place.items():
                stored.external_data.add(key=key, value=str(value))
            files[file] += tensor.tobytes()
        for file, data in files.items():
            (folder / file).write_bytes(data)
        return ir.from_proto(proto)


NO_BIAS = "g = Gemm<transB=1>(x, w) y = Unsqueeze(g, one)"
NEAR_MISSES = {
    "weights are not adjacent": Calls(gaps=dict.fromkeys(("w1", "w2", "w3"), 16)),
    "biases are not adjacent": Calls(gaps=dict.fromkeys(("b1", "b2", "b3"), 4)),
    "biases are in another order": Calls(biases=(3, 2, 1, 0)),
    "other inputs": Calls(inputs="cdcd"),
    "the same weights twice": Calls(uses=(0, 0, 0, 0)),
    "weights in the graph": Calls(files=dict.fromkeys(("w0", "w1", "w2", "w3"))),
    "biases in another file each": Calls(files={f"b{i}": f"biases{i}" for i in range(4)}),
    "scaled": Calls("g = Gemm<transB=1, alpha=2.0>(x, w, b) y = Unsqueeze(g, one)"),
    "bias scaled": Calls("g = Gemm<transB=1, beta=0.5>(x, w, b) y = Unsqueeze(g, one)"),
    "an activation": Calls("g = Gemm<transB=1>(x, w, b) r = Relu(g) y = Unsqueeze(r, one)"),
    "its input changed": Calls("s = Neg(x) g = Gemm<transB=1>(s, w, b) y = Unsqueeze(g, one)"),
    "a bias that is not added": Calls(NO_BIAS),
    "no biases, and weights that are not adjacent": Calls(
        NO_BIAS, biases=(), gaps=dict.fromkeys(("w1", "w2", "w3"), 16)
    ),
    "another axis": Calls("g = Gemm<transB=1>(x, w, b) two = Constant<value = int64[1] {0}>() y = Unsqueeze(g, two)"),
    "one call": Calls(inputs="c", uses=(0,)),
}


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph if node.op_type != "Constant")


def execute(model: ir.Model, folder: Path) -> list[np.ndarray]:
    """All outputs in ONNX Runtime, for fixed random inputs."""
    session = open_session(ir.to_proto(model).SerializeToString(), "ort-cpu", weights_folder=folder)
    inputs = {name: random_tensor(1, name, (3, WIDTH), std=1.0).numpy() for name in "cd"}
    return [np.asarray(out) for out in session.run(None, {i.name: inputs[i.name] for i in session.get_inputs()})]


def check(model: ir.Model, folder: Path) -> onnx.ModelProto:
    """ONNX's own checker on the file, beside its weights."""
    proto = ir.to_proto(model)
    onnx.save(proto, folder / "model.onnx")
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    return proto


def test_fires(tmp_path: Path) -> None:
    model = Calls().write(tmp_path)
    assert batched_modulation.apply(model) == 4
    assert {op: n for op, n in ops(model).items() if op != "Reshape"} == {"Gemm": 1, "Split": 1}
    assert not model.functions  # nothing calls it any more
    proto = check(model, tmp_path)
    assert [o.name for o in proto.graph.output] == ["m0", "m1", "m2", "m3"]
    spans = {t.name: {e.key: e.value for e in t.external_data} for t in proto.graph.initializer}
    name = next(node.name for node in proto.graph.node if node.op_type == "Gemm")
    # No copy: the joined weight is a longer span of the same file.
    assert spans[f"{name}.weight"] == {"location": "weights", "offset": "0", "length": str(4 * 16 * WIDTH)}
    assert spans[f"{name}.bias"] == {"location": "weights", "offset": str(4 * 16 * WIDTH), "length": str(4 * 16)}
    assert len(spans) == 2


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_stays(name: str, tmp_path: Path) -> None:
    model = NEAR_MISSES[name].write(tmp_path)
    before = ir.to_proto(model)
    assert batched_modulation.apply(model) == 0
    assert ir.to_proto(model).graph == before.graph and len(model.functions) == 1
    assert all(np.isfinite(out).all() for out in execute(model, tmp_path))  # the rule was not spared a broken one


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    model = Calls().write(tmp_path)
    batched_modulation.apply(model)
    before = ir.to_proto(model)
    assert batched_modulation.apply(model) == 0
    assert ir.to_proto(model) == before


@pytest.mark.parametrize(
    ("calls", "count", "products"),
    [
        (Calls(), 4, 1),
        (Calls(weights=(2, 0, 3, 1), biases=(2, 0, 3, 1)), 4, 1),  # the file's order is not the graph's
        (Calls(inputs="ccdd"), 4, 2),
        (Calls(inputs="cccd"), 3, 1),
        (Calls(gaps={"w2": 64, "b2": 64}), 4, 2),
        (Calls(files={"w3": "more", "b3": "more"}), 3, 1),
        (Calls(NO_BIAS, biases=()), 4, 1),
        (Calls(NO_BIAS, biases=(), gaps={"w2": 64}), 4, 2),
    ],
    ids=[
        "all",
        "in another order",
        "two inputs",
        "one of another input",
        "two runs",
        "another file",
        "no biases",
        "no biases, two runs",
    ],
)
def test_numbers_agree(calls: Calls, count: int, products: int, tmp_path: Path) -> None:
    model = calls.write(tmp_path)
    before = execute(model, tmp_path)
    assert batched_modulation.apply(model) == count
    assert ops(model)["Gemm"] == products and ops(model)["Modulation"] == 4 - count
    check(model, tmp_path)
    for received, expected in zip(execute(model, tmp_path), before, strict=True):
        np.testing.assert_allclose(received, expected, rtol=2e-5, atol=2e-6)
    assert batched_modulation.apply(model) == 0


@pytest.mark.parametrize("name", ["plain", "dual attention", "flux2"])
def test_a_whole_model_computes_the_same(
    tiny_spec: ModelSpec,
    tiny_families: Mapping[str, ModelSpec],
    graphs_of: Callable[..., Graphs],
    save_graphs: Callable[..., Path],
    tmp_path: Path,
    name: str,
) -> None:
    plain = dataclasses.replace(tiny_spec, depth=3)
    dual = dataclasses.replace(plain, dual_attention_blocks=(0, 1))
    spec = {"plain": plain, "dual attention": dual, **tiny_families}[name]
    graphs = graphs_of(spec)
    model = ir.from_proto(graphs.standard)
    # Both streams of each block, or of FLUX.2 both for all and one for the single blocks; and the head.
    blocks = 3 if spec.shared_modulation else 2 * spec.depth
    assert batched_modulation.apply(model) == blocks + 1
    assert ops(model)["Gemm"] == 1
    assert not [f.name for f in model.functions.values() if "Modulation" in f.name]
    folder = save_graphs(tmp_path, spec, RandomWeights(5), graphs)
    onnx.save(ir.to_proto(model), folder / "batched.onnx")
    contract = Contract.of(spec, PRECISIONS["fp32"])
    inputs = case_inputs(Case(2, 3, 5, 4, timestep=500.25), contract, spec)
    wanted = [("sample", torch.float32, (2, 15, spec.out_dim))]
    standard, batched = (
        run_session(open_session(folder / name, "ort-cpu"), inputs, wanted)["sample"]
        for name in ("model.onnx", "batched.onnx")
    )
    assert compare(batched, standard).rel_l2 <= 1e-6
