"""PEFT trains and saves; its own merge is the judge of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit_deploy.errors import CheckpointError
from mmdit_deploy.lora import open_lora

peft = pytest.importorskip("peft")

# The usual recipe for fine-tuning an MMDiT that edits images (Qwen-Image-Edit): rank 64, alpha 128.
EDITING = (
    *("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "editing recipe": ("qwen-image", {"r": 64, "lora_alpha": 128, "target_modules": list(EDITING)}),
    "attention": ("sd3", {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_out.0", "attn2.to_k"]}),
    "everything": ("flux1", {"r": 4, "lora_alpha": 2, "target_modules": "all-linear"}),
    "fused": (
        "flux2",
        {"r": 4, "lora_alpha": 2, "target_modules": r".*(to_qkv_mlp_proj|linear_in|single\w+\.\d\.attn\.to_out)"},
    ),
    "convolution": ("sd3", {"r": 4, "lora_alpha": 6, "target_modules": ["pos_embed.proj"]}),
    "rslora": ("flux1", {"r": 9, "lora_alpha": 3, "target_modules": ["to_q"], "use_rslora": True}),
    "patterns": (
        "flux1",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["to_q", "to_k", "proj_out"],
            "rank_pattern": {"transformer_blocks.0.attn.to_q": 6, "^proj_out": 3},
            "alpha_pattern": {"single_transformer_blocks.1.attn.to_k": 3, r".*_blocks\.\d+\.proj_out": 5},
        },
    ),
    "bias": ("sd3", {"r": 4, "lora_alpha": 8, "target_modules": ["to_v", "add_v_proj"], "lora_bias": True}),
}


@pytest.fixture
def trained(
    tiny: Callable[[str], Any], tmp_path: Path, make_factor: Callable[..., Any]
) -> Callable[..., tuple[Any, Path, dict[str, Any]]]:
    """A tiny model, the folder of an adapter with random factors, and PEFT's merge of the two."""

    def train(family: str, options: dict[str, Any]) -> tuple[Any, Path, dict[str, Any]]:
        it = tiny(family)
        model = peft.get_peft_model(it.copy(), peft.LoraConfig(**options))
        for key, tensor in model.state_dict().items():
            if "lora_" in key:
                tensor.copy_(make_factor(key, *tensor.shape))
        model.save_pretrained(tmp_path / "adapter")
        return it, tmp_path / "adapter", model.merge_and_unload().state_dict()

    return train


# PEFT takes every one-dimensional tensor for a shard, its own biases too.
@pytest.mark.filterwarnings(r"ignore:Adapter 'default'.*lora_B\.bias")
@pytest.mark.parametrize("case", CASES)
def test_our_merge_is_pefts(trained: Callable[..., Any], case: str) -> None:
    family, options = CASES[case]
    it, folder, theirs = trained(family, options)
    modules = {key.split(".lora_")[0] for key in load_file(folder / "adapter_model.safetensors")}
    touched = {f"{name.removeprefix('base_model.model.')}.weight" for name in modules}
    if options.get("lora_bias"):
        touched |= {key.replace(".weight", ".bias") for key in touched}
    it.agree(it.merged((folder, 1.0)), theirs, touched)
    # The file alone is read with the config that lies beside it.
    it.agree(it.merged((folder / "adapter_model.safetensors", 1.0)), theirs, touched)


def test_alphas_and_ranks_are_recorded(trained: Callable[..., Any]) -> None:
    it, folder, _ = trained(*CASES["patterns"])
    lora = open_lora(folder, it.spec)
    assert (lora.ranks, lora.alphas) == ((3, 4, 6), (3.0, 5.0, 8.0))
    assert not any("warning" in note for note in lora.notes)


def test_a_config_of_other_tensors(trained: Callable[..., Any]) -> None:
    it, folder, _ = trained(*CASES["rslora"])
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 9', '"r": 8'))
    with pytest.raises(CheckpointError, match=r"rank 8 for '.*attn\.to_q', whose factors have rank 9"):
        open_lora(folder, it.spec)


def test_dora_is_refused(trained: Callable[..., Any]) -> None:
    it, folder, _ = trained("flux1", {"r": 4, "target_modules": ["to_q"], "use_dora": True})
    with pytest.raises(CheckpointError, match="DoRA: 4 tensors"):
        open_lora(folder, it.spec)
    weights = folder / "adapter_model.safetensors"
    save_file({key: t for key, t in load_file(weights).items() if "magnitude" not in key}, weights)
    with pytest.raises(CheckpointError, match="use_dora True"):
        open_lora(folder, it.spec)


def test_factors_taken_out_of_the_base_are_refused(trained: Callable[..., Any]) -> None:
    it, folder, _ = trained("flux1", {"r": 4, "target_modules": ["to_q"], "init_lora_weights": "pissa"})
    with pytest.raises(CheckpointError, match="init_lora_weights 'pissa'"):
        open_lora(folder, it.spec)


def test_a_trained_bias_is_not_dropped(trained: Callable[..., Any]) -> None:
    it, folder, _ = trained("flux1", {"r": 4, "target_modules": ["to_q"], "bias": "lora_only"})
    with pytest.raises(CheckpointError, match=r"to_q.*bias"):
        open_lora(folder, it.spec)


def test_modules_that_were_trained_whole_are_not_dropped(trained: Callable[..., Any]) -> None:
    it, folder, _ = trained("flux1", {"r": 4, "target_modules": ["to_q"], "modules_to_save": ["x_embedder"]})
    with pytest.raises(CheckpointError, match=r"x_embedder\.weight"):
        open_lora(folder, it.spec)


def test_half_precision_factors(trained: Callable[..., Any]) -> None:
    it, folder, _ = trained(*CASES["attention"])
    weights = folder / "adapter_model.safetensors"
    stored = {key: tensor.bfloat16() for key, tensor in load_file(weights).items()}
    save_file(stored, weights)
    key = "transformer_blocks.1.attn.to_q"
    down, up = (stored[f"base_model.model.{key}.lora_{f}.weight"].double() for f in "AB")
    expected = it.source.state[f"{key}.weight"].double() + 2 * up @ down
    torch.testing.assert_close(it.merged((folder, 1.0))[f"{key}.weight"].double(), expected, rtol=1e-6, atol=1e-6)
