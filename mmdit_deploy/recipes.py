"""Recipes: what to export, as data. One TOML file per model and precision; ours lie in ``export/``."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmdit_deploy.build import parse_target
from mmdit_deploy.contract import AXES, Profile, Range, parse_profile
from mmdit_deploy.errors import UsageError
from mmdit_deploy.families import preset
from mmdit_deploy.precision.recipe import QuantizationRecipe
from mmdit_deploy.spec import precision

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SUFFIX = ".toml"
_MAX_BYTES = 2**20  # a recipe takes some hundred bytes
_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Recipe:
    """What to export.

    Args:
        name: the file's name without its suffix, e.g. ``sd3-medium-fp16``.
        description: what it is for, in a line.
        preset: the architecture, as `mmdit_deploy.families.preset` knows it.
        checkpoint: a folder or file to export, or the name of the published one on the Hugging Face hub.
        precision: as `mmdit_deploy.spec.precision` knows it.
        base: the compute type of what is not quantized; None for the precision's own.
        quantization: what is quantized, by role, where it is not the precision's own: see
            `mmdit_deploy.precision.recipe`.
        targets: engines to build, e.g. ``("ort-cpu",)``; empty for the defaults of the machine.
        ranges: by axis; the contract's defaults where not given.
        profiles: TensorRT's optimization profiles; one of the ranges where not given.
        split_conditioning: the modulation of a schedule is made by a graph and an engine of their own.
    """

    name: str
    description: str
    preset: str
    precision: str
    base: str | None = None
    quantization: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Path | str | None = None
    targets: tuple[str, ...] = ()
    ranges: Mapping[str, Range] = field(default_factory=dict)
    profiles: tuple[Profile, ...] = ()
    split_conditioning: bool = False


def recipe_names() -> tuple[str, ...]:
    """The shipped recipes, sorted."""
    return tuple(sorted(path.stem for path in _folder().glob(f"*{_SUFFIX}")))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe.

    Args:
        name_or_path: a shipped recipe's name, or a file that ends in ``.toml``.

    Returns:
        The recipe; its preset and precision exist, its ranges are ordered.

    Raises:
        UsageError: there is no such recipe, it is not TOML, or a key or value is not one that recipes have.
    """
    path = Path(name_or_path)
    if path.suffix != _SUFFIX:
        if str(name_or_path) not in recipe_names():
            raise UsageError(
                "a recipe is a file that ends in .toml, or a shipped one",
                received=repr(str(name_or_path)),
                fix=f"name one of {', '.join(recipe_names())}",
            )
        path = _folder() / f"{name_or_path}{_SUFFIX}"
    return _recipe(path, _read(path))


def _folder() -> Path:
    """Where the shipped recipes lie: in the package when installed, beside it in a checkout."""
    installed = _PACKAGE / "recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "export"


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(
            "a recipe must be a readable file",
            received=f"{path} ({error.strerror})",
            fix=f"check the path, or name one of {', '.join(recipe_names())}",
        ) from error
    if len(content) > _MAX_BYTES:
        raise UsageError(
            f"a recipe has at most {_MAX_BYTES} bytes",
            received=f"{path}, which has more",
            fix="check that it is the right file",
        )
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # TOML's and UTF-8's errors are ValueErrors
        raise UsageError(
            f"{path} must be a TOML file",
            received=f"{type(error).__name__}: {error}",
            fix="the shipped recipes are examples: " + ", ".join(recipe_names()),
        ) from error


def _recipe(path: Path, data: Mapping[str, Any]) -> Recipe:
    unknown, missing = sorted(set(data) - set(_FIELDS)), sorted(_REQUIRED - set(data))
    if unknown or missing:
        raise UsageError(
            f"the keys of {path} are {', '.join(_FIELDS)}",
            received=f"unknown {unknown!a}, missing {missing!a}",
            fix=f"correct them; required are {', '.join(sorted(_REQUIRED))}",
        )
    values = {key: _read_field(key, data[key], path) for key in _FIELDS if key in data}
    _check_precision(values, path)
    if isinstance(values.get("checkpoint"), Path):
        values["checkpoint"] = path.parent / values["checkpoint"]
    return Recipe(path.stem, **values)


def _check_precision(values: Mapping[str, Any], path: Path) -> None:
    """Whether base and quantization go with the precision."""
    field = "base"
    try:
        precision(values["precision"], values.get("base"))
        field = "quantization"
        if values.get("quantization"):
            QuantizationRecipe.parse(values["quantization"], values["precision"])
    except UsageError as error:
        raise UsageError(f"{field} in {path}: {error.rule}", received=error.received, fix=error.fix) from error


def _read_field(key: str, value: Any, path: Path) -> Any:
    """One value; what is wrong with it is said of the field and the file, whoever found it."""
    read, example = _FIELDS[key]
    try:
        return read(value)
    except UsageError as error:
        raise UsageError(
            f"{key} in {path}: {error.rule}", received=ascii(value)[:120], fix=f"e.g. {example}"
        ) from error


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UsageError("it is a text")
    return value


def _preset(value: Any) -> str:
    return preset(_text(value)).name


def _checkpoint(value: Any) -> Path | str:
    """A path begins with a slash or a dot, and is relative to the recipe; anything else is a name on the hub."""
    text = _text(value)
    if text.startswith(("/", ".")):
        return Path(text)
    if not HUB_NAME.fullmatch(text):
        raise UsageError("it is a path that begins with / or ., or a name on the hub")
    return text


def _precision(value: Any) -> str:
    return precision(_text(value)).name


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError("it is a table")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError("it is true or false")
    return value


def _targets(value: Any) -> tuple[str, ...]:
    names = _texts(value, "a list of targets")
    for name in names:
        parse_target(name)
    return names


def _ranges(value: Any) -> dict[str, Range]:
    if not isinstance(value, dict) or not set(value) <= set(AXES):
        raise UsageError(f"it is a table of ranges, for some of the axes {', '.join(AXES)}")
    if not all(isinstance(text, str) for text in value.values()):
        raise UsageError("each of its ranges is a text MIN:OPT:MAX")
    return {axis: Range.parse(axis, text) for axis, text in value.items()}


def _profiles(value: Any) -> tuple[Profile, ...]:
    return tuple(map(parse_profile, _texts(value, "a list of profiles")))


def _texts(value: Any, what: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise UsageError(f"it is {what}, each a text")
    return tuple(value)


# What a recipe may say, in the order of `Recipe`: how each is read, and an example of its line.
_FIELDS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "description": (_text, 'description = "FLUX.1-dev at 1024 pixels"'),
    "preset": (_preset, 'preset = "sd3-medium"'),
    "checkpoint": (_checkpoint, 'checkpoint = "black-forest-labs/FLUX.1-dev"'),
    "precision": (_precision, 'precision = "fp16"'),
    "base": (_text, 'base = "bf16"'),
    "quantization": (_table, 'mlp = "fp8" under [quantization]'),
    "targets": (_targets, 'targets = ["ort-cpu", "rtx:sm89"]'),
    "ranges": (_ranges, 'batch = "1:2:4" under [ranges]'),
    "profiles": (_profiles, 'profiles = ["batch=2,img_tokens=1024:4096:4096"]'),
    "split_conditioning": (_flag, "split_conditioning = true"),
}
_REQUIRED = {"description", "preset", "precision"}
