"""Tiny whole models of diffusers' classes, and the fixtures that others' exporters write of them.

    python tests/graph/spellings/whole_models.py

writes tests/graph/fixtures/models: each class through a sample of exporters and opsets, without weights. (optimum.py
beside this file writes optimum's, in an environment of its own.)
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from case import Case
from make import EXPORTERS, bare
from torch import Tensor, nn
from torch_calls import count_calls
from without_weights import strip, write

B, TXT, HEIGHT, WIDTH = 2, 7, 8, 12  # of SD3's latents
ROWS, COLS = 3, 5  # of the others' image tokens
_SMALL = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24}
_SD3 = {
    **_SMALL,
    "sample_size": 16,
    "in_channels": 4,
    "num_layers": 2,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "out_channels": 4,
    "pos_embed_max_size": 12,
}
_FLUX = {**_SMALL, "in_channels": 12, "num_layers": 2, "num_single_layers": 1}
_QWEN = {**_SMALL, "in_channels": 12, "out_channels": 3, "num_layers": 2, "axes_dims_rope": (4, 6, 6)}
_LAST_TEXT_MLP = {"LayerNormalization": 1, "Gelu": 1}  # of Qwen-Image: its last block makes text that nothing reads


class SD3(nn.Module):
    """Stable Diffusion 3 and 3.5: latents in, latents out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor
    ) -> Tensor:
        """Call the model."""
        inputs = (hidden_states, encoder_hidden_states, pooled_projections, timestep)
        return self.model(*inputs, return_dict=False)[0]


class Flux1(nn.Module):
    """FLUX.1: positions are inputs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor,
    ) -> Tensor:
        """Call the model."""
        inputs = (hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance)
        return self.model(*inputs, return_dict=False)[0]


class Flux2(nn.Module):
    """FLUX.2: as FLUX.1, without a pooled vector."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor,
    ) -> Tensor:
        """Call the model."""
        inputs = (hidden_states, encoder_hidden_states, timestep, img_ids, txt_ids, guidance)
        return self.model(*inputs, return_dict=False)[0]


class QwenImage(nn.Module):
    """Qwen-Image: the image's size is a Python argument, so it is baked into what exporters write.

    Args:
        real: compute RoPE in real numbers, as all who export this class must: no exporter takes complex ones.
    """

    def __init__(self, model: Any, *, real: bool = False):
        super().__init__()
        self.model, self.real = model, real
        text = model.pos_embed([[(1, ROWS, COLS)]], max_txt_seq_len=2)[1].angle()
        self.register_buffer("first", text[0])
        self.register_buffer("step", text[1] - text[0])
        self.register_buffer("img", torch.view_as_real(model.pos_embed([[(1, ROWS, COLS)]], max_txt_seq_len=2)[0]))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        """Call the model."""
        return self.call(hidden_states, encoder_hidden_states, None, timestep)

    def call(self, *inputs: Tensor | None) -> Tensor:
        """Call the model with a mask, or without."""
        from diffusers.models.transformers import transformer_qwenimage

        with contextlib.ExitStack() as stack:
            if self.real:
                stack.enter_context(mock.patch.object(transformer_qwenimage, "apply_rotary_emb_qwen", _real_rope))
                stack.enter_context(mock.patch.object(self.model.pos_embed, "forward", self._frequencies))
            return self.model(*inputs, img_shapes=[[(1, ROWS, COLS)]] * B, return_dict=False)[0]

    def _frequencies(self, _: Any, *, max_txt_seq_len: Any, device: Any) -> tuple[Tensor, Tensor]:
        angles = self.first + torch.arange(max_txt_seq_len)[:, None] * self.step
        return self.img, torch.stack([angles.cos(), angles.sin()], dim=-1)


