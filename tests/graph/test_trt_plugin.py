"""The dialect of plugin nodes: TensorRT finds a plugin for each, and their bodies compute what the graph did."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Contract
from mmdit_deploy.errors import UsageError
from mmdit_deploy.graph.fuse import CLEAN, FUSE, PREPARE
from mmdit_deploy.graph.lower import DIALECTS, lower
from mmdit_deploy.graph.lower.trt_plugin_contract import ATTENTION, PLUGIN_DOMAIN, PLUGINS, as_text
from mmdit_deploy.graph.optimize import optimize_file
from mmdit_deploy.graph.passes import run
from mmdit_deploy.runtime import open_session, run_session
from mmdit_deploy.spec import PRECISIONS, ModelSpec
from mmdit_deploy.verify.metrics import compare

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
PAGE = HERE.parent.parent / "engines" / "plugins" / "README.md"
MODELS = json.loads((FIXTURES / "models" / "index.json").read_text())
SUBJECTS = ("modulate", "rms_norm", "rope", "sdpa")
Run = Callable[[onnx.ModelProto], list[np.ndarray]]
TRT_OPS = {
    *(s.name for s in onnx.defs.get_all_schemas_with_history()),
    *("ImageScaler", "ParametricSoftplus", "ScaledTanh", "FallbackPluginImporter", "LocalFunctionImporter"),
}  # its importers, and all of its TRT_ ones: a few of ONNX's ops it lacks
FIELDS = {onnx.AttributeProto.INT: int, onnx.AttributeProto.FLOAT: float, onnx.AttributeProto.STRING: str}


def dispatched(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.NodeProto]]:
    """Every node that TensorRT's parser meets, and what it takes it for: by op type alone, in this order."""
    functions = {f.name: f for f in proto.functions}

    def visit(nodes: Iterator[onnx.NodeProto]) -> Iterator[tuple[str, onnx.NodeProto]]:
        for node in nodes:
            if node.op_type in TRT_OPS or node.op_type.startswith("TRT_"):
                yield "built-in", node
                for attribute in node.attribute:
                    if attribute.HasField("g"):
                        yield from visit(attribute.g.node)
            elif node.op_type in functions:
                assert len(node.input) == len(functions[node.op_type].input)
                yield from visit(functions[node.op_type].node)
            else:
                yield "plugin", node

    return visit(proto.graph.node)


def check_for_tensorrt(proto: onnx.ModelProto) -> dict[str, int]:
    """Each plugin node reaches its plugin, with the fields of the contract; how many there are of each."""
    counts = dict.fromkeys(PLUGINS, 0)
    for taken_for, node in dispatched(proto):
        assert (taken_for == "plugin") == (node.op_type in PLUGINS), node
        if taken_for == "plugin":
            check_contract(node)
            counts[node.op_type] += 1
    (opset,) = {o.version for o in proto.opset_import if o.domain == ""}
    assert opset == 17 and proto.ir_version == 8
    return counts


def check_contract(node: onnx.NodeProto) -> None:
    """A node is as the page says."""
    plugin = PLUGINS[node.op_type]
    found = {a.name: FIELDS[a.type] for a in node.attribute}
    assert found == {**{f.name: f.type for f in plugin.fields}, "plugin_version": str, "plugin_namespace": str}
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert (values["plugin_version"], values["plugin_namespace"], node.domain) == (b"1", b"mmdit", PLUGIN_DOMAIN)
    assert all(abs(v) < 2**31 for v in values.values() if isinstance(v, int))
    assert len(node.input) == len(plugin.inputs) - (plugin is ATTENTION and not values["has_mask"])
    assert all(node.input) and len(node.output) == len(plugin.outputs) and not node.overload


