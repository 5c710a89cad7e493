"""The gate of quantization: what was planned to be quantized is quantized in the engine that was built.

    plan                       graph                                   engine
    blocks.0.img.mlp.up: fp8   MatMul(DQ(Q(x)), Transpose(DQ(w)))      gemm: reads FP8, with a constant in FP8
    modulations.*: fp8-weights one MatMul(c, Transpose(DQ(w₀|w₁|…)))   runtime_fusion: reads Half, a constant in FP8

TensorRT folds Q/DQ into a product where it has a kernel for it. Where it has none it says nothing: the product reads
16-bit numbers, and kernels of their own round the input or expand the weights at every step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from mmdit_deploy.build.build_log import REPORT
from mmdit_deploy.build.layers import ENGINE, EngineLayer, LayerTensor
from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.function_types import callers_first, type_function_inputs
from mmdit_deploy.graph.precision.recognized import products_joined, scheme_of
from mmdit_deploy.model.partition import call_of
from mmdit_deploy.precision import SCHEMES, PrecisionPlan

Source = tuple[str, str]  # a node and the call that it is in, as `EngineLayer.sources` has them
Products = dict[str, dict[str, int]]

# TensorRT's words for the formats of weights, in the builder's log and in the inspector's JSON.
WORDS: Mapping[str, frozenset[str]] = {
    "fp8": frozenset({"FP8", "E4M3"}),
    "int8": frozenset({"Int8"}),
    "fp4": frozenset({"FP4E2M1", "FP4"}),
    "int4": frozenset({"Int4"}),
}
_WIDE = frozenset({"Half", "BFloat16", "BF16", "Float"})
_AXES = 3  # of a factor, at most
_SHOWN = 8  # problems in one message


@dataclass(frozen=True)
class QuantizedProduct:
    """A product of a graph whose weights are quantized.

    Args:
        product: its node.
        weights: the node that dequantizes its weights.
        scheme: by name; ``mixed`` where it is none of ours.
        linear: the layer that it is, by path in `MMDiT`; None where it is several.
        count: how many layers it is.
    """

    product: Source
    weights: Source
    scheme: str
    linear: str | None
    count: int = 1


def check_quantization(
    graph: onnx.ModelProto,
    layers: Sequence[EngineLayer],
    plan: PrecisionPlan,
    calls: Collection[str],
    *,
    what: str,
) -> Products:
    """Check that an engine computes with quantized numbers what the plan quantizes, in every profile.

    - Each layer of the plan is a product of the graph, by the planned scheme; and no other layer is.
    - Its kernel reads quantized weights and, where the scheme quantizes inputs, a quantized input.
    - No kernel but that one dequantizes its weights.

    Args:
        graph: the model that the builder was given.
        layers: of the engine.
        calls: of the model, that the engine makes.
        what: the engine's name, for the message.

    Returns:
        By call, products by scheme; under ``engine`` those that belong to no call: one of all modulations.

    Raises:
        GraphError: names the block, the node, and what became of it.
    """
    products = quantized_products(graph)
    problems = list(_unlike_plan(products, plan, calls))
    kernels = [layer for layer in layers if layer.is_kernel]
    for profile in sorted({kernel.profile for kernel in kernels} or {0}):
        own = [kernel for kernel in kernels if kernel.profile == profile]
        problems += [problem for product in products for problem in _fallen_back(product, own)]
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise GraphError(
            f"{what}: each layer that is quantized is one product of quantized numbers, and none falls back",
            received="\n            ".join(problems[:_SHOWN] + more),
            fix=REPORT,
        )
    found: Products = {}
    for product in products:
        by_scheme = found.setdefault(product.product[1] or ENGINE, {})
        by_scheme[product.scheme] = by_scheme.get(product.scheme, 0) + 1
    return found


def quantized_products(graph: onnx.ModelProto) -> tuple[QuantizedProduct, ...]:
    """Every product with quantized weights that one run executes."""
    model = ir.from_proto(graph)
    type_function_inputs(model, callers_first(model))
    found: list[QuantizedProduct] = []
    for call in model.graph:
        function = model.functions.get(call.op_identifier())
        if function is None:
            found += _of_node(call, "")
        else:
            found += [product for node in function for product in _of_node(node, call.name or "")]
    return tuple(found)


def _of_node(node: ir.Node, call: str) -> Iterator[QuantizedProduct]:
    scheme = scheme_of(node)
    if scheme is None:
        return
    dequantize = _weights(node)
    stored = dequantize.inputs[0]
    linear = None if not call or stored is None else f"{call}.{(stored.name or '').removesuffix('.weight')}"
    source, weights = (node.name or "", call), (dequantize.name or "", call)
    yield QuantizedProduct(source, weights, scheme, linear, products_joined(node))


def _weights(product: ir.Node) -> ir.Node:
    """What dequantizes a product's weights; `scheme_of` found that there is one."""
    value = product.inputs[1]
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "DequantizeLinear":
            return node
        value = node.inputs[0]
    raise ValueError(f"{product.name} has no quantized weights")


