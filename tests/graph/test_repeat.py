"""Channels that optimum repeats by a lookup. (That it fires on optimum's own graph is in `test_fusion_coverage`.)"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from mmdit_deploy.graph.fuse.rotary.repeat import repeat


def repeated(limits: str = "{3, 3, 3, 3}", axis: str = "{1}", shape: str = "{4, 3, 5}", batch_dims: int = 0) -> str:
    """Four channels of five tokens, each three times."""
    return f"""<ir_version: 11, opset_import: ["": 23]>
    g (float[5, 4] x) => (float[5, R] y) <int64[1] axis = {axis}, int64[1] one = {{1}}, int64[3] shape = {shape},
        int64[3] index = {{0, 1, 2}}, int64[4] counts = {limits}> {{
      t = Transpose<perm = [1, 0]>(x)
      u = Unsqueeze(t, axis)
      e = Expand(u, shape)
      limits = Unsqueeze(counts, one)
      mask = Less(index, limits)
      true = NonZero(mask)
      places = Transpose<perm = [1, 0]>(true)
      g = GatherND<batch_dims = {batch_dims}>(e, places)
      y = Transpose<perm = [1, 0]>(g)
    }}"""


def parse(text: str) -> ir.Model:
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), data_prop=True))


def execute(model: ir.Model) -> np.ndarray:
    x = np.arange(20, dtype=np.float32).reshape(5, 4)
    (y,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    return np.asarray(y)


def test_fires_and_keeps_the_numbers() -> None:
    model = parse(repeated())
    before = execute(model)
    assert repeat.apply(model) == 1
    ops = Counter(node.op_type for node in model.graph)
    assert not ops["GatherND"] and not ops["NonZero"] and not ops["Transpose"]
    np.testing.assert_array_equal(execute(model), before)
    np.testing.assert_array_equal(before, np.repeat(np.arange(20, dtype=np.float32).reshape(5, 4), 3, axis=1))
    assert repeat.apply(model) == 0 and repeat.left(model) == ()


def test_what_a_call_gives_is_not_known() -> None:
    """How a Transpose in a function turns, say: its pattern is not broken by it."""
    body = repeated().split("{\n", 1)[1].replace("perm = [1, 0]", "perm: ints = @perm")
    text = f"""<ir_version: 11, opset_import: ["": 23, "local": 1]>
    g (float[5, 4] x, int64[1] axis, int64[1] one, int64[3] shape, int64[3] index, int64[4] counts)
        => (float[5, R] y) {{
      y = local.Turn<perm = [1, 0]>(x, axis, one, shape, index, counts)
    }}
    <domain: "local", opset_import: ["": 23]> Turn <perm> (x, axis, one, shape, index, counts) => (y) {{ {body}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert repeat.apply(model) == 0
    assert repeat.left(model) == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (repeated(limits="{3, 2, 3, 3}"), "not every channel is repeated as often"),
        (repeated().replace("Unsqueeze(counts, one)", "Unsqueeze(counts, one_)"), "how often each channel is repeated"),
        (repeated(axis="{0}", shape="{3, 4, 5}"), "what is repeated is not the first axis"),
        (repeated(batch_dims=1), "it is looked up for each channel by itself"),
    ],
)
def test_near_misses_stay(text: str, reason: str) -> None:
    model = ir.from_proto(onnx.parser.parse_model(text.replace("(float[5, 4] x)", "(float[5, 4] x, int64[1] one_)")))
    for node in model.graph:
        if node.op_type == "Expand":
            node.outputs[0].shape = ir.Shape([4, 3, 5])
    assert repeat.apply(model) == 0
    (left,) = repeat.left(model)
    assert reason in left.reason
