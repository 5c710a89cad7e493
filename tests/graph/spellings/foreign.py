"""Models that are no MMDiTs: a residual network, a BERT, and a Llama with a cache of keys and values.

    python tests/graph/spellings/foreign.py

writes tests/graph/fixtures/foreign: each through a few exporters, with its few weights, packed.
"""

from __future__ import annotations

import gzip
import json
import logging
import warnings

import torch
from case import Case
from make import EXPORTERS, FIXTURES, bare
from torch import Tensor, nn
from transformers import BertConfig, BertModel, DynamicCache, LlamaConfig, LlamaForCausalLM

FOLDER = FIXTURES / "foreign"
LAYERS, HEADS, KEYS, WIDTH = 2, 4, 2, 4


class Block(nn.Module):
    """Two convolutions, each with a batch norm, and a way around them."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        wide = channels * stride
        self.conv1 = nn.Conv2d(channels, wide, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(wide), nn.BatchNorm2d(wide)
        self.around = nn.Conv2d(channels, wide, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C · stride, H / stride, W / stride]."""
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + self.around(x)).relu()


class ResNet(nn.Module):
    """He et al. 2015, arXiv:1512.03385, but small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 5, 2, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(Block(4, 1), Block(4, 2))
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, 5]."""
        x = self.blocks(self.stem(image))
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


class Bert(nn.Module):
    """Token ids and a mask in, hidden states and a pooled vector out."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=11, hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=24, attn_implementation="eager",
        )  # fmt: skip
        self.model = BertModel(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Call the model."""
        out = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return out.last_hidden_state, out.pooler_output


class Llama(nn.Module):
    """One step with a cache: tokens and what came before in, logits and the longer cache out."""

    def __init__(self) -> None:
        super().__init__()
        self.config = LlamaConfig(
            vocab_size=11, hidden_size=HEADS * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=KEYS, head_dim=WIDTH, intermediate_size=24, max_position_embeddings=64,
            attn_implementation="eager",
        )  # fmt: skip
        self.model = LlamaForCausalLM(self.config)

    def forward(self, input_ids: Tensor, past_keys: Tensor, past_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids [B, N], keys and values [L, B, H, P, D]."""
        cache = DynamicCache(config=self.config)
        for i in range(LAYERS):
            cache.update(past_keys[i], past_values[i], i)
        out = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        layers = out.past_key_values.layers
        return out.logits, torch.stack([x.keys for x in layers]), torch.stack([x.values for x in layers])


def _randomized(module: nn.Module) -> nn.Module:
    """With norms that do something: they begin as ones and zeros."""
    generator = torch.Generator().manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.data = 0.5 + torch.rand(tensor.shape, generator=generator)
    return module.eval()


def cases() -> list[tuple[Case, tuple[tuple[str, int], ...]]]:
    """Each model, and what exports it at which opset."""
    ids = torch.arange(2 * 5).reshape(2, 5) % 11
    past = torch.arange(LAYERS * 2 * KEYS * 3 * WIDTH, dtype=torch.float32).reshape(LAYERS, 2, KEYS, 3, WIDTH) / 50 - 1
    tokens = {0: "batch", 1: "tokens"}
    cache = {1: "batch", 3: "past"}
    resnet = Case("resnet", _randomized(ResNet()), {"image": torch.ones(2, 3, 24, 16)}, {"image": {0: "batch"}}, {})
    read = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    bert = Case("bert", _randomized(Bert()), read, {"input_ids": tokens, "attention_mask": tokens}, {})
    step = {"input_ids": ids, "past_keys": past, "past_values": past.flip(0)}
    axes = {"input_ids": tokens, "past_keys": cache, "past_values": cache}
    llama = Case("llama", _randomized(Llama()), step, axes, {})
    return [
        (resnet, (("dynamo", 18), ("torchscript", 14))),
        (bert, (("dynamo", 18), ("torchscript", 14))),
        (llama, (("dynamo", 18), ("torchscript", 17))),
    ]


def main() -> None:
    """Write the folder anew."""
    for logger in ("torch.onnx", "onnxscript", "transformers"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for file in FOLDER.glob("*"):
        file.unlink()
    files = {}
    for case, ways in cases():
        for exporter, opset in ways:
            model = bare(EXPORTERS[exporter](case, opset))
            file = f"{case.name}.{exporter}-{opset}.onnx.gz"
            # level and time are fixed, so that the same model is the same file
            (FOLDER / file).write_bytes(gzip.compress(model.SerializeToString(deterministic=True), 9, mtime=0))
            files[file] = {"written_by": f"{exporter} {opset}", "nodes": len(model.graph.node)}
            print(file, (FOLDER / file).stat().st_size, len(model.graph.node))
    document = {"torch": torch.__version__.split("+")[0], "files": files}
    (FOLDER / "index.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