def _unlike_plan(products: Sequence[QuantizedProduct], plan: PrecisionPlan, calls: Collection[str]) -> Iterator[str]:
    """Layers that the graph quantizes in another way than planned, or that only one of the two has."""
    planned = {path: linear.scheme.name for path, linear in plan.linears.items() if call_of(path) in calls}
    found = {product.linear: product.scheme for product in products if product.linear is not None}
    for linear, scheme in found.items():
        if planned.get(linear) != scheme:
            yield f"{linear} is {scheme} in the graph, and {planned.get(linear, 'not quantized')} in the plan"
    rest = {path: scheme for path, scheme in planned.items() if path not in found}
    joined = Counter[str]()
    for product in products:
        if product.linear is None:
            joined[product.scheme] += product.count
    if Counter(rest.values()) != joined:
        listed = ", ".join(f"{n} by {scheme}" for scheme, n in joined.items()) or "none"
        yield f"not quantized in the graph: {', '.join(rest) or 'none'}; joined to one product there: {listed}"


def _fallen_back(product: QuantizedProduct, kernels: Sequence[EngineLayer]) -> Iterator[str]:
    """How a product's kernel is not the quantized one."""
    name, call = product.product
    where = f"{call or 'the main graph'}: {name} ({product.scheme})"
    scheme = SCHEMES.get(product.scheme)
    if scheme is None:
        yield f"{where} is quantized in a way that is none of the schemes"
        return
    own = [kernel for kernel in kernels if product.product in kernel.sources and kernel.is_product]
    if not own:
        yield f"{where} is in no product of the engine"
    words = WORDS[scheme.weights]
    for kernel in own:
        if scheme.activations != "none" and not _of(kernel.inputs, words):
            yield f"{where} fell back: {kernel.name} reads {_types(kernel.inputs)}, and no {_shown(words)}"
        if kernel.constants is not None and not _of(kernel.constants, words):
            yield f"{where} fell back: {kernel.name} has {_types(kernel.constants)} for weights, and no {_shown(words)}"
    for kernel in kernels:
        if product.weights in kernel.sources and kernel not in own and _expands(kernel, words):
            yield f"{where} fell back: {kernel.name} expands its weights"


def _expands(kernel: EngineLayer, words: Collection[str]) -> bool:
    """Whether a kernel makes wide numbers of quantized ones; that which arranges NVFP4's scales makes none."""
    return _of(kernel.outputs, _WIDE) and (kernel.constants is None or _of(kernel.constants, words))


def _of(tensors: Collection[LayerTensor], words: Collection[str]) -> bool:
    """Whether a factor is of these types; NVFP4's scales, in E4M3, are arranged along five axes and are none."""
    return any(tensor.dtype in words for tensor in tensors if len(tensor.dims) <= _AXES)


def _types(tensors: Collection[LayerTensor]) -> str:
    return ", ".join(dict.fromkeys(tensor.dtype for tensor in tensors)) or "nothing"


def _shown(words: Collection[str]) -> str:
    return " or ".join(sorted(words))
