"""Q and K normalized together, as TensorRT likes it: the same numbers, and nothing else changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from mmdit_deploy.graph.fuse.shapes import shapes
from mmdit_deploy.graph.lower.joint_qk_norm import NORMS, joint_qk_norm
from mmdit_deploy.graph.passes import run

HEADS, WIDTH = 2, 8  # of 4 channels each
SIZES = {"B": 2, "N": 5, "M": 3}


def stream(name: str, dtype: str, *, epsilon: str = "1e-6", axis: int = -1) -> str:
    """From one stream's projection: Q and K normed, and V."""
    return f"""
      {name}_q, {name}_k, {name}_v = Split <axis = 2> ({name}, parts)
      {name}_qh = Reshape ({name}_q, heads)
      {name}_kh = Reshape ({name}_k, heads)
      {name}_qn = RMSNormalization <axis = {axis}, epsilon = {epsilon}> ({name}_qh, {name}_wq)
      {name}_kn = RMSNormalization <axis = {axis}, epsilon = {epsilon}> ({name}_kh, {name}_wk)"""


def joint(dtype: str = "float", parts: str = "8, 8, 8", *, second: str = "1e-6") -> ir.Model:
    """Two streams; the image's tokens come first."""
    total = sum(map(int, parts.split(",")))
    text = f"""<ir_version: 11, opset_import: ["": 23]>
    g ({dtype}[B, N, {total}] a, {dtype}[B, M, {total}] b, {dtype}[4] a_wq, {dtype}[4] a_wk,
       {dtype}[4] b_wq, {dtype}[4] b_wk) => ({dtype}[B, T, {HEADS}, 4] q, {dtype}[B, T, {HEADS}, 4] k)
      <int64[3] parts = {{{parts}}}, int64[4] heads = {{0, 0, {HEADS}, 4}}> {{
      {stream("a", dtype)}{stream("b", dtype, epsilon=second)}
      joint_q = Concat <axis = 1> (a_qn, b_qn)
      joint_k = Concat <axis = 1> (a_kn, b_kn)
      q = Identity (joint_q)
      k = Identity (joint_k)
    }}"""
    return parsed(text)


def single(dtype: str = "float", parts: str = "8, 8, 8") -> ir.Model:
    total = sum(map(int, parts.split(",")))
    return parsed(f"""<ir_version: 11, opset_import: ["": 23]>
    g ({dtype}[B, N, {total}] a, {dtype}[4] a_wq, {dtype}[4] a_wk) => ({dtype}[B, N, 2, 4] q, {dtype}[B, N, 2, 4] k)
      <int64[3] parts = {{{parts}}}, int64[4] heads = {{0, 0, {HEADS}, 4}}> {{
      {stream("a", dtype)}
      q = Identity (a_qn)
      k = Identity (a_kn)
    }}""")


def parsed(text: str) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(text))
    run(model, [shapes])
    return model


