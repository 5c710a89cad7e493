"""What FLUX.1 and FLUX.2 call alike."""

from __future__ import annotations

from typing import Any

from mmdit_deploy.families.family import Keys, Shapes, blocks_of, joint_attention, mlp

SINGLE = "single_transformer_blocks.*"


def embedder(path: str, diffusers: str, original: str) -> tuple[Keys, Keys]:
    """The two layers of an embedder of the timestep, the guidance or the pooled text."""
    return (
        Keys(f"{path}.up", (f"{diffusers}.linear_1",), f"{original}.in_layer"),
        Keys(f"{path}.down", (f"{diffusers}.linear_2",), f"{original}.out_layer"),
    )


def streams_and_head(mlp_layers: tuple[str, str]) -> tuple[Keys, ...]:
    """Embedders of both streams, joint attentions and MLPs, single blocks, the head.

    Args:
        mlp_layers: diffusers' names of the layers of an MLP.
    """
    img, txt = "double_blocks.*.img", "double_blocks.*.txt"
    norms = ("norm.query_norm", "norm.key_norm")
    up, down = mlp_layers
    return (
        Keys("img_embed.proj", ("x_embedder",), "img_in"),
        Keys("txt_embed.proj", ("context_embedder",), "txt_in"),
        *joint_attention("img", f"{img}_attn", norms, scale=True),
        *mlp("img", (f"ff.{up}", f"ff.{down}"), (f"{img}_mlp.0", f"{img}_mlp.2")),
        *joint_attention("txt", f"{txt}_attn", norms, scale=True),
        *mlp("txt", (f"ff_context.{up}", f"ff_context.{down}"), (f"{txt}_mlp.0", f"{txt}_mlp.2")),
        Keys("single_blocks.*.norm_q", (f"{SINGLE}.attn.norm_q",), "single_blocks.*.norm.query_norm", scale=True),
        Keys("single_blocks.*.norm_k", (f"{SINGLE}.attn.norm_k",), "single_blocks.*.norm.key_norm", scale=True),
        Keys("final_modulation.proj", ("norm_out.linear",), "final_layer.adaLN_modulation.1", swapped="always"),
        Keys("final.proj", ("proj_out",), "final_layer.linear"),
    )


def infer_sizes(shapes: Shapes) -> dict[str, Any]:
    """What tensors say about the config, in both."""
    width, in_channels = shapes["x_embedder.weight"]
    (head_dim,) = shapes["transformer_blocks.0.attn.norm_q.weight"]
    out_channels = shapes["proj_out.weight"][0]
    return dict(
        in_channels=in_channels,
        out_channels=None if out_channels == in_channels else out_channels,
        num_layers=blocks_of(shapes, "transformer_blocks"),
        num_single_layers=blocks_of(shapes, "single_transformer_blocks"),
        attention_head_dim=head_dim,
        num_attention_heads=width // head_dim,
        joint_attention_dim=shapes["context_embedder.weight"][1],
    )