class QwenImageMasked(QwenImage):
    """Qwen-Image with a mask of text: the text's length is baked in too."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        """Call the model."""
        return self.call(hidden_states, encoder_hidden_states, encoder_hidden_states_mask, timestep)


def _real_rope(x: Tensor, frequencies: Tensor, use_real: bool = False) -> Tensor:
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = frequencies.unsqueeze(1).unbind(-1)
    turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return turned.flatten(3).type_as(x)


@dataclass(frozen=True)
class Tiny:
    """A tiny model of one of diffusers' classes.

    Args:
        stands_for: the published models of this structure.
        wrapper: gives it plain arguments.
        shapes: of the inputs: numbers, and dynamic axes by name.
        exportable: the wrapper that computes the same with what exporters can write, where `wrapper` is not.
        unread: calls whose result nothing reads, so that no exporter writes them.
        baked_by: exporters that write the exported sizes into the graph, whatever is said of its axes.
    """

    stands_for: str
    class_name: str
    wrapper: Callable[[nn.Module], nn.Module]
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int | str, ...]]
    exportable: Callable[[nn.Module], nn.Module] | None = None
    unread: Mapping[str, int] = field(default_factory=dict)
    baked_by: tuple[str, ...] = ()

    def case(self, name: str, exporter: str) -> Case:
        """With weights, inputs, and what PyTorch calls to an end. Gates and modulations are not zero."""
        import diffusers

        torch.manual_seed(0)
        model = getattr(diffusers, self.class_name)(**self.config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms begin as ones, biases as zeros
                parameter.add_(torch.randn_like(parameter) / 5)
        inputs = {n: _input(n, [SIZES.get(d, d) for d in shape]) for n, shape in self.shapes.items()}
        axes = {n: {i: d for i, d in enumerate(shape) if isinstance(d, str)} for n, shape in self.shapes.items()}
        if exporter in self.baked_by:
            axes = {}
        module = self.wrapper(model)
        expected, calls = module(*inputs.values()), count_calls(module, inputs)
        if self.exportable is not None:
            module = self.exportable(model)
        if exporter == "torchscript":
            _norms_of_diffusers(model)
        torch.testing.assert_close(module(*inputs.values()), expected)
        return Case(name, module, inputs, axes, {op: n - self.unread.get(op, 0) for op, n in calls.items()})


def _norms_of_diffusers(model: nn.Module) -> None:
    """In place of PyTorch's RMS norm, which the TorchScript exporter does not know."""
    from diffusers.models.normalization import RMSNorm

    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.RMSNorm):
                eps = torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps
                own = RMSNorm(tuple(norm.normalized_shape), eps)
                own.weight = norm.weight
                setattr(parent, name, own)


SIZES: Mapping[Any, int] = {
    "batch": B, "txt_tokens": TXT, "img_tokens": ROWS * COLS, "height": HEIGHT, "width": WIDTH
}  # fmt: skip


def _input(name: str, shape: list[int]) -> Tensor:
    if name == "timestep":
        return torch.arange(1, shape[0] + 1) / 4
    if name == "guidance":
        return torch.arange(1, shape[0] + 1) + 2.5
    if name.endswith("_ids"):
        return torch.randint(0, 9, shape).float()
    if name.endswith("_mask"):
        return torch.arange(shape[0] * shape[1]).reshape(shape) % 5 > 0
    return torch.randn(shape)


def _sd3(height: int | str, width: int | str) -> dict[str, tuple[int | str, ...]]:
    return {
        "hidden_states": ("batch", 4, height, width),
        "encoder_hidden_states": ("batch", "txt_tokens", 24),
        "pooled_projections": ("batch", 20),
        "timestep": ("batch",),
    }


def _flux(axes: int, *, pooled: bool) -> dict[str, tuple[int | str, ...]]:
    return {
        "hidden_states": ("batch", "img_tokens", 12),
        "encoder_hidden_states": ("batch", "txt_tokens", 24),
        **({"pooled_projections": ("batch", 20)} if pooled else {}),
        "timestep": ("batch",),
        "img_ids": ("img_tokens", axes),
        "txt_ids": ("txt_tokens", axes),
        "guidance": ("batch",),
    }