def evaluate(model: ir.Model) -> list[np.ndarray]:
    """In ONNX's own evaluator, on fixed random inputs."""
    proto = ir.to_proto(model)
    generator = np.random.default_rng(0)
    feed = {}
    for value in proto.graph.input:
        dims = [d.dim_value or SIZES[d.dim_param] for d in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feed[value.name] = generator.standard_normal(dims).astype(dtype)
    return [np.asarray(out) for out in ReferenceEvaluator(proto).run(None, feed)]


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize(
    ("make", "function"),
    [
        (lambda: joint(), "MMDiTJointQKNorm"),
        (lambda: joint("float16"), "MMDiTJointQKNorm"),
        (lambda: joint(parts="8, 8, 4"), "MMDiTJointQKNorm"),  # V of another width, or an MLP beside it
        (lambda: single(), "MMDiTQKNorm"),
        (lambda: single("float16", "8, 8, 16"), "MMDiTQKNorm"),
    ],
)
def test_it_fires_once_and_numbers_agree(make: Callable[[], ir.Model], function: str) -> None:
    model = make()
    before = evaluate(model)
    assert joint_qk_norm.apply(model) == 1
    assert ops(model)[function] == 1 and ops(model)["RMSNormalization"] == 0
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for mine, theirs in zip(evaluate(model), before, strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_allclose(mine, theirs, rtol=1e-6 if mine.dtype == np.float32 else 2e-3)
    assert joint_qk_norm.apply(model) == 0


def test_streams_with_unlike_norms_are_not_joined() -> None:
    model = joint(second="1e-3")
    before = evaluate(model)
    assert joint_qk_norm.apply(model) == 1  # the first on its own: a function of one name has one epsilon
    assert ops(model)["Concat"] == 2 and ops(model)["RMSNormalization"] == 2
    for mine, theirs in zip(evaluate(model), before, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_k_and_v_are_not_q_and_k() -> None:
    """Only the first two parts of a projection are normalized together."""
    model = parsed("""<ir_version: 11, opset_import: ["": 23]>
    g (float[B, N, 24] a, float[4] w) => (float[B, N, 2, 4] k, float[B, N, 2, 4] v)
      <int64[3] parts = {8, 8, 8}, int64[4] heads = {0, 0, 2, 4}> {
      a_q, a_k, a_v = Split <axis = 2> (a, parts)
      a_kh = Reshape (a_k, heads)
      a_vh = Reshape (a_v, heads)
      kn = RMSNormalization (a_kh, w)
      vn = RMSNormalization (a_vh, w)
      k = Identity (kn)
      v = Identity (vn)
    }""")
    assert joint_qk_norm.apply(model) == 0


def test_a_norm_that_others_read_stays_for_them() -> None:
    model = parsed(
        """<ir_version: 11, opset_import: ["": 23]>
    g (float[B, N, 24] a, float[B, M, 24] b, float[4] a_wq, float[4] a_wk, float[4] b_wq, float[4] b_wk)
      => (float[B, T, 2, 4] q, float[B, T, 2, 4] k, float[B, N, 2, 4] seen)
      <int64[3] parts = {8, 8, 8}, int64[4] heads = {0, 0, 2, 4}> {"""
        + stream("a", "float")
        + stream("b", "float")
        + """
      joint_q = Concat <axis = 1> (a_qn, b_qn)
      joint_k = Concat <axis = 1> (a_kn, b_kn)
      q = Identity (joint_q)
      k = Identity (joint_k)
      seen = Identity (a_qn)
    }"""
    )
    before = evaluate(model)
    joint_qk_norm.apply(model)
    for mine, theirs in zip(evaluate(model), before, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_counts() -> None:
    assert NORMS == {"MMDiTQKNorm": 2, "MMDiTJointQKNorm": 4}


def two_norms(
    signature: str, parts: int, heads: str, *, axis: int = 2, attributes: str = "", late: str = ""
) -> ir.Model:
    """Q and K of one stream, split and normed in some way."""
    return parsed(f"""<ir_version: 11, opset_import: ["": 23]>
    g {signature} <int64[3] parts = {{{parts}, {parts}, {parts}}}, int64[4] heads = {{{heads}}}> {{
      a_q, a_k, a_v = Split <axis = {axis}> (a, parts)
      a_qh = Reshape (a_q, heads)
      a_kh = Reshape (a_k, heads)
      {late}
      qn = RMSNormalization {attributes} (a_qh, w)
      kn = RMSNormalization {attributes} (a_kh, w)
      q = Identity (qn)
      k = Identity (kn)
    }}""")


def test_norms_over_other_axes_stay() -> None:
    signature = "(float[B, N, 24] a, float[2, 4] w) => (float[B, N, 2, 4] q, float[B, N, 2, 4] k)"
    assert joint_qk_norm.apply(two_norms(signature, 8, "0, 0, 2, 4", attributes="<axis = 2>")) == 0


def test_parts_of_tokens_are_not_parts_of_channels() -> None:
    signature = "(float[2, 9, 8] a, float[4] w) => (float[2, 3, 2, 4] q, float[2, 3, 2, 4] k)"
    assert joint_qk_norm.apply(two_norms(signature, 3, "0, 0, 2, 4", axis=1)) == 0


def test_tokens_that_move_stay() -> None:
    signature = "(float[4, 6, 24] a, float[4] w) => (float[6, 4, 2, 4] q, float[6, 4, 2, 4] k)"
    assert joint_qk_norm.apply(two_norms(signature, 8, "6, 4, 2, 4")) == 0


def test_weights_computed_late_are_there() -> None:
    signature = "(float[B, N, 24] a, float[4] u) => (float[B, N, 2, 4] q, float[B, N, 2, 4] k)"
    model = two_norms(signature, 8, "0, 0, 2, 4", late="w = Exp (u)")
    before = evaluate(model)
    assert joint_qk_norm.apply(model) == 1
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for mine, theirs in zip(evaluate(model), before, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
