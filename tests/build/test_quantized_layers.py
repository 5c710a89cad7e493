"""What TensorRT-RTX 1.7 wrote of quantized products: each is taken for what it is, and for nothing else.

`quantized_layer_list.txt` has the kernel of one layer, ``blocks.0.img.mlp.up``, as each scheme was built, and an
attention in FP8.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mmdit_deploy.build.layers import EngineLayer, parse_layer_list
from mmdit_deploy.build.quantized import check_quantization
from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.pipeline import Graphs
from mmdit_deploy.precision import SCHEMES, LinearPlan, PrecisionPlan
from mmdit_deploy.spec import ModelSpec, precision

LINEAR = "blocks.0.img.mlp.up"
INT8, INT4, FP8, ATTENTION, FP4 = parse_layer_list(Path(__file__).with_name("quantized_layer_list.txt").read_text())
KERNELS = {"int8": INT8, "w4a16": INT4, "fp8": FP8, "fp4": FP4}


@pytest.mark.parametrize("name", KERNELS)
def test_a_scheme_takes_its_own_kernel_only(
    tiny_spec: ModelSpec, planned_graphs: Callable[..., Graphs], name: str
) -> None:
    plan = PrecisionPlan(precision(name), {LINEAR: LinearPlan(SCHEMES[name])})
    graph = planned_graphs(tiny_spec, plan, ("trt",)).of("trt")

    def check(kernel: EngineLayer) -> object:
        return check_quantization(graph, [kernel], plan, ["blocks.0"], what="test")

    assert check(KERNELS[name]) == {"blocks.0": {name: 1}}
    for other in KERNELS.values():
        if other is not KERNELS[name]:
            with pytest.raises(GraphError, match=r"blocks\.0: node_MatMul_83 .* fell back"):
                check(other)


def test_an_attention_in_fp8() -> None:
    assert ATTENTION.is_fused_attention and not ATTENTION.is_product
    assert [tensor.dtype for tensor in ATTENTION.inputs] == ["FP8"] * 3
    assert ("node_Attention_4/softmax", "blocks.0") in ATTENTION.sources
