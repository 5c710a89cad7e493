"""What kernels read and write at the opt shape: judged by engines of one static shape, whose layer lists have no −1."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest

from mmdit_deploy.build.floor import floors
from mmdit_deploy.build.layers import EngineLayer, LayerTensor, by_call, parse_layer_list
from mmdit_deploy.build.opt_sizes import at_opt
from mmdit_deploy.build.traffic import traffic_of
from mmdit_deploy.contract import Profile, Range
from mmdit_deploy.spec import ModelSpec

# Sizes that no product of others equals.
OPT = {"batch": 3, "img_tokens": 53, "txt_tokens": 14}
DYNAMIC: Profile = {"batch": Range(1, 3, 8), "img_tokens": Range(4, 53, 1024), "txt_tokens": Range(2, 14, 256)}
STATIC: Profile = {axis: Range(size, size, size) for axis, size in OPT.items()}
Graph = Callable[[ModelSpec, str], tuple[onnx.ModelProto, Path]]


def kernels(layers: Iterable[EngineLayer]) -> list[EngineLayer]:
    return [layer for layer in layers if layer.is_kernel]


def operations(kernel: EngineLayer) -> tuple[object, ...]:
    """What tells one kernel from another in two builds of a graph."""
    generated = re.match(r"(__myl_\w+?|_gemm_mha_v2)_myl\d", kernel.name)
    return generated[1] if generated else kernel.type, tuple(sorted(kernel.sources))


def moved(kernel: EngineLayer) -> tuple[object, ...]:
    """Elements that it reads and writes, whatever the tensors are called; not single integers, by which a kernel of a
    dynamic engine learns sizes that one of a static engine knows.
    """
    return tuple(
        tuple(sorted((t.dtype, t.elements) for t in tensors if (t.dtype, t.elements) != ("Int64", 1)))
        for tensors in (kernel.inputs, kernel.constants or (), kernel.outputs)
    )


# Two modulations of Qwen-Image-Edit may hold the batch's rows, or those at timestep 0 as well: nothing tells.
UNKNOWN = {"qwen-image-edit-2511": 4}


def unknown(kernel: EngineLayer) -> list[LayerTensor]:
    return [t for t in (*kernel.inputs, *(kernel.constants or ()), *kernel.outputs) if t.elements is None]


def check(dynamic: Sequence[EngineLayer], static: Sequence[EngineLayer], unsized: int = 0) -> None:
    """Each kernel moves what its like in the static engine moves, and most have one."""
    like = defaultdict(list)
    for kernel in kernels(static):
        assert all(-1 not in t.dims for t in (*kernel.inputs, *kernel.outputs))
        like[operations(kernel)].append((moved(kernel), kernel.flops))
    assert sum(len(unknown(kernel)) for kernel in kernels(dynamic)) == unsized
    alike = [kernel for kernel in kernels(dynamic) if operations(kernel) in like and not unknown(kernel)]
    assert len(alike) > 0.8 * len(kernels(dynamic))
    for kernel in alike:
        assert (moved(kernel), kernel.flops) in like[operations(kernel)], kernel


@pytest.fixture(scope="module")
def sized(build_layers: Any, saved_graph: Graph) -> Callable[..., tuple[EngineLayer, ...]]:
    """Layers of a model's engine, sized: ``sized(spec, DYNAMIC)``."""

    def build(spec: ModelSpec, *profiles: Profile, precision: str = "fp16") -> tuple[EngineLayer, ...]:
        graph, folder = saved_graph(spec, precision)
        made = build_layers(graph, folder, profiles, decomposable=precision == "fp32")
        return at_opt(made, graph, profiles)

    return build


def check_flops(layers: Sequence[EngineLayer], spec: ModelSpec, opt: Mapping[str, int]) -> None:
    """Every block's kernels do the FLOPs that the spec implies; a block without text makes its queries in vain."""
    least = floors(spec, opt, 2)
    for call, made in by_call(layers, spec.block_names).items():
        if call in least:
            in_vain = call in spec.block_names[: spec.depth] and not spec.blocks[int(call[7:])].makes_text
            flops = traffic_of(made).flops
            assert flops > least[call].flops if in_vain else flops == least[call].flops
            assert traffic_of(made).bytes > least[call].nbytes


