"""`mmdit-verify --bisect`: faults planted before a bundle is sealed are found, by block and by node."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from mmdit_deploy.bisection import bisect_bundle
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.cli.verify import main
from mmdit_deploy.contract import Range
from mmdit_deploy.export import ExportRequest
from mmdit_deploy.spec import PRECISIONS, QUANTIZED, ModelSpec, precision
from mmdit_deploy.verify import Case
from mmdit_deploy.verify.findings import Bisection, Finding
from traces import Traces

DEPTH = 24
# Of 32 tokens and more, so that attentions are in FP8 too.
RANGES = {"batch": Range(1, 1, 2), "img_tokens": Range(32, 35, 48), "txt_tokens": Range(1, 8, 16)}
NAMES = (*PRECISIONS, *QUANTIZED)


@dataclass(frozen=True)
class Planted:
    """A fault in one block.

    Args:
        plant: puts it into a bundle of one's own, into the block with this index.
        call: the call that is wrong by it, with ``{}`` for the index.
        found: whether a finding names its node.
        precisions: those that have such a thing to break.
    """

    plant: Callable[[Any, int], None]
    call: str
    found: Callable[[Finding, int], bool]
    precisions: tuple[str, ...] = NAMES


def own_function(model: onnx.ModelProto, call: str) -> onnx.FunctionProto:
    """A function that this call alone calls."""
    node = next(n for n in model.graph.node if n.name == call)
    own = onnx.FunctionProto()
    own.CopyFrom(next(f for f in model.functions if f.name == node.op_type))
    own.name = node.op_type = f"{own.name}_of_{call.replace('.', '_')}"
    model.functions.append(own)
    return model.functions[-1]


def flip(tensors: dict[str, Tensor], key: str, at: int) -> None:
    """The lowest bit of an exponent: a weight becomes twice or half of what it was. Of an integer, a high bit."""
    flat = tensors[key].reshape(-1)
    bit = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7, torch.float8_e4m3fn: 3}.get(flat.dtype, 5)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[flat.dtype.itemsize]
    bits = flat[at : at + 1].view(integer)
    bits ^= 1 << bit


def flip_weight(copy: Any, index: int) -> None:
    copy.edit_weights(lambda t: flip(t, UP.format(index), 5))


def flip_scale(copy: Any, index: int) -> None:
    """Of the norm of Q; in a quantized model, of what a layer's weights are multiplied by."""

    def change(tensors: dict[str, Tensor]) -> None:
        key = next(k for k in scales_of(index) if k in tensors)
        flip(tensors, key, 0)

    copy.edit_weights(change)


def scales_of(index: int) -> list[str]:
    """Scales of a quantized layer, and a norm's weight, which every precision has."""
    quantized = [f"blocks.{index}.img.mlp.up.{name}" for name in ("weight_scale_2", "weight_scale")]
    return [*quantized, f"transformer_blocks.{index}.attn.norm_q.weight"]


def multiply_modulation(copy: Any, index: int) -> None:
    """AdaLN's scale of the attention × 1.1: the rows of the modulation that make it."""

    def change(tensors: dict[str, Tensor]) -> None:
        for leaf in ("weight", "bias"):
            tensors[f"transformer_blocks.{index}.norm1.linear.{leaf}"].chunk(6)[1].mul_(1.1)

    copy.edit_weights(change)


def multiply_scale(copy: Any, index: int) -> None:
    """A quantized layer's scale × 1.1."""

    def change(tensors: dict[str, Tensor]) -> None:
        scale = tensors[next(k for k in scales_of(index) if k in tensors)]
        scale.copy_((scale.float() * 1.1).to(scale.dtype))

    copy.edit_weights(change)


