"""Every name of a module stands for one thing only, in every published model."""

from __future__ import annotations

import pytest

from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.families import PRESETS
from mmdit_deploy.lora.keys import PREFIXES
from mmdit_deploy.lora.targets import resolve, targets


@pytest.mark.parametrize("preset", PRESETS)
def test_no_name_is_ambiguous(preset: str) -> None:
    spec = PRESETS[preset]
    table = targets(spec)
    by_original: dict[str, tuple[object, bool]] = {}
    for parameter in parameters(spec):
        leaf = parameter.path.rpartition(".")[2]
        if leaf == "table":
            continue
        for part in parameter.parts:
            target = table[part.key.removesuffix(f".{leaf}")]
            assert part in (*target.weights, *target.biases) and len(target.weights) == 1 and not target.swapped
        if parameter.original:
            name = parameter.original.rpartition(".")[0]
            assert parameter.parts in (table[name].weights, table[name].biases)
            assert by_original.setdefault(name, (parameter.path.rpartition(".")[0], parameter.swapped)) == (
                parameter.path.rpartition(".")[0],
                parameter.swapped,
            )
            assert table[name].swapped == parameter.swapped
    underscored = [name for name in table if "." in name and name.replace(".", "_") in table]
    for name in underscored:
        assert table[name.replace(".", "_")] == table[name]
    for name in table:  # and no prefix makes one module's name another's
        assert all(name.removeprefix(prefix) not in table for prefix in PREFIXES if name.startswith(prefix)), name


def test_a_module_of_another_model() -> None:
    table = targets(PRESETS["flux1-dev"])
    assert resolve("lora_unet_double_blocks_18_img_attn_qkv", table) is not None
    assert resolve("lora_unet_double_blocks_19_img_attn_qkv", table) is None
    assert resolve("transformer.lora_unet_double_blocks_0_img_attn_qkv", table) is None
