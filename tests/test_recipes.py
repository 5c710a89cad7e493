"""The shipped recipes are right, and a wrong one is refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmdit_deploy.build import check_targets
from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.contract import Contract, Range
from mmdit_deploy.errors import UsageError
from mmdit_deploy.families import PRESETS, preset
from mmdit_deploy.precision import QuantizationRecipe, Scheme
from mmdit_deploy.precision.structure import indivisible
from mmdit_deploy.recipes import load_recipe, recipe_names
from mmdit_deploy.spec import precision

FOLDER = Path(__file__).parents[1] / "export"
GOOD = """description = "one of mine"
preset = "sd3-medium"
precision = "fp16"
"""


def test_every_preset_has_a_recipe() -> None:
    for kind in ("bf16", "fp8", "fp4"):
        assert {load_recipe(name).preset for name in recipe_names() if name.endswith(kind)} == set(PRESETS)
    for wanted in ("sd3-medium-fp16", "sd3.5-large-fp16", "sd3.5-medium-bf16", "flux1-dev-bf16", "flux1-schnell-fp16",
                   "flux2-dev-bf16", "qwen-image-bf16"):  # fmt: skip
        assert wanted in recipe_names()


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_make_a_contract(name: str) -> None:
    recipe = load_recipe(name)
    assert name == recipe.name == f"{recipe.preset}-{recipe.precision}"
    compute, spec = precision(recipe.precision, recipe.base), preset(recipe.preset)
    schemes: tuple[Scheme, ...] = ()
    if compute.quantized:  # of models that are published for bf16's range, the rest is in bf16
        assert compute.base == ("fp16" if spec.family == "sd3" else "bf16")
        quantization = QuantizationRecipe.parse(recipe.quantization, compute.name)
        assert quantization == QuantizationRecipe.default(compute.name)
        schemes = tuple(quantization.schemes.values())
        assert not indivisible(spec, quantization)
    check_targets(recipe.targets, compute, schemes)
    contract = Contract.of(spec, compute, recipe.ranges)
    assert contract.ranges == recipe.ranges
    assert isinstance(recipe.checkpoint, str) and recipe.checkpoint.count("/") == 1
    text = (FOLDER / f"{name}.toml").read_text()
    assert "pixels" in text and "text" in text.lower()  # a comment says what the numbers of tokens mean
    billions = sum(p.numel for p in parameters(spec)) / 1e9
    assert any(f"({billions:.{digits}f} B parameters" in recipe.description for digits in (1, 2))


def test_a_checkpoint_is_a_path_or_a_name_on_the_hub(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for text, expected in (("./model", tmp_path / "model"), ("/models/m", Path("/models/m")), ("org/name", "org/name")):
        path.write_text(GOOD + f'checkpoint = "{text}"\n')
        assert load_recipe(path).checkpoint == expected
    for text in ("model.safetensors", "a/b/c", "~/model"):
        path.write_text(GOOD + f'checkpoint = "{text}"\n')
        with pytest.raises(UsageError, match="checkpoint"):
            load_recipe(path)


def test_a_file_needs_three_keys_only(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    recipe = load_recipe(path)
    assert (recipe.name, recipe.preset, recipe.targets, recipe.ranges) == ("mine", "sd3-medium", (), {})
    path.write_text(GOOD + '[ranges]\nbatch = "2"\n')
    assert load_recipe(str(path)).ranges == {"batch": Range(2, 2, 2)}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "missing"),
        (GOOD + 'precison = "bf16"\n', "precison"),
        (GOOD + "[ranges\n", "TOML"),
        (GOOD + 'base = "bf16"\n', "base"),
        (GOOD + '[quantization]\nmlp = "fp8"\n', "quantization"),
        (GOOD.replace("fp16", "fp8") + '[quantization]\nmlp = "fp9"\n', "quantization"),
        (GOOD.replace("fp16", "fp8") + 'base = "fp32"\n', "base"),
        ("\x00", "TOML"),
    ],
)
def test_files_that_are_no_recipes(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    assert says in str(caught.value) and str(path) in caught.value.rule and caught.value.received and caught.value.fix


@pytest.mark.parametrize(
    ("field", "text", "says"),
    [
        ("description", GOOD.replace('"one of mine"', '" "'), "text"),
        ("precision", GOOD.replace('"fp16"', '"fp17"'), "fp32, fp16, bf16"),
        ("precision", GOOD.replace('"fp16"', "16"), "text"),
        ("preset", GOOD.replace("sd3-medium", "sd4"), "sd3.5-large"),
        ("checkpoint", GOOD + 'checkpoint = "a/b/c"\n', "a path that begins with / or ."),
        ("targets", GOOD + 'targets = "ort-cpu"\n', "a list of targets"),
        ("targets", GOOD + "targets = []\n", "a list of targets"),
        ("targets", GOOD + "targets = [1]\n", "a list of targets"),
        ("targets", GOOD + 'targets = ["ort-cpu", "rtx:sm99"]\n', "sm89"),
        ("targets", GOOD + 'targets = [""]\n', "ort-cuda"),
        ("ranges", GOOD + "ranges = 5\n", "a table of ranges"),
        ("ranges", GOOD + '[ranges]\nheight = "1:2:3"\n', "img_tokens"),
        ("ranges", GOOD + "[ranges]\nbatch = 2\n", "MIN:OPT:MAX"),
        ("ranges", GOOD + '[ranges]\nbatch = "4:2:1"\n', "of batch needs 1 ≤ MIN ≤ OPT ≤ MAX"),
        ("profiles", GOOD + 'profiles = "batch=2"\n', "a list of profiles"),
        ("profiles", GOOD + 'profiles = ["foo=1"]\n', "batch, img_tokens, txt_tokens"),
        ("profiles", GOOD + 'profiles = ["batch=4:2:1"]\n', "of batch needs 1 ≤ MIN ≤ OPT ≤ MAX"),
    ],
)
def test_a_wrong_field_is_named_with_the_file_and_an_example_of_toml(
    field: str, text: str, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    error = caught.value
    assert error.rule.startswith(f"{field} in {path}: ") and says in error.rule and error.received
    assert str(error.fix).startswith("e.g. ") and "--" not in str(error)
    example = str(error.fix).removeprefix("e.g. ")
    example = "[ranges]\n" + example.removesuffix(" under [ranges]") if field == "ranges" else example
    lines = "".join(line for line in GOOD.splitlines(True) if not line.startswith(field))
    path.write_text(lines + example + "\n")
    load_recipe(path)


@pytest.mark.parametrize("name", ["sd4-fp16", "", "../export/sd3-medium-fp16", "missing.toml"])
def test_unknown_names_list_the_known(name: str) -> None:
    with pytest.raises(UsageError, match=r"sd3-medium-bf16, sd3-medium-fp16"):
        load_recipe(name)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="TOML"):
        load_recipe(path)
    with pytest.raises(UsageError, match="readable"):
        (tmp_path / "folder.toml").mkdir()
        load_recipe(tmp_path / "folder.toml")


def test_a_recipe_may_split_the_conditioning(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for line, expected in (("", False), ("split_conditioning = true", True), ("split_conditioning = false", False)):
        path.write_text(f"{GOOD}{line}\n")
        assert load_recipe(path).split_conditioning is expected
    path.write_text(f'{GOOD}split_conditioning = "yes"\n')
    with pytest.raises(UsageError, match="true or false"):
        load_recipe(path)