def multiply_norm(copy: Any, index: int) -> None:
    """What the norm of Q is multiplied by × 1.1, in the graph: every byte of the weights is right."""

    def change(model: onnx.ModelProto) -> None:
        own = own_function(model, f"blocks.{index}")
        norm = next(n for n in own.node if n.op_type == "RMSNormalization" and NORM_Q in n.input)
        made, norm.output[0] = norm.output[0], "before"
        kind = next(v for v in own.value_info if v.name == made).type.tensor_type.elem_type
        factor = onnx.helper.make_tensor("", kind, [], [1.1])
        at = list(own.node).index(norm) + 1
        own.node.insert(at, onnx.helper.make_node("Mul", ["before", "factor"], [made]))
        own.node.insert(at, onnx.helper.make_node("Constant", [], ["factor"], value=factor))

    copy.edit_graph(change)


def drop_gate(copy: Any, index: int) -> None:
    """x + gate · y  ⇒  x + y, behind the attention."""

    def change(model: onnx.ModelProto) -> None:
        own = own_function(model, f"blocks.{index}")
        gate = next(n for n in own.node if n.op_type == "Split" and n.input[0] == "img_modulation").output[2]
        node = next(n for n in own.node if gate in n.input)
        inputs = [v for v in node.input if v != gate]
        node.CopyFrom(onnx.helper.make_node("Add" if len(inputs) == 2 else "Identity", inputs, list(node.output)))

    copy.edit_graph(change)


def swap_q_and_k(copy: Any, index: int) -> None:
    """The attention reads Q as K and K as Q."""

    def change(model: onnx.ModelProto) -> None:
        own = own_function(model, f"blocks.{index}")
        other = {"cat": "cat_1", "cat_1": "cat"}
        other |= {f"{a}.f32": f"{b}.f32" for a, b in other.items()}
        made = {out for n in own.node for out in n.output}
        assert {"cat", "cat_1"} <= made
        for node in own.node:
            if node.op_type != "Cast" or not node.output[0].startswith("cat"):  # what emulates bf16
                node.input[:] = [other.get(v, v) for v in node.input]

    copy.edit_graph(change)


def swap_q_and_k_of_weights(copy: Any, index: int) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for leaf in ("weight", "bias"):
            q, k = (f"transformer_blocks.{index}.attn.to_{x}.{leaf}" for x in "qk")
            tensors[q], tensors[k] = tensors[k], tensors[q]

    copy.edit_weights(change)


def take_weights_of_another_block(copy: Any, index: int) -> None:
    """The graph looks for a block's weights where those of the next or the one before lie."""

    def change(model: onnx.ModelProto) -> None:
        wrong = {i.name: i for i in model.graph.initializer}
        other = wrong[f"blocks.{index - 1 if index else 1}.img.mlp.up.bias"]
        mine = wrong[f"blocks.{index}.img.mlp.up.bias"]
        del mine.external_data[:]
        mine.external_data.extend(other.external_data)

    copy.edit_graph(change)


UP = "transformer_blocks.{}.ff.net.0.proj.weight"
NORM_Q = "img.qkv.norm_q.weight"


def names_weight(key: str) -> Callable[[Finding, int], bool]:
    """The weight is named, and the node is the first that reads it."""

    def found(finding: Finding, index: int) -> bool:
        (difference,) = finding.weights
        assert finding.node is not None
        return difference.key == key.format(index) and difference.count == 1 and difference.key in finding.node.keys

    return found


def names_scale(finding: Finding, index: int) -> bool:
    (difference,) = finding.weights
    assert finding.node is not None and difference.resembles is None
    return difference.key in scales_of(index) and difference.key in finding.node.keys


def names_modulation(finding: Finding, index: int) -> bool:
    keys = {f"transformer_blocks.{index}.norm1.linear.{leaf}" for leaf in ("weight", "bias")}
    node = finding.node
    return (
        node is not None and {d.key for d in finding.weights} == keys == set(node.keys) and "linear" in node.operators
    )


def names_q_and_k(finding: Finding, index: int) -> bool:
    keys = [f"transformer_blocks.{index}.attn.to_{x}.weight" for x in "qk"]
    held = {d.key: d.resembles for d in finding.weights}
    assert finding.node is not None
    return held[keys[0]] == keys[1] and held[keys[1]] == keys[0] and set(keys) <= set(finding.node.keys)