def with_plugins(model: ir.Model) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The files for TensorRT and for ONNX Runtime: the same nodes; a second run changes neither."""
    protos = []
    for dialect in ("trt-plugin", "trt-plugin-bodies"):
        lowered, _ = lower(model, dialect)
        protos.append(ir.to_proto(lowered))
        again = run(lowered, DIALECTS[dialect])
        assert not any(step.count for step in again), again
        assert ir.to_proto(lowered).SerializeToString(deterministic=True) == protos[-1].SerializeToString(
            deterministic=True
        )
    first, second = protos
    assert not any(f.domain == PLUGIN_DOMAIN for f in first.functions)
    nodes = [onnx.NodeProto() for _ in second.graph.node]
    for copy, node in zip(nodes, second.graph.node, strict=True):
        copy.CopyFrom(node)
        copy.ClearField("overload")
    assert nodes == list(first.graph.node)
    onnx.checker.check_model(second, full_check=True)
    return first, second


def lowered_text(text: str, functions: str = "") -> tuple[onnx.ModelProto, onnx.ModelProto, onnx.ModelProto]:
    """A graph in ONNX's textual form, and its two files."""
    header = '<ir_version: 11, opset_import: ["": 23, "local": 1, "mmdit": 1]>\n'
    before = onnx.parser.parse_model(header + text + functions)
    model = ir.from_proto(before)
    run(model, (*PREPARE, *FUSE))
    return before, *with_plugins(model)


def assert_same(mine: list[np.ndarray], theirs: list[np.ndarray], before: onnx.ModelProto) -> None:
    """In fp16 each step is rounded, and there are more of them."""
    half = any(i.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16 for i in before.graph.input)
    rtol, atol = (2e-2, 4e-3) if half else (1e-5, 1e-5)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def numbers(before: onnx.ModelProto, prepared: onnx.ModelProto, in_onnx_runtime: Run, in_onnx: Run) -> list[np.ndarray]:
    """What a fixture computes: some are broken as their exporter wrote them, and some ONNX Runtime refuses."""
    for proto in (before, prepared):
        try:
            return in_onnx_runtime(proto)
        except Exception:  # of whatever class: it has many
            continue
    types = [o.type.tensor_type.elem_type for o in prepared.graph.output]
    outputs = zip(in_onnx(prepared), types, strict=True)
    return [value.astype(onnx.helper.tensor_dtype_to_np_dtype(type_)) for value, type_ in outputs]


def spellings() -> list[str]:
    return [f"{s}/{f}" for s in SUBJECTS for f in json.loads((FIXTURES / s / "index.json").read_text())["files"]]


@pytest.mark.parametrize("file", spellings())
def test_every_spelling(file: str, in_onnx_runtime: Run, in_onnx: Run) -> None:
    before = onnx.load(FIXTURES / file)
    model = ir.from_proto(before)
    run(model, PREPARE)
    expected = numbers(before, ir.to_proto(model), in_onnx_runtime, in_onnx)
    run(model, FUSE)
    first, second = with_plugins(model)
    check_for_tensorrt(first)
    assert_same(in_onnx_runtime(second), expected, before)


