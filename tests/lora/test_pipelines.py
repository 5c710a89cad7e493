"""diffusers' `load_lora_weights` and `fuse_lora` judge what the formats of each family mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmdit_deploy.lora import open_lora

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

NAMES = ("scheduler", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2",
         "tokenizer_3", "image_encoder", "feature_extractor")  # fmt: skip
PIPELINES = {
    "sd3": ("StableDiffusion3Pipeline", NAMES),
    "flux1": ("FluxPipeline", [name for name in NAMES if not name.endswith("_3")]),
    "flux2": ("Flux2Pipeline", ("scheduler", "vae", "text_encoder", "tokenizer")),
    "qwen-image": ("QwenImagePipeline", ("scheduler", "vae", "text_encoder", "tokenizer")),
}
ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_out.0", "attn.add_v_proj")


def pipeline(it: Any) -> Any:
    """A pipeline that has a copy of the transformer and nothing else."""
    class_name, absent = PIPELINES[it.family]
    return getattr(diffusers, class_name)(transformer=it.copy(), **dict.fromkeys(absent))


def fused(it: Any, *loras: tuple[Any, float]) -> dict[str, Tensor]:
    """diffusers' merged weights of LoRAs: files, or tensors by key."""
    pipe = pipeline(it)
    for index, (lora, _) in enumerate(loras):
        pipe.load_lora_weights(dict(lora) if isinstance(lora, dict) else str(lora), adapter_name=f"a{index}")
    names = [f"a{index}" for index in range(len(loras))]
    pipe.set_adapters(names, [scale for _, scale in loras])
    pipe.fuse_lora(components=["transformer"], adapter_names=names)
    pipe.unload_lora_weights()
    state: dict[str, Tensor] = pipe.transformer.state_dict()
    return state


