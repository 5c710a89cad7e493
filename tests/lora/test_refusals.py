"""What is not understood in a LoRA is refused by name: rule, received, fix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit_deploy.errors import CheckpointError, UsageError
from mmdit_deploy.lora import open_lora, open_recorded

NAME = "transformer.transformer_blocks.0.attn.to_q"
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


@pytest.fixture
def refusal(tiny: Callable[[str], Any], write: Callable[..., Path]) -> Callable[..., str]:
    """What is said of a file, given by its tensors, or of a path."""

    def call(lora: dict[str, Tensor] | Path, metadata: dict[str, str] | None = None) -> str:
        path = lora if isinstance(lora, Path) else write(lora, metadata=metadata)
        with pytest.raises(CheckpointError) as caught:
            open_lora(path, tiny("flux1").spec)
        assert caught.value.received and caught.value.fix
        return str(caught.value)

    return call


@pytest.fixture
def good(make_pair: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
    return make_pair(NAME, 64, 64, 4)


@pytest.mark.parametrize(
    ("key", "variant"),
    [
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector.weight", "DoRA"),
        ("lora_magnitude_vector", "DoRA"),
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("oft_blocks", "OFT"),
        ("oft_R.weight", "OFT"),
        ("boft_R", "OFT"),
        ("ia3_l", "(IA)³"),
        ("lora_mid.weight", "Tucker"),
        ("a1.weight", "GLoRA"),
        ("vera_lambda_b", "VeRA"),
        ("w_norm", "LyCORIS norms"),
        ("set_weight", "whole weights"),
        ("reshape_weight", "whole weights"),
    ],
)
def test_variants(refusal: Callable[..., str], good: dict[str, Tensor], key: str, variant: str) -> None:
    said = refusal({**good, f"{NAME}.{key}": torch.ones(4)})
    assert variant in said and f"{NAME}.{key}" in said


def test_unmatched_keys_are_listed(
    refusal: Callable[..., str], good: dict[str, Tensor], make_pair: Callable[..., dict[str, Tensor]]
) -> None:
    other = make_pair("transformer.transformer_blocks.7.attn.to_q", 64, 64, 4)
    said = refusal({**good, **other, "bundle_emb.x.\x1b[2J": torch.ones(2)})
    assert "3 of 5 do not" in said and all(key in said for key in other)
    assert r"bundle_emb.x.\x1b[2J" in said and "\x1b" not in said


def test_nothing_for_the_transformer(refusal: Callable[..., str], make_pair: Callable[..., dict[str, Tensor]]) -> None:
    assert "no others" in refusal(make_pair("text_encoder.layers.0.q_proj", 8, 8, 2))


@pytest.mark.parametrize("missing", ["lora_A", "lora_B"])
def test_half_a_pair(refusal: Callable[..., str], good: dict[str, Tensor], missing: str) -> None:
    del good[f"{NAME}.{missing}.weight"]
    assert "both factors" in refusal(good) and NAME.removeprefix("transformer.") in refusal(good)


def test_an_alpha_alone(refusal: Callable[..., str]) -> None:
    assert f"{NAME}.alpha" in refusal({f"{NAME}.alpha": torch.tensor(1.0)})


@pytest.mark.parametrize(
    ("factor", "shape", "expected"),
    [
        ("lora_A", (4, 63), "[4, 64]"),
        ("lora_B", (63, 4), "[64, 4]"),
        ("lora_B", (64, 5), "[64, 4]"),
        ("lora_B", (64,), "[64, 4]"),
    ],
)
def test_factors_that_do_not_fit(
    refusal: Callable[..., str], good: dict[str, Tensor], factor: str, shape: tuple[int, ...], expected: str
) -> None:
    said = refusal({**good, f"{NAME}.{factor}.weight": torch.ones(shape)})
    assert f"{NAME}.{factor}.weight" in said and f"shape {list(shape)}, expected {expected}" in said


@pytest.mark.parametrize("shape", [(), (0, 64)])
def test_factors_of_no_rank(refusal: Callable[..., str], good: dict[str, Tensor], shape: tuple[int, ...]) -> None:
    assert "rank 1 or more" in refusal({**good, f"{NAME}.lora_A.weight": torch.ones(shape)})


def test_factors_of_a_norm(refusal: Callable[..., str], make_pair: Callable[..., dict[str, Tensor]]) -> None:
    assert "a vector" in refusal(make_pair("transformer.transformer_blocks.0.attn.norm_q", 16, 1, 2))


def test_a_dtype_that_is_none(refusal: Callable[..., str], good: dict[str, Tensor]) -> None:
    good[f"{NAME}.lora_B.weight"] = good[f"{NAME}.lora_B.weight"].to(torch.float8_e4m3fn)
    assert "float8_e4m3fn" in refusal(good)


def test_a_bias_of_a_module_without_one(
    tiny: Callable[[str], Any], write: Callable[..., Path], make_pair: Callable[..., dict[str, Tensor]]
) -> None:
    path = write({**make_pair(NAME, 64, 64, 4), f"{NAME}.diff_b": torch.ones(64)})
    with pytest.raises(CheckpointError, match="no bias in this model"):
        open_lora(path, tiny("flux2").spec)


def test_one_change_under_two_names(
    refusal: Callable[..., str], good: dict[str, Tensor], make_pair: Callable[..., dict[str, Tensor]]
) -> None:
    fused = make_pair("lora_unet_double_blocks_0_img_attn_qkv", 192, 64, 4, down="lora_down", up="lora_up")
    assert "both change transformer_blocks.0.attn.to_q.weight" in refusal({**good, **fused})
    adapters = {key.replace(".weight", ".other.weight"): tensor.clone() for key, tensor in good.items()}
    assert "hold each change once" in refusal({**good, **adapters})


@pytest.mark.parametrize(
    "alpha",
    [torch.tensor(0.0), torch.tensor(float("nan")), torch.ones(2), torch.tensor(1j)],
    ids=["0", "nan", "two", "complex"],
)
def test_alphas_that_are_none(refusal: Callable[..., str], good: dict[str, Tensor], alpha: Tensor) -> None:
    assert f"{NAME}.alpha" in refusal({**good, f"{NAME}.alpha": alpha})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"use_dora": True}, "use_dora"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"r": 5}, "rank 5"),
        ({"r": True}, "at least 1"),
        ({"r": None}, "at least 1"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"alpha_pattern": [1]}, "tables"),
        ({"alpha_pattern": {"(": 1}}, "unterminated"),
        ({"alpha_pattern": {"(?i)a": 1}}, "global flags"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "repeated group"),
        ({"alpha_pattern": {"a*a*a*a*b": 1}}, "three repetitions"),
        ({"rank_pattern": {"to_q": "4"}}, "rank_pattern"),
    ],
)
def test_configs(
    refusal: Callable[..., str], good: dict[str, Tensor], tmp_path: Path, write: Callable[..., Path],
    changes: dict[str, Any], words: str,
) -> None:  # fmt: skip
    write(good, "adapter_model")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    assert words in refusal(tmp_path)
    metadata = {f"transformer.{key}": value for key, value in {**CONFIG, **changes}.items()}
    assert words in refusal(good, {"lora_adapter_metadata": json.dumps(metadata)})


@pytest.mark.parametrize("text", ["{", "[]", '{"r": 1, "r": 2}'])
def test_metadata_that_is_no_config(refusal: Callable[..., str], good: dict[str, Tensor], text: str) -> None:
    assert "lora_adapter_metadata" in refusal(good, {"lora_adapter_metadata": text})


def test_paths(refusal: Callable[..., str], tmp_path: Path) -> None:
    assert "no such path" in refusal(tmp_path / "nowhere.safetensors")
    assert "(none)" in refusal(tmp_path)
    for name, words in (("a.bin", "pickle"), ("a.pt", "pickle"), ("a.txt", "a LoRA is a .safetensors file")):
        (tmp_path / name).write_bytes(b"\x80\x02")
        assert words in refusal(tmp_path / name)
    (tmp_path / "adapter_model.bin").touch()
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "pickle" in refusal(tmp_path)


def test_a_lora_that_is_another_one_now(
    tiny: Callable[[str], Any], good: dict[str, Tensor], write: Callable[..., Path]
) -> None:
    spec, path = tiny("flux1").spec, write(good)
    record = open_lora(path, spec, 0.5).to_json()
    (again,) = open_recorded([record], spec)
    assert again.to_json() == record
    write({key: tensor + 1 for key, tensor in good.items()})
    with pytest.raises(UsageError, match="the one that the bundle was made with") as caught:
        open_recorded([record], spec)
    assert record["sha256"] in str(caught.value.fix) and "--lora FILE" in str(caught.value.fix)


def test_a_lora_is_found_again_by_its_content(
    tiny: Callable[[str], Any],
    good: dict[str, Tensor],
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = tiny("flux1").spec
    path = write(good, "first")
    monkeypatch.chdir(path.parent)
    records = [open_lora(path.name, spec, 0.5).to_json(), open_lora(path.name, spec, 2.0).to_json()]
    assert records[0]["file"] == path.name and records[0]["resolved"] == str(path.resolve())

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert [lora.scale for lora in open_recorded(records, spec)] == [0.5, 2.0]  # where it led to
    other = write({key: tensor + 1 for key, tensor in good.items()}, path.stem + "-other")
    (elsewhere / path.name).write_bytes(other.read_bytes())
    assert all(lora.path == path for lora in open_recorded(records, spec))  # not one of the same name

    moved = path.rename(elsewhere / "moved.safetensors")
    assert all(lora.path == moved for lora in open_recorded(records, spec, [moved]))
    with pytest.raises(UsageError) as caught:
        open_recorded(records, spec)
    assert "where there is none" in str(caught.value.received) and "SHA-256" in str(caught.value.received)
    assert "--lora FILE" in str(caught.value.fix) and records[0]["sha256"] in str(caught.value.fix)
    with pytest.raises(UsageError, match="SHA-256") as caught:
        open_recorded(records, spec, [moved, other])
    assert str(other) in str(caught.value.received)
    with pytest.raises(UsageError, match="it has none"):
        open_recorded([], spec, [moved])
    with pytest.raises(UsageError, match="--lora takes a FILE"):
        open_recorded(records, spec, [""])
    with pytest.raises(CheckpointError, match="no such path"):
        open_recorded(records, spec, ["nowhere.safetensors"])
    older = {key: value for key, value in records[0].items() if key != "resolved"}
    assert open_recorded([older], spec, [moved])


def test_the_strength_of_a_peft_folder_is_not_lost_with_its_config(
    tiny: Callable[[str], Any], good: dict[str, Tensor], write: Callable[..., Path], tmp_path: Path
) -> None:
    folder, spec = tmp_path / "peft", tiny("flux1").spec
    folder.mkdir()
    write(good).rename(folder / "adapter_model.safetensors")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 3}))
    record = open_lora(folder, spec).to_json()
    assert open_recorded([record], spec)
    config.unlink()
    with pytest.raises(UsageError, match=r"adapter_config\.json"):
        open_recorded([record], spec, [folder / "adapter_model.safetensors"])