Q = "float[2,4,5,8] q, float[2,4,7,8] k, float[2,4,7,8] v"
MERGED = "float[2,5,32] q, float[2,7,32] k, float[2,7,32] v"
X = "float[2,3,5,8] x, float[2,5,4] c, float[2,5,4] s"
NORM = "float[2,5,8] x, float[2,1,8] a, float[2,1,8] b"
BY_HEAD = "y = Attention<q_num_heads = 4, kv_num_heads = 4>"
# By name: inputs, what makes y of them, and the plugin.
FITS = {
    "4-D": (Q, "y = Attention(q, k, v)", "MMDiTAttentionPlugin"),
    "3-D": (MERGED, "y = Attention<q_num_heads = 4, kv_num_heads = 4, scale = 0.3>(q, k, v)", "MMDiTAttentionPlugin"),
    "grouped": (
        "float[2,5,32] q, float[2,7,16] k, float[2,7,16] v",
        "y = Attention<q_num_heads = 4, kv_num_heads = 2>(q, k, v)",
        "MMDiTAttentionPlugin",
    ),
    "grouped, 4-D": (
        "float[2,4,5,8] q, float[2,2,7,8] k, float[2,2,7,8] v",
        "y = Attention(q, k, v)",
        "MMDiTAttentionPlugin",
    ),
    "added mask": (f"{Q}, float[2,1,5,7] m", "y = Attention(q, k, v, m)", "MMDiTAttentionPlugin"),
    "bool mask": (f"{MERGED}, bool[5,7] m", f"{BY_HEAD}(q, k, v, m)", "MMDiTAttentionPlugin"),
    "fp16": (Q.replace("float", "float16"), "y = Attention<softmax_precision = 1>(q, k, v)", "MMDiTAttentionPlugin"),
    "RMSNorm": ("float[2,5,8] x, float[8] w", "y = RMSNormalization<epsilon = 0.1>(x, w)", "MMDiTRMSNormPlugin"),
    "RMSNorm, fp16": ("float16[2,3,5,8] x, float16[8] w", "y = RMSNormalization<axis = 3>(x, w)", "MMDiTRMSNormPlugin"),
    "RoPE": (X, "y = RotaryEmbedding(x, c, s)", "MMDiTRoPEPlugin"),
    "RoPE, neighbours": (X, "y = RotaryEmbedding<interleaved = 1>(x, c, s)", "MMDiTRoPEPlugin"),
    "RoPE, a part, by position": (
        "float[2,5,24] x, float[9,2] c, float[9,2] s",
        "p = Constant<value = int64[2,5] {0,1,2,3,4,8,7,6,5,4}>()"
        " y = RotaryEmbedding<interleaved = 1, num_heads = 3, rotary_embedding_dim = 4>(x, c, s, p)",
        "MMDiTRoPEPlugin",
    ),
    "AdaLN": (
        NORM,
        "w = Constant<value = float[8] {1,1,1,1,1,1,1,1}>() n = LayerNormalization<epsilon = 0.1>(x, w)"
        " y = mmdit.MMDiTModulate(n, a, b)",
        "MMDiTAdaLNPlugin",
    ),
}  # fmt: skip
MODULATE = """
    <domain: "mmdit", opset_import: ["": 23]> MMDiTModulate (x, scale, shift) => (y) {
        one = Constant<value_float = 1.0>() one_like = CastLike(one, scale) factor = Add(scale, one_like)
        scaled = Mul(x, factor) y = Add(scaled, shift)
    }"""


def graph_of(inputs: str, body: str) -> str:
    kind = "float16" if inputs.startswith("float16") else "float"
    axes = ",".join("ABCD"[: inputs.partition("]")[0].count(",") + 1])
    return f"g ({inputs}) => ({kind}[{axes}] y) {{ {body} }}"


@pytest.mark.parametrize("name", FITS)
def test_what_fits_the_contract(name: str, in_onnx_runtime: Run) -> None:
    inputs, body, plugin = FITS[name]
    before, first, second = lowered_text(graph_of(inputs, body), MODULATE if "mmdit." in body else "")
    assert check_for_tensorrt(first)[plugin] == 1
    assert_same(in_onnx_runtime(second), in_onnx_runtime(before), before)