def test_sizes_are_those_of_a_static_engine(
    sized: Callable[..., Any], tiny_families: Mapping[str, ModelSpec], family: str
) -> None:
    spec = tiny_families[family]
    dynamic, static = sized(spec, DYNAMIC), sized(spec, STATIC)
    check(dynamic, static, UNKNOWN.get(family, 0))
    check_flops(dynamic, spec, OPT)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_sizes_of_other_precisions(
    sized: Callable[..., Any], tiny_families: Mapping[str, ModelSpec], precision: str
) -> None:
    """In fp32 the attention is written out, with scores of its own, and TensorRT pads its keys to fours."""
    spec, opt = tiny_families["sd3-controlnet"], {**OPT, "img_tokens": 54}
    assert (opt["img_tokens"] + opt["txt_tokens"]) % 4 == 0  # for padding is in no list of a dynamic engine
    profile = {axis: Range(r.min, opt[axis], r.max) for axis, r in DYNAMIC.items()}
    dynamic = sized(spec, profile, precision=precision)
    static = sized(spec, {axis: Range(n, n, n) for axis, n in opt.items()}, precision=precision)
    check(dynamic, static)
    check_flops(dynamic, spec, opt)
    assert {t.dtype for kernel in kernels(dynamic) for t in kernel.outputs} <= {"BFloat16", "Float", "Int32"}
    assert any(layer.is_fused_attention for layer in dynamic) == (precision == "bf16")


def test_each_profile_has_an_opt_shape(sized: Callable[..., Any], tiny_spec: ModelSpec) -> None:
    """The layers of both plans are in one list."""
    larger = {axis: Range(r.min, r.opt * 2, r.max) for axis, r in DYNAMIC.items()}
    both = sized(tiny_spec, DYNAMIC, larger)
    for number, profile in enumerate((DYNAMIC, larger)):
        plan = [layer for layer in both if layer.profile == number]
        written = [t for kernel in kernels(plan) for t in kernel.outputs if t.name.startswith("sample")]
        rows = profile["batch"].opt * profile["img_tokens"].opt
        assert [t.elements for t in written] == [rows * tiny_spec.out_dim]
        assert not any(unknown(kernel) for kernel in kernels(plan))


# A block, small enough to follow: a norm and its modulation, one product into Q, K and V, and the attention's output.
BLOCK = onnx.parser.parse_model("""
    <ir_version: 10, opset_import: ["": 23, "local": 1]>
    block (float16[batch, img_tokens, 64] x, float16[batch, 1, 64] scale, int64[img_tokens] places)
        => (float16[batch, img_tokens, 64] made)
    {
        made = local.Block (x, scale, places, weight, table, ones)
    }
    <domain: "local", opset_import: ["": 23, "small": 1]>
    Block (x, scale, places, weight, table, ones) => (made) {
        position = Gather (table, places)
        placed = Add (x, position)
        normed = LayerNormalization (placed, ones)
        scaled = small.Scale (normed, scale)
        qkv = MatMul (scaled, weight)
        q, k, v = Split <axis = 2, num_outputs = 3> (qkv)
        made = Attention <q_num_heads = 4, kv_num_heads = 4> (q, k, v)
    }
    <domain: "small", opset_import: ["": 23]>
    Scale (x, scale) => (y) {
        one = Constant <value_float = 1.0> ()
        like = CastLike (one, scale)
        factor = Add (like, scale)
        y = Mul (x, factor)
    }
""")
ROWS = 3 * 53
NAMES = ("position", "placed", "normed", "scaled", "qkv", "split", "attention")


def block() -> onnx.ModelProto:
    """`BLOCK`, with names of nodes and the shapes of its function's values, as a graph of ours has them."""
    model = onnx.ModelProto()
    model.CopyFrom(BLOCK)
    model.graph.node[0].name = "blocks.0"
    for name, shape in (("weight", (64, 192)), ("table", (1000, 64)), ("ones", (64,))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float16), name))
    outer, inner = model.functions
    for function, names in ((outer, NAMES), (inner, ("one", "like", "factor", "y"))):
        for node, name in zip(function.node, names, strict=True):
            node.name = name
    tokens = ["batch", "img_tokens"]
    shapes = {name: [*tokens, 64] for name in ("placed", "normed", "scaled", "q", "k", "v")}
    shapes |= {"position": ["img_tokens", 64], "qkv": [*tokens, 192]}
    half = onnx.TensorProto.FLOAT16
    outer.value_info.extend(onnx.helper.make_tensor_value_info(name, half, dims) for name, dims in shapes.items())
    return model


