"""What diffusers does to models, and cannot do to an engine: each with what to do instead.

`Compiled` overrides what `ModelMixin` would do to parameters that are not there, without a word. `MISSING` names
attributes that diffusers' classes have and an engine has not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from mmdit_deploy.errors import EnginePartError, UsageError

_LORA = "mmdit-export … --lora FILE:SCALE merges a LoRA into the engine's weights"
_IP_ADAPTER = "run the pipeline without an IP-Adapter, or with diffusers' transformer"
_ATTENTION = "leave it out: the engine's target decides how attention is computed"
_LAYERS = "leave it out, or use diffusers' transformer: an engine is one compiled graph without layers"
_SAVE = (
    "set pipe.transformer to None before you save the pipeline, keep the bundle, and give "
    "MMDiTEngineTransformer.from_bundle(…) to the pipeline's from_pretrained as transformer="
)
_LOAD = "MMDiTEngineTransformer.from_bundle(path)"
_OFFLOAD = (
    'load the pipeline again, with pipe.enable_group_offload(…, exclude_modules="transformer"), or with '
    "pipe.enable_model_cpu_offload(), which frees the engine between its uses"
)
_COPY = "load it again with MMDiTEngineTransformer.from_bundle(path), in each process"

MISSING: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "add_adapter",
            "delete_adapters",
            "disable_lora",
            "enable_lora",
            "fuse_lora",
            "load_lora_adapter",
            "save_lora_adapter",
            "set_adapter",
            "set_adapters",
            "unfuse_lora",
        ),
        _LORA,
    ),
    **dict.fromkeys(("_load_ip_adapter_weights", "encoder_hid_proj", "image_proj"), _IP_ADAPTER),
    **dict.fromkeys(("set_attn_processor", "fuse_qkv_projections", "unfuse_qkv_projections"), _ATTENTION),
    **dict.fromkeys(
        (
            "disable_cache",
            "enable_cache",
            "enable_forward_chunking",
            "pos_embed",
            "single_transformer_blocks",
            "transformer_blocks",
        ),
        _LAYERS,
    ),
    **dict.fromkeys(("register_to_config", "save_config"), "export the checkpoint again with another config.json"),
}


def missing(name: str) -> EnginePartError:
    """The error for an attribute of diffusers' classes that an engine has not."""
    return EnginePartError(
        f"an engine has no {name}: what diffusers would look at or change is compiled in",
        received=f"transformer.{name}",
        fix=MISSING[name],
    )


def _refused(name: str, fix: str) -> Callable[..., NoReturn]:
    def method(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise UsageError(f"an engine is compiled: it has nothing for {name}", received=f"{name}()", fix=fix)

    method.__name__ = method.__qualname__ = name
    method.__doc__ = f"Refused: {fix}."
    return method


class Compiled:
    """Methods of diffusers' models that an engine refuses. A mixin, before `ModelMixin`."""

    __deepcopy__ = _refused("__deepcopy__", _COPY)
    __reduce_ex__ = _refused("__reduce_ex__", _COPY)
    compile_repeated_blocks = _refused("compile_repeated_blocks", _LAYERS)
    dequantize = _refused("dequantize", "export the checkpoint again without quantization")
    enable_gradient_checkpointing = _refused("enable_gradient_checkpointing", "train diffusers' transformer")
    enable_group_offload = _refused("enable_group_offload", _OFFLOAD)
    enable_layerwise_casting = _refused("enable_layerwise_casting", "mmdit-export … --fp8 stores weights in 8 bits")
    enable_parallelism = _refused("enable_parallelism", "load one engine per GPU: from_bundle(path, device=…)")
    load_state_dict = _refused("load_state_dict", "export the checkpoint that has these weights")
    save_pretrained = _refused("save_pretrained", _SAVE)
    set_attention_backend = _refused("set_attention_backend", _ATTENTION)
    set_use_memory_efficient_attention_xformers = _refused("set_use_memory_efficient_attention_xformers", _ATTENTION)
    set_use_npu_flash_attention = _refused("set_use_npu_flash_attention", _ATTENTION)
    set_use_xla_flash_attention = _refused("set_use_xla_flash_attention", _ATTENTION)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: an engine is loaded from a bundle."""
        raise UsageError("an engine is loaded from its bundle", received="from_pretrained()", fix=_LOAD)