# By name: inputs, what makes y of them, and why it is no plugin.
LEFT = {
    "causal": (Q, "y = Attention<is_causal = 1>(q, k, v)", "causal or soft-capped"),
    "soft-capped": (Q, "y = Attention<softcap = 1.0>(q, k, v)", "causal or soft-capped"),
    "heads of V": ("float[2,4,5,8] q, float[2,4,7,8] k, float[2,4,7,6] v", "y = Attention(q, k, v)", "heads of V"),
    "two axes": ("float[2,5,8] x, float[5,8] w", "y = RMSNormalization<axis = 1>(x, w)", "one factor for each channel"),
    "a weight of its own": (
        NORM,
        "w = Constant<value = float[8] {1,1,1,1,2,1,1,1}>() n = LayerNormalization(x, w)"
        " y = mmdit.MMDiTModulate(n, a, b)",
        "a weight of its own",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_does_not_fit_is_spelled_out_and_says_why(name: str, in_onnx_runtime: Run) -> None:
    inputs, body, reason = LEFT[name]
    text, functions = graph_of(inputs, body), MODULATE if "mmdit." in body else ""
    before, first, second = lowered_text(text, functions)
    assert not any(check_for_tensorrt(first).values())
    assert_same(in_onnx_runtime(second), in_onnx_runtime(before), before)
    model = ir.from_proto(before)
    run(model, (*PREPARE, *FUSE))
    reasons = [left.reason for step in lower(model, "trt-plugin", explain=True)[1] for left in step.left]
    assert len(reasons) == 1 and reason in reasons[0]


def test_bodies_of_more_than_one_kind(in_onnx_runtime: Run) -> None:
    """They are told apart in ONNX Runtime's file only."""
    before, first, second = lowered_text(
        """g (float[2,3,5,8] x, float[2,5,4] c, float[2,5,4] s) => (float[A,B,C,D] y) {
            z = RotaryEmbedding<interleaved = 1>(x, c, s)
            y = RotaryEmbedding(z, c, s)
        }"""
    )
    assert check_for_tensorrt(first)["MMDiTRoPEPlugin"] == 2
    assert len({f.overload for f in second.functions}) == 2 and second.ir_version == 10
    assert_same(in_onnx_runtime(second), in_onnx_runtime(before), before)


def test_in_a_function(in_onnx_runtime: Run) -> None:
    before, first, second = lowered_text(
        "g (float[2,5,8] x, float[8] w) => (float[2,5,8] y) { y = local.Norm(x, w) }",
        """<domain: "local", opset_import: ["": 23]> Norm (x, w) => (y) { y = RMSNormalization(x, w) }""",
    )
    assert [f.name for f in first.functions] == ["Norm"]
    assert {o.domain for o in first.functions[0].opset_import} == {"", PLUGIN_DOMAIN}
    assert check_for_tensorrt(first)["MMDiTRMSNormPlugin"] == 1
    assert_same(in_onnx_runtime(second), in_onnx_runtime(before), before)


def test_the_simulation_sees_a_body_and_an_op() -> None:
    """TensorRT would take either instead of the plugin."""
    *_, first, second = lowered_text(
        "g (float[2,5,8] x, float[8] w) => (float[2,5,8] y) { y = RMSNormalization(x, w) }"
    )
    check_for_tensorrt(first)
    assert "plugin" not in {taken_for for taken_for, _ in dispatched(second)}
    (node,) = first.graph.node
    node.op_type = "LayerNormalization"
    assert [taken_for for taken_for, _ in dispatched(first)] == ["built-in"]
    node.op_type = "MMDiTRMSNormPlugin"
    node.attribute[0].name = "other"
    with pytest.raises(AssertionError):
        check_for_tensorrt(first)


def test_names_equal_no_op() -> None:
    taken = TRT_OPS | {schema.name for schema in get_all_operator_schema()}
    assert not taken & set(PLUGINS) and not any(name.startswith("TRT_") for name in PLUGINS)


def test_the_page_is_the_contract() -> None:
    page = PAGE.read_text()
    for plugin in PLUGINS.values():
        assert as_text(plugin) in page
    assert page.count("## MMDiT") == len(PLUGINS)


def test_attributes_that_are_not_the_plugin_s_are_refused() -> None:
    with pytest.raises(TypeError, match="has the fields"):
        PLUGINS["MMDiTRMSNormPlugin"].attributes(axis=-1, epsilon=1, stash_type=1)


@pytest.mark.parametrize("file", MODELS["files"])
def test_others_whole_models(
    file: str, weights: ModuleType, first_output: Callable[[onnx.ModelProto], np.ndarray]
) -> None:
    """As many plugins as PyTorch calls. The weights are in a file that is not there, so none is read on the way."""
    calls = MODELS["files"][file]["calls"]
    before = weights.read(FIXTURES / "models" / file)
    model = ir.from_proto(before)
    run(model, (*PREPARE, *FUSE, *CLEAN))
    first, second = (ir.to_proto(lower(model, dialect)[0]) for dialect in ("trt-plugin", "trt-plugin-bodies"))
    counts = check_for_tensorrt(first)
    for op, plugin in (("Attention", "Attention"), ("RMSNormalization", "RMSNorm"), ("RotaryEmbedding", "RoPE")):
        assert counts[f"MMDiT{plugin}Plugin"] == calls[op]
    mine, theirs = first_output(weights.fill(second)), first_output(weights.fill(before))
    assert np.linalg.norm(mine - theirs) <= 1e-5 * np.linalg.norm(theirs)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.soak)])