TINY: Mapping[str, Tiny] = {
    "sd3": Tiny("Stable Diffusion 3 Medium", "SD3Transformer2DModel", SD3, _SD3, _sd3(HEIGHT, WIDTH)),
    "sd3.5": Tiny(
        "Stable Diffusion 3.5 Large",
        "SD3Transformer2DModel",
        SD3,
        {**_SD3, "qk_norm": "rms_norm"},
        _sd3(HEIGHT, WIDTH),
    ),
    "sd3.5-medium": Tiny(
        "Stable Diffusion 3.5 Medium",
        "SD3Transformer2DModel",
        SD3,
        {**_SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0,)},
        _sd3(HEIGHT, WIDTH),
    ),
    "flux1": Tiny(
        "FLUX.1 [dev]",
        "FluxTransformer2DModel",
        Flux1,
        {**_FLUX, "pooled_projection_dim": 20, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True},
        _flux(3, pooled=True),
        baked_by=("torchscript",),
    ),
    "flux2": Tiny(
        "FLUX.2 [dev]",
        "Flux2Transformer2DModel",
        Flux2,
        {**_FLUX, "axes_dims_rope": (4, 4, 4, 4)},
        _flux(4, pooled=False),
        baked_by=("torchscript",),
    ),
    "qwen-image": Tiny(
        "Qwen-Image",
        "QwenImageTransformer2DModel",
        QwenImage,
        _QWEN,
        {
            "hidden_states": ("batch", ROWS * COLS, 12),
            "encoder_hidden_states": ("batch", "txt_tokens", 24),
            "timestep": ("batch",),
        },
        partial(QwenImage, real=True),
        _LAST_TEXT_MLP,
    ),
    "qwen-image-masked": Tiny(
        "Qwen-Image, text masked",
        "QwenImageTransformer2DModel",
        QwenImageMasked,
        _QWEN,
        {
            "hidden_states": ("batch", ROWS * COLS, 12),
            "encoder_hidden_states": ("batch", TXT, 24),
            "encoder_hidden_states_mask": ("batch", TXT),
            "timestep": ("batch",),
        },
        partial(QwenImageMasked, real=True),
        _LAST_TEXT_MLP,
    ),
}

# A sample of what others' exporters write, as fixtures; bench/fusion_coverage.py goes through more.
FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "models"
SAMPLE: Sequence[tuple[str, str, int]] = (
    ("sd3", "torchscript", 17),
    ("sd3.5", "torchscript", 20),
    ("sd3.5", "dynamo", 20),
    ("sd3.5-medium", "torchscript", 14),
    ("sd3.5-medium", "dynamo", 18),
    ("flux1", "torchscript", 17),
    ("flux1", "dynamo", 18),
    ("flux1", "dynamo", 23),
    ("flux2", "torchscript", 14),
    ("flux2", "dynamo", 20),
    ("qwen-image", "torchscript", 17),
    ("qwen-image", "dynamo", 18),
    ("qwen-image-masked", "torchscript", 20),
    ("qwen-image-masked", "dynamo", 18),
)
# Of the environment in which optimum.py was run.
OPTIMUM_VERSIONS = {
    "torch": "2.13.0", "optimum": "2.1.0", "optimum-onnx": "0.1.0", "diffusers": "0.39.0", "transformers": "4.57.6"
}  # fmt: skip
OPTIMUM: Sequence[tuple[str, str, int]] = (
    ("sd3.5-medium", "optimum", 14),
    ("flux1", "optimum", 17),
)
# What is run: other sizes than what was exported. optimum has names of its own.
RUN_SIZES: Mapping[Any, int] = {
    "batch": 3, "batch_size": 3, "step": 3, "txt_tokens": 9, "sequence_length": 9, "img_tokens": 11,
    "packed_height_width": 11, "height": 12, "width": 16,
}  # fmt: skip


def run_inputs(shapes: Mapping[str, Sequence[int | str]]) -> dict[str, np.ndarray]:
    """Inputs for a graph.

    Args:
        shapes: of its inputs, by name.
    """
    torch.manual_seed(1)
    return {name: _input(name, [RUN_SIZES.get(d, d) for d in shape]).numpy() for name, shape in shapes.items()}


def file_name(name: str, exporter: str, opset: int) -> str:
    """Of a fixture."""
    return f"{name}.{exporter}-{opset}.onnx.gz"


def main() -> None:
    """Write the sample, and the index with the calls of each."""
    for logger in ("torch.onnx", "onnxscript"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    FIXTURES.mkdir(exist_ok=True)
    index = {}
    for name, exporter, opset in (*SAMPLE, *OPTIMUM):
        case = TINY[name].case(name, exporter)
        index[file_name(name, exporter, opset)] = {"class": TINY[name].class_name, "calls": case.expect}
        if exporter in EXPORTERS:
            model = strip(bare(EXPORTERS[exporter](case, opset)))
            write(model, FIXTURES / file_name(name, exporter, opset))
    versions = {name: version(name) for name in ("torch", "diffusers", "onnxscript")}
    document = {"exported_with": versions, "optimum": OPTIMUM_VERSIONS, "sizes": RUN_SIZES, "files": index}
    (FIXTURES / "index.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
