"""From a diffusers `config.json` to a `ModelSpec`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdit_deploy.errors import CheckpointError, SpecError
from mmdit_deploy.spec.model_spec import ModelSpec

# diffusers 0.42, SD3Transformer2DModel.__init__: every field and its default.
SD3_DEFAULTS: Mapping[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (),
    "qk_norm": None,
}
CLASSES = ("SD3Transformer2DModel",)


def spec_from_config(config: Mapping[str, Any], name: str) -> ModelSpec:
    """Read the architecture that a checkpoint declares.

    Args:
        config: the parsed ``config.json``. Fields that begin with ``_`` are diffusers' own bookkeeping.
        name: what to call the model.

    Raises:
        CheckpointError: the class or a field is unknown, or a value is not what this family can have.
    """
    class_name = config.get("_class_name")
    if class_name not in CLASSES:
        raise CheckpointError(
            f"the config's _class_name is one of {', '.join(CLASSES)}",
            received=repr(class_name),
            fix="pass the transformer folder of a Stable Diffusion 3 or 3.5 checkpoint",
        )
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    unknown = sorted(set(fields) - set(SD3_DEFAULTS))
    if unknown:
        raise CheckpointError(
            f"a {class_name} config has the fields {', '.join(SD3_DEFAULTS)}",
            received=f"unknown {', '.join(unknown)}",
            fix="a field that is not understood may change the model: check which diffusers version wrote it",
        )
    c = {**SD3_DEFAULTS, **fields}
    for key in set(SD3_DEFAULTS) - {"qk_norm", "dual_attention_layers", "out_channels"}:
        if isinstance(c[key], bool) or not isinstance(c[key], int) or c[key] < 1:
            raise CheckpointError(
                f"{key} is a whole number of at least 1", received=repr(c[key]), fix="repair config.json"
            )
    if c["qk_norm"] not in (None, "rms_norm"):
        raise CheckpointError(
            "qk_norm is null or 'rms_norm'", received=repr(c["qk_norm"]), fix="this norm is not supported"
        )
    layers = c["dual_attention_layers"]
    if not isinstance(layers, list | tuple) or not all(isinstance(i, int) for i in layers):
        raise CheckpointError(
            "dual_attention_layers is a list of block indices",
            received=repr(layers),
            fix="repair config.json",
        )
    width = c["num_attention_heads"] * c["attention_head_dim"]
    if c["caption_projection_dim"] != width:
        raise CheckpointError(
            "caption_projection_dim equals num_attention_heads * attention_head_dim: both streams have one width",
            received=f"{c['caption_projection_dim']} and {width}",
            fix="repair config.json",
        )
    try:
        return ModelSpec(
            name=name,
            depth=c["num_layers"],
            num_heads=c["num_attention_heads"],
            head_dim=c["attention_head_dim"],
            latent_channels=c["in_channels"],
            out_channels=c["out_channels"] if c["out_channels"] is not None else c["in_channels"],
            patch_size=c["patch_size"],
            txt_dim=c["joint_attention_dim"],
            pooled_dim=c["pooled_projection_dim"],
            qk_norm=c["qk_norm"] == "rms_norm",
            dual_attention_blocks=tuple(layers),
            pos_max_size=c["pos_embed_max_size"],
            pos_base_size=c["sample_size"] // c["patch_size"],
        )
    except SpecError as error:
        raise CheckpointError(f"config.json: {error.rule}", received=error.received, fix=error.fix) from error
