"""Makes checkpoints of every family with random, non-degenerate weights, at any size, in the layouts of real ones.

    python bench/make_checkpoint.py --config sd3-medium --dtype fp16 OUT
    python bench/make_checkpoint.py --config flux1-dev --layout original OUT.safetensors

Tiny folders are loaded into diffusers' own class and saved by its `save_pretrained`. Large models do not fit into
memory twice: the class is built on the meta device, which tells keys and shapes, and the weights are drawn and
written one at a time. Every way and layout gives the same values for the same seed. Modulation weights are not zero,
as they are in an untrained model: there every block is the identity, and any two implementations agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from checkpoint_configs import CONFIGS

from mmdit_deploy.checkpoint import plan_layout, random_tensor, weight_statistics, write_safetensors
from mmdit_deploy.checkpoint.key_tables import KeyLayout
from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.checkpoint.original_layout import stored_parts, to_original
from mmdit_deploy.families import spec_from_config

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
POSITION_TABLE = "pos_embed.pos_embed"  # a computed buffer, stored in every SD3 checkpoint
WEIGHTS = "diffusion_pytorch_model"
PIPELINES = {
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
    "Flux2Transformer2DModel": "Flux2Pipeline",
    "QwenImageTransformer2DModel": "QwenImagePipeline",
}


def position_table(config: dict[str, Any]) -> torch.Tensor:
    """The table of position embeddings as diffusers computes it, [1, max_size², width] in fp32."""
    from diffusers.models.embeddings import PatchEmbed

    patch_embed: Any = PatchEmbed
    embed = patch_embed(
        height=config["sample_size"],
        width=config["sample_size"],
        patch_size=config["patch_size"],
        in_channels=config["in_channels"],
        embed_dim=config["num_attention_heads"] * config["attention_head_dim"],
        pos_embed_max_size=config["pos_embed_max_size"],
    )
    table = embed.pos_embed
    assert isinstance(table, torch.Tensor)
    return table


def draw(key: str, shape: tuple[int, ...], config: dict[str, Any], seed: int, dtype: torch.dtype) -> torch.Tensor:
    """One tensor of the checkpoint."""
    if key == POSITION_TABLE:
        return position_table(config).to(dtype)
    mean, std = weight_statistics(key, shape)
    return random_tensor(seed, key, shape, mean=mean, std=std, dtype=dtype)


def split(shapes: dict[str, tuple[int, ...]], itemsize: int, limit: float) -> list[list[str]]:
    """Cuts the keys, in order, into shards of at most `limit` bytes; a larger tensor has its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for key, shape in shapes.items():
        nbytes = torch.Size(shape).numel() * itemsize
        if shards[-1] and used + nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(key)
        used += nbytes
    return shards


def meta_model(config: dict[str, Any]) -> Any:
    """The diffusers model of a config, without weights."""
    with torch.device("meta"):
        return build(config)


def build(config: dict[str, Any]) -> Any:
    """The diffusers model of a config, with diffusers' own initial weights."""
    model: Any = getattr(diffusers, config["_class_name"])
    return model(**{name: value for name, value in config.items() if not name.startswith("_")})


