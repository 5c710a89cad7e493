"""What a precision plan implies of a graph's counts: products by scheme, FP8 attentions, and their Q/DQ.

A pair of Q/DQ that is missing, or one that nobody planned, is a count that differs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from mmdit_deploy.precision import SCHEMES, PrecisionPlan

FP8_ATTENTION = "Attention (FP8)"  # counted as an Attention too
_OF_ATTENTION = 4  # pairs: of Q, K, V and the softmax


def implied_by_plan(plan: PrecisionPlan) -> dict[str, int]:
    """Of the standard graph, where an FP8 attention is one node. Products are named as `product` names them."""
    layers = Counter(linear.scheme.name for linear in plan.linears.values())
    quantized = dequantized = 0
    for name, count in layers.items():
        scheme = SCHEMES[name]
        scales = count if scheme.weights == "fp4" else 0  # of blocks, themselves quantized
        inputs = 0 if scheme.activations == "none" else count + scales
        quantized += inputs
        dequantized += inputs + count + scales
    return {
        **{product(name): layers[name] for name in SCHEMES},
        product("mixed"): 0,
        FP8_ATTENTION: fp8_attentions(plan),
        "QuantizeLinear": quantized,
        "DequantizeLinear": dequantized,
    }


def product(scheme: str) -> str:
    """How products of a scheme are counted."""
    return f"MatMul ({scheme})"


def fp8_attentions(plan: PrecisionPlan) -> int:
    return sum(len(attentions) for attentions in plan.attentions.values())


def implied_in(dialect: str, plan: PrecisionPlan, counts: Mapping[str, int]) -> dict[str, int]:
    """Of a graph in a dialect.

    Args:
        counts: what the spec alone implies of it.
    """
    fp8, fp4 = fp8_attentions(plan), sum(linear.scheme.weights == "fp4" for linear in plan.linears.values())
    made = Counter({**counts, **implied_by_plan(plan)})
    made["MultiHeadAttention" if dialect.startswith("ort") else "Attention"] -= fp8
    if dialect == "trt" or dialect.endswith("bf16"):  # where an FP8 attention is the nodes that it is made of
        made.update({"Softmax": fp8, "QuantizeLinear": _OF_ATTENTION * fp8, "DequantizeLinear": _OF_ATTENTION * fp8})
        del made[FP8_ATTENTION]
        made["MatMul"] += 2 * fp8
    else:
        made["Attention"] += fp8
    if "emulated-fp4" in dialect:  # only the scales of inputs are quantized by an op
        made[product("fp4")] = 0
        made.subtract({"QuantizeLinear": fp4, "DequantizeLinear": 2 * fp4})
    if dialect == "trt":  # which dequantizes the weights of all modulations as one
        del made["DequantizeLinear"]
    return {op: made[op] for op in (*counts, *implied_by_plan(plan)) if op in made}
