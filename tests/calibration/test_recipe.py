"""A recipe says by role what is quantized; what it says wrongly is refused."""

from __future__ import annotations

from typing import Any

import pytest

from mmdit_deploy.contract import DEFAULT_RANGES, Range
from mmdit_deploy.errors import UsageError
from mmdit_deploy.precision import ROLES, QuantizationRecipe
from mmdit_deploy.precision.recipe import fitted
from mmdit_deploy.spec import ModelSpec
from mmdit_deploy.spec.precision import QUANTIZED


@pytest.mark.parametrize("precision", QUANTIZED)
def test_embedders_modulation_and_final_layer_stay_in_16_bits(precision: str) -> None:
    recipe = QuantizationRecipe.default(precision)
    assert {role: scheme.name for role, scheme in recipe.schemes.items()} == {"attention": precision, "mlp": precision}
    assert recipe.fp8_attention == (precision == "fp8")


def test_a_table_changes_roles_and_method() -> None:
    table = {"modulation": "fp8-weights", "attention": "none", "fp8_attention": False, "method": "mse"}
    recipe = QuantizationRecipe.parse(table, "fp8")
    assert {role: scheme.name for role, scheme in recipe.schemes.items()} == {"mlp": "fp8", "modulation": "fp8-weights"}
    assert (recipe.fp8_attention, recipe.method) == (False, "mse")
    assert set(recipe.to_json()) > set(ROLES)
    assert QuantizationRecipe.default("w4a16").changed(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("table", "received"),
    [
        ({"mpl": "fp8"}, "'mpl'"),
        ({"mlp": "fp9"}, "mlp = 'fp9'"),
        ({"mlp": True}, "mlp = True"),
        ({"method": "max"}, "'max'"),
        ({"method": ["amax"]}, r"\['amax'\]"),
        ({"percentile": 101}, "101"),
        ({"percentile": True}, "True"),
        ({"smoothing": -0.1}, "-0.1"),
        ({"fp8_attention": "yes"}, "'yes'"),
    ],
)
def test_what_no_recipe_says_is_refused(table: dict[str, Any], received: str) -> None:
    with pytest.raises(UsageError, match=rf"received: {received}\n  fix: "):
        QuantizationRecipe.parse(table, "fp8")


def test_only_quantized_precisions_have_one() -> None:
    with pytest.raises(UsageError, match="received: 'fp16'"):
        QuantizationRecipe.default("fp16")


@pytest.mark.parametrize(
    ("img", "txt", "dual", "fuses"),
    [(30, 2, (), True), (29, 2, (), False), (1, 1, (), False), (30, 2, (0,), False), (32, 2, (0,), True)],
)
def test_fp8_attention_is_left_out_where_tensorrt_would_not_fuse_it(
    img: int, txt: int, dual: tuple[int, ...], fuses: bool
) -> None:
    ranges = {**DEFAULT_RANGES, "img_tokens": Range(img, 64, 64), "txt_tokens": Range(txt, 64, 64)}
    spec = ModelSpec("m", depth=2, num_heads=1, dual_attention_blocks=dual)
    assert fitted(QuantizationRecipe.default("fp8"), ranges, spec).fp8_attention == fuses