def stream_weights(model: Any, folder: Path, seed: int, dtype: torch.dtype, shard_bytes: float) -> int:
    """Writes the weight files of a model that has no weights, tensor by tensor.

    Args:
        model: on the meta device.
        folder: where; it exists.
        seed: of the weights.
        dtype: of all tensors.
        shard_bytes: the most bytes of one file.

    Returns:
        The bytes written.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    config = dict(model.config)
    shards = split(shapes, dtype.itemsize, shard_bytes)
    weight_map: dict[str, str] = {}
    written = 0
    for number, keys in enumerate(shards, start=1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        name = f"{WEIGHTS}{suffix}.safetensors"
        layout = plan_layout([(key, dtype, shapes[key]) for key in keys], {"format": "pt"})

        def tensors(keys: list[str] = keys) -> Iterator[tuple[str, torch.Tensor]]:
            for key in keys:
                yield key, draw(key, shapes[key], config, seed, dtype)

        written += write_safetensors(folder / name, layout, tensors()).size
        weight_map.update(dict.fromkeys(keys, name))
    if len(shards) > 1:
        total = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return written


def save_with_diffusers(config: dict[str, Any], folder: Path, seed: int, dtype: torch.dtype, shard_bytes: float) -> int:
    """Writes config and weights with diffusers' `save_pretrained`; returns the bytes of the weight files."""
    model = build(config)
    state = {
        key: draw(key, tuple(tensor.shape), dict(model.config), seed, dtype)
        for key, tensor in model.state_dict().items()
    }
    model.load_state_dict(state)
    torch.nn.Module.to(model, dtype)  # not diffusers' override, which warns about modules that are not there
    model.save_pretrained(folder, max_shard_size=int(shard_bytes))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def make_checkpoint(
    config: dict[str, Any],
    out: Path,
    *,
    dtype: torch.dtype,
    seed: int = 0,
    shard_bytes: float = float(2**62),
    pipeline: bool = False,
    stream: bool = True,
) -> int:
    """Makes a diffusers folder.

    Args:
        config: ``_class_name`` of the diffusers class, and its arguments.
        out: the new folder.
        dtype: of all tensors.
        seed: of the weights.
        shard_bytes: the most bytes of one weight file.
        pipeline: wrap it in a pipeline folder (with the transformer only).
        stream: write tensor by tensor, with two tensors or so in memory; else through `save_pretrained`.

    Returns:
        The bytes of weights written.
    """
    folder = out / "transformer" if pipeline else out
    folder.mkdir(parents=True)
    if pipeline:
        index = {
            "_class_name": PIPELINES[config["_class_name"]],
            "_diffusers_version": diffusers.__version__,
            "transformer": ["diffusers", config["_class_name"]],
        }
        (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    if not stream:
        return save_with_diffusers(config, folder, seed, dtype, shard_bytes)
    model = meta_model(config)
    model.save_config(folder)
    return stream_weights(model, folder, seed, dtype, shard_bytes)


def make_file(
    config: dict[str, Any], out: Path, *, layout: KeyLayout, dtype: torch.dtype, seed: int = 0, prefix: str = ""
) -> int:
    """Makes one safetensors file, tensor by tensor, with one parameter's weights in memory.

    Args:
        config: ``_class_name`` of the diffusers class, and its arguments.
        out: the new file.
        layout: ``original`` is the authors' own.
        dtype: of all tensors.
        seed: of the weights.
        prefix: of all keys, e.g. ``model.diffusion_model.``.

    Returns:
        The bytes written.
    """
    spec = spec_from_config(config, out.stem)
    spec = dataclasses.replace(spec, pos_table=True) if spec.pos_max_size else spec
    stored = [(p, stored_parts(p, layout)) for p in parameters(spec)]
    plan = plan_layout([(prefix + part.key, dtype, part.shape) for _, parts in stored for part in parts])

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for parameter, parts in stored:
            drawn = tuple(draw(part.key, part.shape, config, seed, dtype) for part in parameter.parts)
            held = to_original(parameter, drawn) if layout == "original" else drawn
            yield from zip((prefix + part.key for part in parts), held, strict=True)

    return write_safetensors(out, plan, tensors()).size


def main(arguments: list[str] | None = None) -> int:
    """The command line; prints one line of JSON."""
    parser = argparse.ArgumentParser(description="Make a checkpoint with random weights.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", choices=CONFIGS, help="a known configuration")
    which.add_argument("--config-json", type=Path, help="a diffusers config.json, with its _class_name")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--layout", choices=("diffusers", "original"), default="diffusers", help="of a file's keys")
    parser.add_argument("--prefix", default="", help="of a file's keys, e.g. model.diffusion_model.")
    parser.add_argument("--shards-gb", type=float, default=2**32, help="the most GB (10^9 bytes) of a folder's files")
    parser.add_argument("--pipeline", action="store_true", help="wrap it in a pipeline folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("out", type=Path, help="the new diffusers folder, or the new .safetensors file")
    args = parser.parse_args(arguments)
    if args.out.exists():
        parser.error(f"{args.out} exists already")
    file = args.out.suffix == ".safetensors"
    if not file and (args.layout == "original" or args.prefix):
        parser.error("only a file has a layout or a prefix: name OUT.safetensors")
    config = CONFIGS[args.config] if args.config else json.loads(args.config_json.read_text())
    start = time.perf_counter()
    if file:
        written = make_file(
            config, args.out, layout=args.layout, dtype=DTYPES[args.dtype], seed=args.seed, prefix=args.prefix
        )
    else:
        written = make_checkpoint(
            config,
            args.out,
            dtype=DTYPES[args.dtype],
            seed=args.seed,
            shard_bytes=args.shards_gb * 1e9,
            pipeline=args.pipeline,
            stream=not (args.config or "").startswith("tiny"),
        )
    seconds = round(time.perf_counter() - start, 2)
    print(json.dumps({"path": str(args.out), "weight_bytes": written, "seconds": seconds, "weights": "random"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
