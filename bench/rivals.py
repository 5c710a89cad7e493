"""What we are measured against: diffusers' own model through torch's own exporter. Nothing of ours is imported here.

As a script it is one rival job in a process of its own: `python bench/rivals.py export --checkpoint DIR --out DIR`.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

INPUTS = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")


class SD3ForExport(nn.Module):
    """diffusers' model with plain arguments and a plain result."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        sample: Tensor = self.model(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            return_dict=False,
        )[0]
        return sample


def sd3(depth: int, heads: int, dtype: torch.dtype, *, qk_norm: bool = True) -> nn.Module:
    """Diffusers' SD3Transformer2DModel with SD3.5's sizes and its own random initialization."""
    from diffusers import SD3Transformer2DModel

    torch.set_default_dtype(dtype)
    model = SD3Transformer2DModel(
        sample_size=128,
        num_layers=depth,
        num_attention_heads=heads,
        attention_head_dim=64,
        joint_attention_dim=4096,
        caption_projection_dim=64 * heads,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
        qk_norm="rms_norm" if qk_norm else None,
    )
    torch.set_default_dtype(torch.float32)
    return model.eval()


def export_plainly(model: nn.Module, dtype: torch.dtype, opset: int = 23, side: int = 32) -> tuple[Any, float]:
    """`torch.onnx.export(dynamo=True)` with dynamic batch and text tokens: the program and the seconds it took.

    Args:
        side: rows and columns of image tokens, which stay static: the model crops its positions by Python integers.
    """
    args = (
        torch.randn(2, 16, 2 * side, 2 * side, dtype=dtype),
        torch.randn(2, 77, 4096, dtype=dtype),
        torch.randn(2, 2048, dtype=dtype),
        torch.tensor([500.0, 250.0]),
    )
    batch, txt = torch.export.Dim("batch"), torch.export.Dim("txt_tokens")
    shapes = ({0: batch}, {0: batch, 1: txt}, {0: batch}, {0: batch})
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        program = torch.onnx.export(
            SD3ForExport(model), args, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False
        )
        return program, time.perf_counter() - start


def save(program: Any, folder: Path) -> int:
    """Save with external data; returns the bytes of the graph alone."""
    folder.mkdir(parents=True, exist_ok=True)
    program.save(folder / "model.onnx", external_data=True)
    return (folder / "model.onnx").stat().st_size


def _main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("job", choices=["export", "graph"])
    p.add_argument("--checkpoint", type=Path, help="export: a diffusers transformer folder, loaded as it is stored")
    p.add_argument("--out", type=Path)
    p.add_argument("--depth", type=int, default=24, help="graph: export only, nothing is written")
    args = p.parse_args()
    start = time.perf_counter()
    size = 0
    if args.job == "export":
        from diffusers import SD3Transformer2DModel

        model = SD3Transformer2DModel.from_pretrained(args.checkpoint, torch_dtype=torch.float16).eval()
        program, graph_seconds = export_plainly(model, torch.float16)
        size = save(program, args.out)
    else:
        _, graph_seconds = export_plainly(sd3(args.depth, 24, torch.float16), torch.float16)
    print(json.dumps({"graph_seconds": graph_seconds, "seconds": time.perf_counter() - start, "model_bytes": size}))


if __name__ == "__main__":
    _main()
