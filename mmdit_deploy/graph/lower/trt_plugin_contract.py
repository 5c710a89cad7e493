"""What a plugin for TensorRT before 10.14 gets, and what it computes: the contract of ``engines/plugins/README.md``.

Both the lowering and the page derive from this. TensorRT's ONNX parser makes a plugin field of each node attribute
that the plugin's creator names: of an int kINT32, of a float kFLOAT32, of a string kCHAR. It looks nodes up by op_type
alone, built-in ops first, then local functions, then plugins; so names equal no op's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PLUGIN_DOMAIN = "mmdit.plugin"
PLUGIN_VERSION = "1"
PLUGIN_NAMESPACE = "mmdit"
LAYOUTS = ("BNC", "BHND")  # heads next to each other in the last axis, or on an axis before the tokens
Plain = int | float | str


@dataclass(frozen=True)
class Tensor:
    """An input or output of a plugin.

    Args:
        name: in the formula.
        shape: by the letters of the page.
        dtype: ``T`` is fp32, fp16 or bf16, the same for all tensors of a node.
        meaning: a few words.
    """

    name: str
    shape: str
    meaning: str
    dtype: str = "T"


@dataclass(frozen=True)
class Field:
    """An attribute of a node, which becomes a field of the plugin.

    Args:
        type: of the attribute: int, float or str.
        meaning: a few words.
    """

    name: str
    type: type[Plain]
    meaning: str


@dataclass(frozen=True)
class Plugin:
    """One plugin.

    Args:
        name: the op type, unlike any op of ONNX, ONNX Runtime and TensorRT.
        replaces: what it stands for.
        inputs: in order; the last may be left out where its meaning says so.
        fields: every node has all of them.
        formula: what it computes.
    """

    name: str
    replaces: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    fields: tuple[Field, ...]
    formula: str

    def attributes(self, **given: Plain) -> dict[str, Plain]:
        """The attributes of a node: its fields, and by which TensorRT finds the plugin.

        Raises:
            TypeError: they are not the plugin's.
        """
        expected = {field.name: field.type for field in self.fields}
        wrong = {n for n in expected.keys() | given.keys() if type(given.get(n)) is not expected.get(n)}
        if wrong:
            raise TypeError(f"{self.name} has the fields {expected}, not {sorted(wrong)} of {given}")
        return {**given, "plugin_version": PLUGIN_VERSION, "plugin_namespace": PLUGIN_NAMESPACE}


_LAYOUT = Field(
    "layout", str, "`BNC`: heads next to each other in the last axis; `BHND`: an axis of heads before the tokens"
)
_STASH = Field("stash_type", int, "ONNX's number of the type that the norm is computed in: 1 fp32, 10 fp16, 16 bf16")
_AXIS = Field("axis", int, "always -1: the norm is over the last axis")
_EPSILON = Field("epsilon", float, "added to the mean of squares, or to the variance")

ATTENTION = Plugin(
    "MMDiTAttentionPlugin",
    "Attention",
    (
        Tensor("q", "[B, N, H·D] or [B, H, N, D]", "queries, not yet scaled"),
        Tensor("k", "[B, M, K·D] or [B, K, M, D]", "keys; K divides H"),
        Tensor("v", "as k", "values"),
        Tensor("mask", "broadcasts to [B, H, N, M]", "added to the scores; may hold -inf; there only if `has_mask`"),
    ),
    (Tensor("y", "as q", "what each query attends to"),),
    (
        Field("num_heads", int, "H, heads of the queries"),
        Field("kv_num_heads", int, "K, heads of keys and values: head h of Q reads head h // (H / K) of them"),
        Field("head_size", int, "D"),
        Field("scale", float, "factor of the scores"),
        Field("has_mask", int, "1 if there is a fourth input, else 0"),
        Field(
            "softmax_type", int, "ONNX's number of the type that the softmax is computed in: 1 fp32, 10 fp16, 16 bf16"
        ),
        _LAYOUT,
    ),
    "y = softmax(scale · q kᵀ + mask) v, by head; a query all of whose keys are masked by -inf gets zeros",
)
RMS_NORM = Plugin(
    "MMDiTRMSNormPlugin",
    "RMSNormalization",
    (Tensor("x", "[…, C]", "of rank 2 to 4"), Tensor("weight", "[C]", "factor of each channel")),
    (Tensor("y", "as x", "normed"),),
    (_AXIS, _EPSILON, _STASH),
    "y = T(x / √(mean(x²) + epsilon)) · weight",
)
ROPE = Plugin(
    "MMDiTRoPEPlugin",
    "RotaryEmbedding",
    (
        Tensor("x", "[B, N, H·D] or [B, H, N, D]", "queries or keys"),
        Tensor("cos", "[B, N, R/2]", "the same for all heads"),
        Tensor("sin", "[B, N, R/2]", "the same for all heads"),
    ),
    (Tensor("y", "as x", "turned"),),
    (
        Field("num_heads", int, "H"),
        Field("head_size", int, "D"),
        Field("rotary_embedding_dim", int, "R: the first R channels of a head are turned, the others stay"),
        Field("interleaved", int, "1: channels 2i and 2i + 1 are a pair; 0: channels i and i + R/2 are"),
        _LAYOUT,
    ),
    "for each pair (a, b): a′ = a · cosᵢ - b · sinᵢ, b′ = b · cosᵢ + a · sinᵢ",
)
ADALN = Plugin(
    "MMDiTAdaLNPlugin",
    "LayerNormalization without parameters, then MMDiTModulate",
    (
        Tensor("x", "[B, N, C]", "tokens"),
        Tensor("scale", "[B, 1, C] or [B, N, C]", "one for each sample, or token"),
        Tensor("shift", "[B, 1, C] or [B, N, C]", "one for each sample, or token"),
    ),
    (Tensor("y", "as x", "normed and modulated"),),
    (_AXIS, _EPSILON, _STASH),
    "y = T((x - mean(x)) / √(var(x) + epsilon)) · (1 + scale) + shift",
)
PLUGINS: Mapping[str, Plugin] = {plugin.name: plugin for plugin in (ATTENTION, RMS_NORM, ROPE, ADALN)}


def as_text(plugin: Plugin) -> str:
    """The plugin's section of the page, in Markdown."""
    tensors = [
        f"| {kind} {i} | `{t.name}` | {t.shape} | {t.dtype} | {t.meaning} |"
        for kind, of_kind in (("input", plugin.inputs), ("output", plugin.outputs))
        for i, t in enumerate(of_kind)
    ]
    fields = [f"| `{f.name}` | {_FIELD_TYPES[f.type]} | {f.meaning} |" for f in plugin.fields]
    return "\n".join(
        [
            f"## {plugin.name}",
            "",
            f"In the place of {plugin.replaces}: {plugin.formula}.",
            "",
            "| tensor | name | shape | type | meaning |",
            "|---|---|---|---|---|",
            *tensors,
            "",
            "| attribute | field | meaning |",
            "|---|---|---|",
            *fields,
            "",
        ]
    )


_FIELD_TYPES: Mapping[type[Plain], str] = {int: "kINT32", float: "kFLOAT32", str: "kCHAR"}
