"""What is quantized, by role: the table ``[quantization]`` of a recipe, and what each precision does without one.

[quantization]
attention = "fp8"            # a role's scheme, or "none"
mlp = "fp8"
modulation = "fp8-weights"
fp8_attention = true         # the attentions themselves, where calibration has seen their operands
method = "percentile"        # how an input's largest magnitude follows from what calibration saw
percentile = 99.99
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from mmdit_deploy.contract import TOKENS, Range, axis_range
from mmdit_deploy.errors import UsageError
from mmdit_deploy.precision.roles import ROLES, Role
from mmdit_deploy.precision.schemes import SCHEMES, Scheme
from mmdit_deploy.spec import ModelSpec
from mmdit_deploy.spec.precision import QUANTIZED

Method = Literal["amax", "percentile", "mse"]
METHODS: tuple[Method, ...] = get_args(Method)
NONE = "none"
# That an attention sees, at the least: with fewer in a profile TensorRT-RTX 1.7 fuses none in FP8.
FP8_ATTENTION_TOKENS = 32
_ROLES: Mapping[str, Role] = {role: role for role in ROLES}


@dataclass(frozen=True)
class QuantizationRecipe:
    """How a model's linear layers are quantized, and its attentions.

    Args:
        schemes: by role; a role that is not named stays in the compute type.
        fp8_attention: whether attentions themselves are in FP8.
        method: of calibrated inputs: their largest magnitude, a percentile of it, or the clip of least squared error.
        percentile: of ``percentile``: the share of magnitudes, in percent, that is not clipped.
        smoothing: SmoothQuant's α, from 0 (all of the range stays in the inputs) to 1 (all goes into the weights).
    """

    schemes: Mapping[Role, Scheme] = field(default_factory=dict)
    fp8_attention: bool = False
    method: Method = "amax"
    percentile: float = 99.99
    smoothing: float = 0.5

    @staticmethod
    def default(precision: str) -> QuantizationRecipe:
        """What a precision quantizes where nobody says otherwise: the projections of attentions and the MLPs.

        Args:
            precision: one of `QUANTIZED`.

        Raises:
            UsageError: it is another.
        """
        if precision not in QUANTIZED:
            raise UsageError(
                f"what is quantized is said of {', '.join(QUANTIZED)}",
                received=repr(precision),
                fix="drop what is said of quantization, or choose one of these precisions",
            )
        scheme = SCHEMES[precision]
        return QuantizationRecipe({"attention": scheme, "mlp": scheme}, fp8_attention=precision == "fp8")

    @staticmethod
    def parse(table: Mapping[str, Any], precision: str) -> QuantizationRecipe:
        """The precision's own recipe with what a table changes: see `changed`."""
        return QuantizationRecipe.default(precision).changed(table)

    def changed(self, table: Mapping[str, Any]) -> QuantizationRecipe:
        """The recipe with what a table says.

        Args:
            table: from a role to a scheme's name or ``none``, and the other fields by name.

        Raises:
            UsageError: a key or a value is not one that recipes have.
        """
        schemes = dict(self.schemes)
        rest: dict[str, Any] = {}
        for key, value in table.items():
            if (role := _ROLES.get(key)) is not None:
                schemes.pop(role, None)
                if (scheme := _scheme(role, value)) is not None:
                    schemes[role] = scheme
            elif key in _FIELDS:
                holds, rule, fix = _FIELDS[key]
                if not holds(value):
                    raise UsageError(f"{key} is {rule}", received=ascii(value)[:120], fix=fix)
                rest[key] = value
            else:
                raise UsageError(
                    f"quantization is said of the roles {', '.join(ROLES)}, or is one of {', '.join(_FIELDS)}",
                    received=ascii(key)[:120],
                    fix='e.g. mlp = "fp8"',
                )
        in_order = {role: schemes[role] for role in ROLES if role in schemes}
        return replace(self, schemes=in_order, **rest)

    def to_json(self) -> dict[str, Any]:
        """A table that `changed` makes the same recipe of, from any other."""
        roles: dict[str, Any] = {role: self.schemes[role].name if role in self.schemes else NONE for role in ROLES}
        return roles | {name: getattr(self, name) for name in _FIELDS}


def fitted(
    recipe: QuantizationRecipe, ranges: Mapping[str, Range], spec: ModelSpec | None = None
) -> QuantizationRecipe:
    """The recipe for a contract's ranges: no FP8 attention where TensorRT would not fuse it, and write its scores out.

    Args:
        ranges: by axis; of a profile as well.
        spec: of the model. Its second attentions, where it has any, are over image tokens alone.
    """
    alone = spec is not None and spec.dual_attention_blocks
    tokens = axis_range("img_tokens" if alone else TOKENS, ranges)
    return recipe if tokens.min >= FP8_ATTENTION_TOKENS else replace(recipe, fp8_attention=False)


def _scheme(role: Role, value: object) -> Scheme | None:
    if value == NONE:
        return None
    if not isinstance(value, str) or value not in SCHEMES:
        raise UsageError(
            f"a role's scheme is one of {', '.join(SCHEMES)}, or {NONE}",
            received=f"{role} = {ascii(value)[:120]}",
            fix=f'e.g. {role} = "fp8"',
        )
    return SCHEMES[value]


def _number(value: object, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


# What may be said besides roles: a check, the rule in words, and an example.
_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str, str]] = {
    "fp8_attention": (lambda v: isinstance(v, bool), "true or false", "fp8_attention = false"),
    "method": (lambda v: isinstance(v, str) and v in METHODS, f"one of {', '.join(METHODS)}", 'method = "amax"'),
    "percentile": (lambda v: _number(v, 50, 100), "a number from 50 to 100", "percentile = 99.99"),
    "smoothing": (lambda v: _number(v, 0, 1), "a number from 0 to 1", "smoothing = 0.5"),
}
