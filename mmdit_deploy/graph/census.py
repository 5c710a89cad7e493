"""Count what a graph holds and compare it with what the spec implies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir

from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.lower.joint_qk_norm import NORMS
from mmdit_deploy.graph.named_functions import FP8_ATTENTIONS, is_named_function
from mmdit_deploy.graph.precision.implied import FP8_ATTENTION, implied_by_plan, implied_in, product
from mmdit_deploy.graph.precision.recognized import products_joined, scheme_of
from mmdit_deploy.precision import PrecisionPlan
from mmdit_deploy.spec import ModelSpec

OPS = ("Attention", "RMSNormalization", "LayerNormalization", "Gelu", "Softmax")
NAMED = ("MMDiTModulate", "MMDiTGatedResidual", "MMDiTSwiGLU")  # one call each
ADAPTIVE = "LayerNormalization (adaptive)"  # one whose scale is computed, per sample


def census(model: ir.Model) -> dict[str, int]:
    """Nodes by op type that one run executes: a function's nodes count once per call. A named function is one node.

    Q and K that TensorRT's dialect normalizes together are counted as the norms that they were. A product with
    quantized weights counts under its scheme, as ``MatMul (fp8)``.
    """
    functions = {f.name: f for f in model.functions.values() if not is_named_function(f)}

    def count(nodes: ir.Graph | ir.Function) -> Counter[str]:
        total: Counter[str] = Counter()
        for node in nodes:
            if node.op_type in NORMS:
                total["RMSNormalization"] += NORMS[node.op_type]
            elif node.op_type in FP8_ATTENTIONS:
                total.update(["Attention", FP8_ATTENTION])
            else:
                total += count(functions[node.op_type]) if node.op_type in functions else _counted(node)
        return total

    return dict(count(model.graph))


def implied_by_call(spec: ModelSpec, calls: Collection[str] | None = None) -> dict[str, dict[str, int]]:
    """What the spec implies of each call that has attentions, norms or GELUs: single nodes, and no softmax of its own.

    Args:
        calls: leave out all others: those of one segment.

    Returns:
        Counts by op, by call.
    """
    ops = {"txt_embed": {"RMSNormalization": 1}} if spec.txt_norm else {}
    gelus = 1 if spec.activation == "gelu" else 0  # per MLP
    for i, block in enumerate(spec.blocks):
        streams = 2 if block.makes_text else 1  # with an MLP; both have a norm before the attention
        qk_norms = 6 if block.dual_attention else 4
        counts = (block.attentions, qk_norms if spec.qk_norm else 0, 2 + streams, gelus * streams, 0)
        ops[f"blocks.{i}"] = dict(zip(OPS, counts, strict=True))
    for i in range(spec.single_depth):
        ops[f"single_blocks.{i}"] = dict(zip(OPS, (1, 2 if spec.qk_norm else 0, 1, gelus, 0), strict=True))
    ops["final"] = {"LayerNormalization": 1}
    return {call: counts for call, counts in ops.items() if calls is None or call in calls}


def implied(spec: ModelSpec, plan: PrecisionPlan | None = None) -> dict[str, int]:
    """What the spec, and a plan of its precision, imply of the whole graph."""
    ops = {op: sum(counts.get(op, 0) for counts in implied_by_call(spec).values()) for op in OPS}
    duals = sum(block.dual_attention for block in spec.blocks)
    streams = sum(2 if block.makes_text else 1 for block in spec.blocks)  # whose attention and MLP have a residual each
    modulated = ops["LayerNormalization"] + duals  # the first norm of a dual-attention block's image is read twice
    residuals = 2 * streams + duals + spec.single_depth
    mlps = streams + spec.single_depth
    named = (modulated, residuals, mlps if spec.activation == "swiglu" else 0)
    turned = 2 * (spec.depth + spec.single_depth) if spec.rope_axes else 0  # Q and K
    planned = {} if plan is None else implied_by_plan(plan)
    return {**ops, **dict(zip(NAMED, named, strict=True)), "RotaryEmbedding": turned, **planned}


def implied_lowered(spec: ModelSpec, dialect: str, plan: PrecisionPlan | None = None) -> dict[str, int]:
    """What the spec, and a plan of its precision, imply of a graph in a dialect."""
    counts = _implied_lowered(spec, dialect)
    return counts if plan is None else implied_in(dialect, plan, counts)


def _implied_lowered(spec: ModelSpec, dialect: str) -> dict[str, int]:
    """What the spec implies of a graph in a dialect: TensorRT's keeps the standard ops, but for RoPE.

    In ONNX Runtime's no attention holds its scores, no weight is transposed, and every norm takes its modulation, where
    that is one for all tokens. Where bf16 is emulated, every op must be seen: no named function is left.
    """
    standard = implied(spec)
    if dialect == "decomposed" or dialect.startswith("trt-plugin"):
        return _implied_in_opset_17(standard, dialect)
    spelled_out = dict.fromkeys(NAMED, 0) if dialect.endswith("bf16") else {}
    if not dialect.startswith("ort"):
        return {**standard, **spelled_out, **({"RotaryEmbedding": 0} if dialect == "trt" else {})}
    by_token = 2 * spec.depth if spec.still_references else 0
    return {
        "MMDiTModulate": by_token,
        "MMDiTGatedResidual": standard["MMDiTGatedResidual"],
        "MMDiTSwiGLU": standard["MMDiTSwiGLU"],
        "RotaryEmbedding": standard["RotaryEmbedding"],
        **spelled_out,
        "Attention": 0,
        "MultiHeadAttention": standard["Attention"],
        "RMSNormalization": standard["RMSNormalization"],
        "LayerNormalization": by_token,
        # A dual-attention block modulates its first norm twice.
        ADAPTIVE: standard["LayerNormalization"] - by_token + sum(b.dual_attention for b in spec.blocks),
        "MatMul": 0,
        "Softmax": 0,
    }


def _implied_in_opset_17(standard: Mapping[str, int], dialect: str) -> dict[str, int]:
    """Newer ops and named functions are spelled out, or are plugins, which may have bodies: then those count."""
    attentions, norms, modulated = (standard[op] for op in ("Attention", "LayerNormalization", "MMDiTModulate"))
    none = {**dict.fromkeys(standard, 0), "Softmax": attentions}
    if dialect == "decomposed":
        return {**none, "LayerNormalization": norms}
    if dialect == "trt-plugin-bodies":
        return {**none, ADAPTIVE: modulated}
    plugins = {
        "MMDiTAttentionPlugin": attentions,
        "MMDiTRMSNormPlugin": standard["RMSNormalization"],
        "MMDiTRoPEPlugin": standard["RotaryEmbedding"],
        "MMDiTAdaLNPlugin": modulated,
    }
    return {**none, "Softmax": 0, **plugins}


def check_census(
    model: ir.Model, expected: Mapping[str, int], what: str, *, beside: Sequence[ir.Model] = ()
) -> dict[str, int]:
    """The counts that matter, when they are what was expected.

    Args:
        beside: other parts of the same model: they are counted together.
        expected: by op, from `implied` or `implied_lowered`.
        what: the graph's name, for the message.

    Raises:
        GraphError: a count differs: a fusion did not fire, or the graph is of another model.
    """
    found = sum((Counter(census(part)) for part in (model, *beside)), Counter[str]())
    wrong = {op: (n, found.get(op, 0)) for op, n in expected.items() if found.get(op, 0) != n}
    if wrong:
        raise GraphError(
            f"the {what} graph has each attention and norm of the spec as one node",
            received="; ".join(f"{op}: expected {want}, found {got}" for op, (want, got) in wrong.items()),
            fix="a fusion did not fire: report this as a bug, with torch's and onnxscript's versions",
        )
    return {op: found.get(op, 0) for op in expected}


def _counted(node: ir.Node) -> Counter[str]:
    """What a node counts as; a product for the modulations of many calls as many products."""
    scheme = scheme_of(node)
    if scheme is not None:
        return Counter({product(scheme): products_joined(node)})
    if node.op_type == "LayerNormalization" and node.inputs[1] is not None:
        scale = node.inputs[1].producer()
        if scale is not None and scale.op_type != "Constant":
            return Counter([ADAPTIVE])
    return Counter([node.op_type])