def half(name: str, *dims: int) -> LayerTensor:
    return LayerTensor(name, dims, "Half")


def made_of(
    nodes: str,
    inputs: Sequence[LayerTensor],
    outputs: Sequence[LayerTensor],
    kind: str = "kgen",
    constants: Sequence[LayerTensor] = (),
) -> EngineLayer:
    sources = tuple((node, "blocks.0") for node in nodes.split())
    name = "_gemm_mha_v2_myl0_1" if nodes == "attention" and kind == "kgen" else f"kernel_of_{nodes}"
    return EngineLayer(name, kind, 0, sources, tuple(inputs), tuple(outputs), "", tuple(constants))


def sizes(*layers: EngineLayer) -> list[list[int | None]]:
    """Elements of each kernel's inputs, constants and outputs, in this order."""
    return [
        [t.elements for t in (*layer.inputs, *(layer.constants or ()), *layer.outputs)]
        for layer in at_opt(layers, block(), (DYNAMIC,))
    ]


def test_axes_are_merged_and_swapped() -> None:
    x, q, k = half("x", -1, -1, 64), half("q", -1, -1, 16), half("k", -1, 16, -1)
    product = made_of("qkv", [half("y", -1, 64)], [half("qkv", -1, 192)], "gemm", [half("w", 64, 192)])
    attention = made_of("attention", [q, k, half("v", -1, -1, 16)], [half("made", -1, -1, 4, 16)])
    assert sizes(made_of("placed", [x], []), product, attention) == [
        [ROWS * 64],
        [ROWS * 64, 64 * 192, ROWS * 192],
        [ROWS * 64] * 4,
    ]


def test_a_norm_has_means() -> None:
    """A last axis of 1 was summed over; a static axis is not cut."""
    means, scale = LayerTensor("means", (-1, 1), "Float"), half("scale", -1, 1, 64)
    normed = made_of("normed", [half("placed", -1, 64)], [means, half("cut", -1, 32)])
    assert sizes(normed, made_of("scaled/factor", [means, scale], [])) == [[ROWS * 64, ROWS, None], [ROWS, 3 * 64]]


def test_small_functions_say_no_shapes() -> None:
    """Of them the shapes follow from what they are called with."""
    inputs, outputs = [half("a", -1, -1, 64), half("b", -1, 1, 64)], [half("c", -1, -1, 64)]
    assert sizes(made_of("scaled/factor scaled/y", inputs, outputs)) == [[ROWS * 64, 3 * 64, ROWS * 64]]


def test_both_ends_decide() -> None:
    """What a kernel writes may be of x or of a position; who reads it knows."""
    both, read = "position placed", half("t", -1, 64)
    writer, reader = made_of(both, [], [read]), made_of("normed", [read], [])
    assert sizes(writer) == [[None]]
    assert sizes(writer, reader) == [[ROWS * 64], [ROWS * 64]]


def test_axes_of_one_are_told_from_merged_ones() -> None:
    assert sizes(made_of("scaled/y", [half("t", -1, 1, 64), half("u", -1, 64)], [])) == [[3 * 64, None]]
    assert sizes(made_of("position placed", [half("t", 1, -1, 1, 64)], [])) == [[53 * 64]]


def test_what_nothing_fits_is_unknown() -> None:
    assert sizes(made_of("normed", [half("t", -1, 48)], [half("u", 7, 64), half("v", -1, -1, -1, 64)])) == [
        [None, 7 * 64, None]
    ]
    assert sizes(made_of("no such node", [half("t", -1, 64)], [])) == [[None]]
    assert sizes(made_of("position placed", [half("t", -1, 2, 32)], [])) == [[None]]


def test_the_last_tensor_holds_the_last_value() -> None:
    """Its kernel reads x and a position; which is which, the other tensor's writer knows."""
    written = made_of("position", [], [half("p", -1, 64)])
    read = made_of("placed", [half("other", -1, 64), half("p", -1, 64)], [])
    assert sizes(read) == [[None, None]]
    assert sizes(written, read)[1] == [ROWS * 64, 53 * 64]
    one_more = made_of("placed", [half("other", -1, 64), half("p", -1, 64), half("third", -1, 64)], [])
    assert sizes(written, one_more)[1] == [None, 53 * 64, None]


