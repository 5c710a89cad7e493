"""RoPE.

    x·cos + [−x₁, x₀, −x₃, x₂, …]·sin                 ┐
    [x₀·cos − x₁·sin, x₁·cos + x₀·sin, …]             ├   ⇒   RotaryEmbedding(x, cos, sin, interleaved)
    x as complex numbers, or pairs by matrices        ┘

    Concat(RotaryEmbedding(the first channels of x), the others)   ⇒   RotaryEmbedding(x, …, rotary_embedding_dim)

Pairs of neighbours or over both halves, and heads before or after tokens: [B, N, H, D] is turned as [B, N, H·D],
without a transpose. Cosines and sines are half as wide, one per pair, where a graph has them twice: [N, D/2]. The op
wants them for each sample, so they are expanded, once for all that are turned by them.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from mmdit_deploy.graph.attributes import given_by_call
from mmdit_deploy.graph.fuse.rotary.channel_reader import Reader
from mmdit_deploy.graph.fuse.rotary.rotation import NotExact, Part, Rotation, moved_from, rotation
from mmdit_deploy.graph.passes import Pass, like, rule_pass


class _Rope(RewriteRuleClassBase):
    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def setup(self) -> None:
        """Forget what was found in the scope before."""
        self._found: dict[ir.Value, Rotation] = {}
        self._expanded: dict[tuple[object, ...], ir.Value] = {}

    def check(self, op: Any, out: ir.Value, **_: Any) -> MatchResult:
        result = MatchResult()
        found = rotation(out)
        if found is None:
            return result.fail()  # something else
        if isinstance(found, NotExact):
            return result.fail(found.reason, found.value)
        if found.heads_last and not isinstance(_dims(found.x)[2], int):
            return result.fail("the number of heads is not known", found.x)
        self._found[out] = found
        return result

    def rewrite(self, op: Any, out: ir.Value, **_: Any) -> ir.Value:
        turn = self._found.pop(out)
        x, dims = turn.x, _dims(turn.x)
        if x.dtype != turn.dtype:
            x = op.Cast(x, to=turn.dtype)
            x.type, x.shape = ir.TensorType(turn.dtype), ir.Shape(dims)
        cos, sin = (self._for_each_sample(op, part, turn, x) for part in (turn.cos, turn.sin))
        heads = dims[2] if turn.heads_last else None
        return _rotary_embedding(op, x, cos, sin, heads, {"interleaved": int(turn.interleaved)})

    def _for_each_sample(self, op: Any, part: Part, turn: Rotation, x: ir.Value) -> ir.Value:
        """[B, N, D/2]"""
        dims = _dims(x)
        batch, tokens = dims[0], dims[1 if turn.heads_last else 2]
        # x's own sizes, where they have no name
        key = (part, batch, tokens) if _named(batch) and _named(tokens) else (part, turn.x)
        if key not in self._expanded:
            half = _half(op, part, len(turn.angles), dims[3] // 2)
            of_x = [size.value if isinstance(size, ir.SymbolicDim) else size for size in (batch, tokens)]
            if turn.angles != tuple(of_x):
                half = like(op.Expand(half, _sizes(op, x, turn.heads_last)), half, [batch, tokens, dims[3] // 2])
            self._expanded[key] = half
        return self._expanded[key]


class _Sum(_Rope):
    def pattern(self, op: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        return op.Add(op.Mul(a, b), op.Mul(c, d), _outputs=["out"])


class _Difference(_Rope):
    def pattern(self, op: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        return op.Sub(op.Mul(a, b), op.Mul(c, d), _outputs=["out"])


class _Halves(_Rope):
    def pattern(self, op: Any, a: Any, b: Any) -> Any:
        return op.Concat(a, b, _allow_other_attributes=True, _outputs=["out"])


class _Pairs(_Rope):
    def pattern(self, op: Any, a: Any, b: Any, shape: Any) -> Any:
        pairs = op.Concat(a, b, _allow_other_attributes=True)
        return op.Reshape(pairs, shape, _allow_other_attributes=True, _outputs=["out"])


class _Matrices(_Rope):
    def pattern(self, op: Any, a: Any, b: Any, c: Any, d: Any, shape: Any) -> Any:
        products = op.Add(op.Mul(a, b), op.Mul(c, d))
        return op.Reshape(products, shape, _allow_other_attributes=True, _outputs=["out"])


class _Partial(RewriteRuleClassBase):
    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def pattern(self, op: Any, turned: Any, rest: Any) -> Any:
        return op.Concat(turned, rest, _allow_other_attributes=True)

    def check(self, op: Any, turned: ir.Value, rest: ir.Value, **_: Any) -> MatchResult:
        result = MatchResult()
        return result if _whole(turned, rest) is not None else result.fail()

    def rewrite(self, op: Any, turned: ir.Value, rest: ir.Value, **_: Any) -> ir.Value:
        x, node = _whole(turned, rest) or (turned, turned.producer())
        assert node is not None and turned.shape is not None
        attributes = {**node.attributes, "rotary_embedding_dim": turned.shape[3]}
        heads = node.attributes.get_int("num_heads") if attributes.pop("num_heads", None) else None
        return _rotary_embedding(op, x, node.inputs[1], node.inputs[2], heads, attributes)


def _rotary_embedding(op: Any, x: ir.Value, cos: Any, sin: Any, heads: int | None, attributes: Any) -> ir.Value:
    """Of [B, H, N, D], or where the number of heads is given, of [B, N, H, D]."""
    dims = _dims(x)
    if heads is None:
        return like(op.RotaryEmbedding(x, cos, sin, **attributes), x, dims)
    width = dims[3]
    merged = [*dims[:2], heads * width]
    flat = like(op.Reshape(x, _ints(op, 0, 0, heads * width)), x, merged)
    turned = like(op.RotaryEmbedding(flat, cos, sin, num_heads=heads, **attributes), x, merged)
    return like(op.Reshape(turned, _ints(op, 0, 0, heads, width)), x, dims)


def _whole(turned: ir.Value, rest: ir.Value) -> tuple[ir.Value, ir.Node] | None:
    """The value of which the first channels are turned and the rest is not, and the node that turns them."""
    node = turned.producer()
    if node is not None and node.op_type == "Reshape" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "RotaryEmbedding" or "rotary_embedding_dim" in node.attributes:
        return None
    if given_by_call(node) is not None:
        return None
    part = node.inputs[0]
    if "num_heads" in node.attributes:  # between reshapes
        flat = part.producer() if part is not None else None
        part = flat.inputs[0] if flat is not None and flat.op_type == "Reshape" else None
    if part is None or part.shape is None or part.shape != turned.shape:
        return None
    for x, _ in moved_from(part):
        if x is part or x.shape is None or len(x.shape) != 4:
            continue
        reader = Reader(x)
        whole, first, last = (reader.read(v) for v in (x, part, rest))
        if whole is None or first is None or last is None or not whole.axes == first.axes == last.axes:
            continue
        if [*first.grid.flat, *last.grid.flat] == list(whole.grid):
            return x, node
    return None


def _dims(x: ir.Value) -> list[Any]:
    assert x.shape is not None
    return list(x.shape)


def _named(size: int | ir.SymbolicDim) -> bool:
    return isinstance(size, int) or size.value is not None


def _ints(op: Any, *numbers: int) -> ir.Value:
    return op.Constant(value=ir.tensor(list(numbers), dtype=ir.DataType.INT64))


def _sizes(op: Any, x: ir.Value, heads_last: bool) -> ir.Value:
    """Of samples and tokens, and 1."""
    if heads_last:
        parts = [op.Shape(x, start=0, end=2)]
    else:
        parts = [op.Shape(x, start=0, end=1), op.Shape(x, start=2, end=3)]
    sizes: ir.Value = op.Concat(*parts, _ints(op, 1), axis=0)
    sizes.type, sizes.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([3])
    return sizes


def _half(op: Any, part: Part, rank: int, pairs: int) -> ir.Value:
    """Cosines or sines alone: [N, D/2], or [B, N, D/2]."""
    value, dims = part.value, [*part.axes]
    made = value
    if part.cut is not None:
        begin, end, step = part.cut
        made = op.Slice(made, _ints(op, begin), _ints(op, end), _ints(op, -1), _ints(op, step))
    for place in reversed(part.at):
        made = op.Gather(made, op.Constant(value=ir.tensor(place, dtype=ir.DataType.INT64)), axis=-1)
    ones = [axis for axis, size in enumerate(dims) if size == 1]
    if len(dims) > rank:
        made = op.Squeeze(made, _ints(op, *ones))
    if made is not value:
        kept = [size if isinstance(size, int | str) else None for size in dims if size != 1]
        made.type, made.shape = value.type, ir.Shape([*kept, pairs])
    return made


rope: Pass = rule_pass("RoPE", *(rule.rule() for rule in (_Sum, _Difference, _Halves, _Pairs, _Matrices, _Partial)))