@pytest.fixture
def factors(make_pair: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Factors of modules: ``factors(it, modules, rank, prefix="transformer.", …)``."""

    def make(it: Any, modules: Iterable[str], rank: int, prefix: str = "transformer.", **names: str) -> Any:
        made: dict[str, Tensor] = {}
        for module in modules:
            out, *inner = it.shape(module)
            made |= make_pair(f"{prefix}{module}", out, torch.Size(inner).numel(), rank, **names)
        return made

    return make


def weights_of(modules: Iterable[str]) -> set[str]:
    return {f"{module}.weight" for module in modules}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("family", PIPELINES)
def test_two_loras_add_up(
    tiny: Callable[[str], Any], factors: Callable[..., Any], write: Callable[..., Path], family: str
) -> None:
    it = tiny(family)
    some, others = it.modules(*ATTENTION), it.modules("attn.to_k", "proj_out")
    first = write(factors(it, some, 4), "first")
    second = write(factors(it, others, 6), "second")
    theirs = fused(it, (first, 0.8), (second, -0.5))
    it.agree(it.merged((first, 0.8), (second, -0.5)), theirs, weights_of([*some, *others]))


@pytest.mark.parametrize("family", PIPELINES)
def test_alpha_in_the_metadata(
    tiny: Callable[[str], Any], make_factor: Callable[..., Tensor], tmp_path: Path, family: str
) -> None:
    import peft
    from diffusers.utils import convert_state_dict_to_diffusers

    it, pipe = tiny(family), pipeline(tiny(family))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v"], alpha_pattern={"to_v": 1})
    pipe.transformer.add_adapter(config)
    state = peft.get_peft_model_state_dict(pipe.transformer)
    layers = convert_state_dict_to_diffusers({key: make_factor(key, *t.shape) for key, t in state.items()})
    type(pipe).save_lora_weights(
        tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config.to_dict()
    )
    lora = open_lora(tmp_path, it.spec)
    assert lora.alphas == (1.0, 6.0) and not any("warning" in note for note in lora.notes)
    touched = weights_of(it.modules("to_q", "to_v"))
    it.agree(it.merged((tmp_path, 0.7)), fused(it, (tmp_path / "pytorch_lora_weights.safetensors", 0.7)), touched)


def test_alpha_in_the_metadata_of_a_model(
    tiny: Callable[[str], Any], make_factor: Callable[..., Tensor], tmp_path: Path
) -> None:
    import peft

    it = tiny("flux1")
    model = it.copy()
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False))
    model.save_lora_adapter(tmp_path)
    model.fuse_lora()
    model.unload_lora()
    it.agree(it.merged((tmp_path, 1.0)), model.state_dict(), weights_of(it.modules("to_q")))


def test_no_alpha_is_the_rank_with_a_warning(
    tiny: Callable[[str], Any], factors: Callable[..., Any], write: Callable[..., Path]
) -> None:
    it = tiny("sd3")
    modules = it.modules("attn.to_q")
    # What kohya's converter leaves in the metadata after it multiplied alpha into the factors is not alpha.
    path = write(factors(it, modules, 4), metadata={"ss_network_alpha": "1", "ss_network_dim": "4"})
    notes = open_lora(path, it.spec).notes
    assert notes[-1] == f"warning: {path} does not say alpha for {len(modules)} modules: taken to be the rank"
    it.agree(it.merged((path, 1.0)), fused(it, (path, 1.0)), weights_of(modules))


@pytest.mark.parametrize(
    ("family", "prefix", "down", "up"),
    [
        ("flux1", "transformer.", "lora_down", "lora_up"),
        ("qwen-image", "", "lora_A.default", "lora_B.default"),
        ("qwen-image", "diffusion_model.", "lora_down", "lora_up"),
        ("qwen-image", "transformer.", "lora_down", "lora_up"),
        ("sd3", "transformer.", "lora.down", "lora.up"),
        ("flux2", "diffusion_model.", "lora_A", "lora_B"),
        ("flux2", "base_model.model.", "lora_A", "lora_B"),
    ],
)
def test_other_spellings_of_diffusers_names(
    tiny: Callable[[str], Any],
    factors: Callable[..., Any],
    write: Callable[..., Path],
    family: str,
    prefix: str,
    down: str,
    up: str,
) -> None:
    it = tiny(family)
    modules = it.modules("attn.to_q", "attn.to_out.0")
    tensors = factors(it, modules, 4, prefix, down=down, up=up)
    path = write(tensors)
    judged = tensors
    if (family, prefix) == ("qwen-image", "transformer."):  # a name of Qwen's own converter, with one prefix more
        judged = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
        judged |= {f"{module}.alpha": torch.tensor(4.0) for module in modules}
    if (family, prefix) == ("qwen-image", ""):
        judged = {f"diffusion_model.{key}": tensor for key, tensor in tensors.items()}
    it.agree(it.merged((path, 0.5)), fused(it, (judged, 0.5)), weights_of(modules))


def test_a_lora_of_a_pipeline_saved_by_diffusers(
    tiny: Callable[[str], Any], factors: Callable[..., Any], make_pair: Callable[..., Any], write: Callable[..., Path]
) -> None:
    """Text encoders are ignored, and counted."""
    it = tiny("sd3")
    text = make_pair("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 8, 8, 2)
    text |= make_pair("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", 8, 8, 2)
    modules = it.modules("norm1.linear")
    fields = {"transformer.r": 3, "transformer.lora_alpha": 6, "text_encoder.r": 2, "text_encoder.lora_alpha": 9}
    path = write({**factors(it, modules, 3), **text}, metadata={"lora_adapter_metadata": json.dumps(fields)})
    lora = open_lora(path, it.spec)
    assert f"lora: {path}: 4 tensors of text encoders ignored" in lora.notes
    assert lora.to_json()["ignored_text_encoder_keys"] == 4 and lora.alphas == (6.0,)
    transformer = {key: t for key, t in load_file(path).items() if key not in text}
    it.agree(it.merged((path, 1.0)), fused(it, (transformer, 2.0)), weights_of(modules))