def test_our_own_graphs(
    family: str,
    precision: str,
    tiny_families: Mapping[str, ModelSpec],
    graphs_of: Callable[..., object],
    save_graphs: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Their census is checked where they are built: a plugin for each attention, norm, RoPE and modulated norm."""
    spec = tiny_families[family]
    graphs = graphs_of(spec, precision, ("trt-plugin", "trt-plugin-bodies"))
    folder = save_graphs(tmp_path, spec, RandomWeights(1), graphs, precision)
    counts = check_for_tensorrt(onnx.load(folder / "model.trt-plugin.onnx", load_external_data=False))
    assert counts["MMDiTAttentionPlugin"] == spec.depth + spec.single_depth and counts["MMDiTAdaLNPlugin"] > 0
    mine, theirs = (run_tiny(folder / name, spec, precision) for name in ("model.trt-plugin-bodies.onnx", "model.onnx"))
    assert compare(mine, theirs).rel_l2 <= (1e-5 if precision == "fp32" else 1e-2)


def run_tiny(path: Path, spec: ModelSpec, precision: str) -> torch.Tensor:
    """`sample` for inputs made from a seed."""
    contract = Contract.of(spec, PRECISIONS[precision])
    sizes = {"batch": 2, "img_tokens": 15, "txt_tokens": 9, "ref_tokens": 6}
    generator, feed = torch.Generator().manual_seed(0), {}
    for tensor in contract.inputs:
        dtype = getattr(torch, {"fp32": "float32", "fp16": "float16"}.get(tensor.dtype, tensor.dtype))
        values = torch.randn(tensor.shape(sizes), generator=generator)
        feed[tensor.name] = values > -1 if dtype == torch.bool else values.abs().to(dtype)
    wanted = [(t.name, getattr(torch, t.dtype), t.shape(sizes)) for t in contract.outputs]
    return run_session(open_session(path, "ort-cpu"), feed, wanted)["sample"]


def test_both_files_are_written_and_the_second_goes_back_to_the_first(tmp_path: Path) -> None:
    text = "g (float[2,5,8] x, float[8] w) => (float[2,5,8] y) { y = RMSNormalization(x, w) }"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["": 23]>\n{text}'), tmp_path / "in.onnx")
    done = optimize_file(tmp_path / "in.onnx", tmp_path / "out.onnx", "trt-plugin")
    assert [Path(file.path).name for file in done.files] == ["out.onnx", "out.bodies.onnx"]
    assert not onnx.load(tmp_path / "out.onnx").functions and onnx.load(tmp_path / "out.bodies.onnx").functions
    optimize_file(tmp_path / "out.bodies.onnx", tmp_path / "again.onnx", "trt-plugin")
    assert check_for_tensorrt(onnx.load(tmp_path / "again.onnx"))["MMDiTRMSNormPlugin"] == 1
    with pytest.raises(UsageError, match="replaced only on request"):
        optimize_file(tmp_path / "in.onnx", tmp_path / "out.onnx", "trt-plugin")