def test_columns_have_as_many_rows() -> None:
    """A slice of columns, of which the list says the dims and not where they begin."""
    product = made_of("qkv", [], [half("qkv", -1, 192)], "gemm")
    slices = made_of("attention", [half("qkv", -1, 128), half("qkv", -1, 48)], [])
    assert sizes(product, slices)[1] == [ROWS * 128, ROWS * 48]


def test_heads_that_no_value_has_are_as_large_as_what_was_written() -> None:
    attention = made_of("attention", [], [half("made", -1, -1, 16)])
    copy = made_of("qkv", [half("made", -1, 2, -1, 32)], [])  # cuts 64 into 2 · 32
    assert sizes(attention, copy)[1] == [ROWS * 64]


def test_a_product_makes_as_many_rows_as_it_reads() -> None:
    weight = half("w", 48, 96)
    unknown = made_of("qkv", [half("a", -1, 48)], [half("b", -1, 96)], "gemm", [weight])
    assert sizes(unknown) == [[None, 48 * 96, None]]
    whole = LayerTensor("a", (11, 48), "Half")
    assert sizes(made_of("qkv", [whole], [half("b", -1, 96)], "gemm", [weight])) == [[11 * 48, 48 * 96, None]]


def test_a_part_of_what_a_kernel_is_given_may_be_read() -> None:
    """Of a table, the rows that are gathered."""
    gathered = made_of("position", [], [half("p", -1, 64)], constants=[half("table", 1000, 64)])
    assert sizes(gathered) == [[53 * 64, 53 * 64]]


def test_a_tensor_that_is_given_twice_is_read_once() -> None:
    twice = [half("x", -1, -1, 64), half("x", -1, -1, 64)]
    assert sizes(made_of("placed", twice, [])) == [[ROWS * 64, 0]]
    product = made_of("qkv", [], [half("qkv", -1, 192)], "gemm")
    slices = [half("qkv", -1, 64), half("qkv", -1, 64)]  # two of three, for all that is known
    assert sizes(product, made_of("split", slices, []))[1] == [ROWS * 64, ROWS * 64]


def test_flops_are_those_of_the_products_of_a_kernel() -> None:
    attention = 4 * 3 * 53 * 53 * 64
    layers = at_opt(
        [
            made_of("normed", [], []),
            made_of("qkv attention", [], [], "gemm"),  # moves Q on its way out
            made_of("attention", [], []),
            made_of("split attention", [], []),  # a copy
            made_of("normed", [], [], "gemm"),
        ],
        block(),
        (DYNAMIC,),
    )
    assert [layer.flops for layer in layers] == [0, 2 * ROWS * 64 * 192, attention, 0, None]


def test_an_attention_that_is_written_out_has_its_flops_in_parts() -> None:
    parts = [made_of("attention", [], [], "gemm"), made_of("attention", [], [], "gemm")]
    assert [layer.flops for layer in at_opt(parts, block(), (DYNAMIC,))] == [2 * 3 * 53 * 53 * 64] * 2


def test_scores_of_an_attention_that_is_written_out() -> None:
    scores = made_of("attention", [], [half("scores", -1, -1, -1)], "gemm")
    sums = made_of("attention", [half("scores", -1, -1, -1)], [half("sums", -1, -1, 1)], "gemm")
    assert sizes(scores, sums) == [[3 * 4 * 53 * 53], [3 * 4 * 53 * 53, 3 * 4 * 53]]


def test_other_layers_stay_as_they_are() -> None:
    excerpt = parse_layer_list(Path(__file__).with_name("layer_list.txt").read_text())
    profiles = (DYNAMIC, STATIC)
    sized = at_opt(excerpt, block(), profiles)  # another model's: what is dynamic in it is not known
    assert [layer.name for layer in sized] == [layer.name for layer in excerpt]
    assert all(t.elements is None for layer in sized for t in layer.outputs if -1 in t.dims)
    assert [layer for layer in sized if not layer.is_kernel] == [layer for layer in excerpt if not layer.is_kernel]