def names_operators(*operators: str) -> Callable[[Finding, int], bool]:
    """The node is the one where the eager model computes this; all weights are right."""
    return lambda finding, _: (
        finding.node is not None and not finding.weights and set(operators) <= set(finding.node.operators)
    )


KINDS = {
    "an exponent bit flipped in a weight": Planted(flip_weight, "blocks.{}", names_weight(UP)),
    "an exponent bit flipped in a scale": Planted(flip_scale, "blocks.{}", names_scale),
    "AdaLN's scale × 1.1": Planted(multiply_modulation, "modulations.{}.img", names_modulation),
    "a scale × 1.1": Planted(multiply_scale, "blocks.{}", names_scale),
    "the norm of Q × 1.1 in the graph": Planted(multiply_norm, "blocks.{}", names_operators("rms_norm")),
    "a gate dropped": Planted(drop_gate, "blocks.{}", names_operators("mul")),
    "Q and K swapped": Planted(swap_q_and_k, "blocks.{}", names_operators("scaled_dot_product_attention")),
    "Q and K swapped in the weights": Planted(swap_q_and_k_of_weights, "blocks.{}", names_q_and_k),
    "weights of another block": Planted(
        take_weights_of_another_block,
        "blocks.{}",
        lambda finding, index: "img.mlp.up.bias is read from transformer_blocks." in finding.graph[0],
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _traced(traces: Traces, tiny_spec: ModelSpec) -> Iterator[None]:
    with traces.within(deep(tiny_spec, 2)):
        yield


def deep(spec: ModelSpec, depth: int) -> ModelSpec:
    return dataclasses.replace(spec, name=f"tiny-{depth}", depth=depth)


@pytest.fixture(scope="module")
def bundle_of(
    quick_export: Callable[..., Any], tiny_spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A bundle by precision and base, of `DEPTH` blocks by default; not to be changed."""
    folder = tmp_path_factory.mktemp("deep")

    @functools.cache
    def made(name: str, base: str | None = None, depth: int = DEPTH) -> Path:
        compute = precision(name, base)
        out = folder / f"{compute.label}-{depth}"
        request = ExportRequest(deep(tiny_spec, depth), RandomWeights(3), compute, out=out, ranges=RANGES, verify=False)
        path: Path = quick_export(request).path
        return path

    return made


@pytest.fixture
def broken(
    bundle_of: Callable[..., Path], opened: Callable[[Path], Any], tmp_path: Path
) -> Callable[[str, str, int], Bisection]:
    """What is found in a bundle that was sealed with a fault in it."""

    def found(kind: str, name: str, index: int) -> Bisection:
        copy = opened(Path(shutil.copytree(bundle_of(name), tmp_path / f"{name}-{index}")))
        KINDS[kind].plant(copy, index)
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, copy.path)
            return bisect_bundle(copy.seal(), full=True)

    return found


def check(kind: str, index: int, bisection: Bisection) -> None:
    planted, finding = KINDS[kind], bisection.found
    assert finding is not None, f"{kind} in block {index} was not found"
    text = bisection.text()
    assert (finding.call, finding.block) == (planted.call.format(index), f"blocks.{index}"), text
    assert planted.found(finding, index), text
    assert json.loads(json.dumps(bisection.to_json()))["found"]["block"] == f"blocks.{index}"
    assert f"blocks.{index}" in text and finding.call in text


# Each kind in one block of one precision, the first and the last block among them; the sweep of all is below.
SAMPLE = [(kind, ("fp16", "fp8")[i % 2], (0, 3, 5, 1)[i % 4]) for i, kind in enumerate(KINDS)]
IN_FP8 = ("Q and K swapped", "fp8", 2)  # of an attention in FP8


@pytest.mark.parametrize(("kind", "name", "index"), [*SAMPLE, ("a gate dropped", "fp8", DEPTH - 1), IN_FP8])
def test_a_planted_fault_is_found_by_name(
    broken: Callable[[str, str, int], Bisection], kind: str, name: str, index: int
) -> None:
    check(kind, index, broken(kind, name, index))


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_is_found_in_any_of_24_blocks(
    broken: Callable[[str, str, int], Bisection], kind: str, name: str
) -> None:
    for index in range(DEPTH):
        check(kind, index, broken(kind, name, index))


@pytest.mark.parametrize("name", NAMES)
def test_a_healthy_model_yields_none(healthy: Callable[[str], Path], name: str) -> None:
    bisection = bisect_bundle(healthy(name), full=True)
    assert bisection.found is None, bisection.text()
    assert bisection.calls == bisection.of_calls == 11 and bisection.values > 250
    assert 0 < bisection.worst < 0.75
    assert "nothing is wrong" in bisection.text() and bisection.graph in bisection.text()


@pytest.mark.parametrize("base", ["fp16", "bf16"])
def test_a_healthy_model_with_attention_in_fp8_yields_none(
    bundle_of: Callable[..., Path], opened: Callable[[Path], Any], base: str
) -> None:
    path = bundle_of("fp8", base, 2)
    assert opened(path).engine().plan.attentions.keys() == {"blocks.0", "blocks.1"}
    bisection = bisect_bundle(path, full=True)
    assert bisection.found is None, bisection.text()


def test_verification_rejects_a_mutant_whose_attention_is_in_fp8(
    bundle_of: Callable[..., Path], opened: Callable[[Path], Any], tmp_path: Path
) -> None:
    copy = opened(Path(shutil.copytree(bundle_of("fp8", "fp16", 2), tmp_path / "copy")))
    cases = (Case(1, 6, 6, 8, timestep=999.0),)
    assert copy.verify(cases, whole=False).passed
    swap_q_and_k(copy, 0)
    wrong = [check for check in copy.verify(cases, whole=False).checks if not check.passed and check.level == "nodes"]
    assert [check.name for check in wrong] == ["blocks.0"]


def test_without_the_weights_the_first_block_that_is_out_is_named(
    healthy: Callable[[str], Path], opened: Callable[[Path], Any], tmp_path: Path
) -> None:
    """And what is not known is said: which node, and whether it began there."""
    assert bisect_bundle(healthy("fp16")).found is None
    copy = opened(Path(shutil.copytree(healthy("fp16"), tmp_path / "copy")))
    drop_gate(copy, 1)
    finding = bisect_bundle(copy.seal()).found
    assert finding is not None and finding.block == "blocks.1" and finding.node is None
    assert "cumulative" in finding.note and "--checkpoint" in finding.note


def test_the_command_names_the_node_and_fails(
    healthy: Callable[[str], Path], opened: Callable[[Path], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(healthy("fp16")), "--bisect", "--full", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["healthy"] is True
    copy = opened(Path(shutil.copytree(healthy("fp16"), tmp_path / "copy")))
    flip_weight(copy, 1)
    assert main([str(copy.seal()), "--bisect", "--full"]) == 1
    out = capsys.readouterr().out
    assert "blocks.1: node linear_" in out and f"{UP.format(1)}: 1 of " in out


@pytest.mark.soak
@pytest.mark.parametrize("base", ["fp16", "bf16"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_healthy_model_of_24_blocks_yields_none(bundle_of: Callable[..., Path], name: str, base: str) -> None:
    bisection = bisect_bundle(bundle_of(name, base), full=True)
    assert bisection.found is None, bisection.text()


def test_no_more_than_one_block_is_looked_at_at_a_time(bundle_of: Callable[..., Path]) -> None:
    """And none behind the one that is found."""
    seen: list[str] = []
    bisect_bundle(bundle_of("fp16", None, 2), full=True, progress=lambda name, index, count: seen.append(name))
    assert seen[3:6] == ["modulations.0.img", "modulations.0.txt", "blocks.0"] and len(seen) == 11
