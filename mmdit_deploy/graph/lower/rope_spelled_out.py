"""RoPE in ops that every runtime has.

    RotaryEmbedding(x, cos, sin)   ⇒   [x₀·cos − x₁·sin, x₁·cos + x₀·sin, …]

TensorRT fuses any spelling into the kernel that norms Q and K, and refuses the op where cosines and sines are one table
and the batch is dynamic. So that they stay one table, [N, D/2], what expanded them to the batch is passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from mmdit_deploy.graph.attributes import given_by_call
from mmdit_deploy.graph.lower.rotary_embedding import table
from mmdit_deploy.graph.passes import Pass, like, rule_pass


class _SpelledOut(RewriteRuleClassBase):
    def __init__(self) -> None:
        super().__init__(remove_nodes=False)  # Q and K are turned by the same

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any) -> Any:
        return op.RotaryEmbedding(x, cos, sin, _allow_other_attributes=True, _outputs=["turned"])

    def check(self, op: Any, x: ir.Value, turned: ir.Value, **_: Any) -> MatchResult:
        result = MatchResult()
        if x.shape is None or len(x.shape) not in (3, 4) or not isinstance(x.shape[-1], int):
            return result.fail("its axes are not known", x)
        node = turned.producer()
        unknown = None if node is None else given_by_call(node)
        if unknown is not None:
            return result.fail(f"its {unknown.name} is given by each call of the function around it", node)
        return result

    def rewrite(
        self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, turned: ir.Value, positions: Any = None, **_: Any
    ) -> ir.Value:
        node = turned.producer()
        assert node is not None and x.shape is not None
        dims: list[Any] = list(x.shape)
        heads = node.attributes.get_int("num_heads") if len(dims) == 3 else None
        if heads is None:
            whole = x
        else:
            whole = _reshape(op, x, [0, 0, heads, dims[2] // heads], [*dims[:2], heads, dims[2] // heads])
        width = whole.shape[3] if whole.shape is not None else None
        assert isinstance(width, int)
        part = node.attributes.get_int("rotary_embedding_dim") if "rotary_embedding_dim" in node.attributes else 0
        first = _slice(op, whole, 0, part) if part else whole
        waves = [self._wave(op, wave, positions, heads_last=heads is not None) for wave in (cos, sin)]
        turn = _neighbours if node.attributes.get_int("interleaved") else _halves
        out = turn(op, first, *waves)
        if part:
            out = like(op.Concat(out, _slice(op, whole, part, width), axis=-1), x, _dims(whole))
        return out if heads is None else _reshape(op, out, [0, 0, heads * width], dims)

    def _wave(self, op: Any, value: ir.Value, positions: ir.Value | None, *, heads_last: bool) -> Any:
        """Cosines or sines, with an axis for heads."""
        if positions is not None:
            value = op.Gather(value, positions, axis=0)
        elif (shared := table(value)) is not None:
            return op.Unsqueeze(shared, _ints(op, 1)) if heads_last else shared
        return op.Unsqueeze(value, _ints(op, 2 if heads_last else 1))


class _SpelledOutByPosition(_SpelledOut):
    def pattern(self, op: Any, x: Any, cos: Any, sin: Any, positions: Any) -> Any:  # type: ignore[override]
        return op.RotaryEmbedding(x, cos, sin, positions, _allow_other_attributes=True, _outputs=["turned"])


def _neighbours(op: Any, x: ir.Value, cos: Any, sin: Any) -> ir.Value:
    dims = _dims(x)
    pairs = _reshape(op, x, [0, 0, 0, dims[3] // 2, 2], [*dims[:3], dims[3] // 2, 2])
    last = _ints(op, -1)
    even, odd = (like(op.Squeeze(_slice(op, pairs, i, i + 1), last), x, [*dims[:3], dims[3] // 2]) for i in range(2))
    a, b = _turn(op, even, odd, cos, sin)
    stacked = op.Concat(op.Unsqueeze(a, last), op.Unsqueeze(b, last), axis=-1)
    return _reshape(op, like(stacked, x, [*dims[:3], dims[3] // 2, 2]), [0, 0, 0, dims[3]], dims)


def _halves(op: Any, x: ir.Value, cos: Any, sin: Any) -> ir.Value:
    dims = _dims(x)
    half = dims[3] // 2
    a, b = _turn(op, _slice(op, x, 0, half), _slice(op, x, half, dims[3]), cos, sin)
    return like(op.Concat(a, b, axis=-1), x, dims)


def _turn(op: Any, a: ir.Value, b: ir.Value, cos: Any, sin: Any) -> tuple[ir.Value, ir.Value]:
    dims = _dims(a)
    ac, bs, bc, as_ = (like(op.Mul(t, w), a, dims) for t, w in ((a, cos), (b, sin), (b, cos), (a, sin)))
    return like(op.Sub(ac, bs), a, dims), like(op.Add(bc, as_), a, dims)


def _slice(op: Any, x: ir.Value, begin: int, end: int) -> ir.Value:
    cut = op.Slice(x, _ints(op, begin), _ints(op, end), _ints(op, -1))
    return like(cut, x, [*_dims(x)[:-1], end - begin])


def _reshape(op: Any, x: ir.Value, shape: Sequence[int], dims: Sequence[int | ir.SymbolicDim]) -> ir.Value:
    return like(op.Reshape(x, _ints(op, *shape)), x, dims)


def _dims(x: ir.Value) -> list[Any]:
    return list(x.shape or ())


def _ints(op: Any, *numbers: int) -> Any:
    return op.Constant(value=ir.tensor(list(numbers), dtype=ir.DataType.INT64))


rope_spelled_out: Pass = rule_pass("RoPE spelled out", _SpelledOut.rule(), _SpelledOutByPosition.rule())
