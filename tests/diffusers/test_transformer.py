"""An engine behaves as a pipeline's transformer: what can be asked of a model is answered, or refused with a fix."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from mmdit_deploy.contract import Contract
from mmdit_deploy.diffusers.refusals import MISSING, Compiled
from mmdit_deploy.errors import ContractError, MissingPackageError, UsageError
from mmdit_deploy.spec import PRECISIONS, ModelSpec

diffusers = pytest.importorskip("diffusers")

from mmdit_deploy.diffusers import MMDiTEngineTransformer  # noqa: E402
from mmdit_deploy.diffusers.transformer import check_version  # noqa: E402
from mmdit_deploy.runtime import Engine  # noqa: E402

CPU = torch.device("cpu")
ELSEWHERE = torch.device("meta", 0)  # in the place of a GPU: where tensors can be, and are not on the CPU


@dataclass
class StubEngine:
    """An engine whose sample is its image tokens, and which remembers what it was given."""

    spec: ModelSpec
    precision: str = "fp32"
    device: torch.device = CPU
    target: str = "ort-cpu"
    given: list[Mapping[str, Tensor]] = field(default_factory=list)
    closed: bool = False

    @property
    def bundle(self) -> Any:
        return SimpleNamespace(spec=self.spec, path=Path("bundle"))

    @property
    def contract(self) -> Contract:
        return Contract.of(self.spec, PRECISIONS[self.precision])

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert not self.closed
        self.given.append(inputs)
        tokens = inputs["hidden_states"]
        return {"sample": tokens[..., : self.spec.out_dim]}

    def close(self) -> None:
        self.closed = True


def transformer_of(engine: StubEngine, load: Callable[[], StubEngine] | None = None) -> Any:
    return MMDiTEngineTransformer(engine, load)  # type: ignore[arg-type]


@pytest.fixture
def sd3(tiny_spec: ModelSpec) -> Any:
    return transformer_of(StubEngine(tiny_spec))


def call(transformer: Any, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """One call as StableDiffusion3Pipeline makes it."""
    spec = transformer._spec
    latent = torch.ones(2, spec.latent_channels, 32, 32, device=device, dtype=dtype)
    arguments = {
        "encoder_hidden_states": torch.ones(2, 5, spec.txt_dim, device=device, dtype=dtype),
        "pooled_projections": torch.ones(2, spec.pooled_dim, device=device, dtype=dtype),
        "timestep": torch.full((2,), 500.0, device=device),
        **more,
    }
    with torch.no_grad():
        return transformer(hidden_states=latent, **arguments)


@pytest.fixture
def pipe(sd3: Any, pipeline: Callable[..., Any]) -> Any:
    """StableDiffusion3Pipeline with an engine, a scheduler and a VAE."""
    return pipeline("StableDiffusion3Pipeline", sd3, "sd3")


def test_it_is_a_module_without_weights(sd3: Any) -> None:
    assert isinstance(sd3, nn.Module) and isinstance(sd3, diffusers.ModelMixin)
    assert not sd3.state_dict() and sd3.num_parameters() == 0
    assert sd3.eval() is sd3 and not sd3.training
    assert sd3.requires_grad_(False) is sd3
    assert "tiny, ort-cpu, torch.float32 on cpu" in repr(sd3)


def test_the_config_is_the_one_that_diffusers_class_would_have(sd3: Any, tiny_spec: ModelSpec) -> None:
    config = sd3.config
    assert (config.in_channels, config.patch_size, config.sample_size) == (4, 2, 32)
    assert config["joint_attention_dim"] == config.joint_attention_dim == tiny_spec.txt_dim
    assert set(config) == set(diffusers.SD3Transformer2DModel(num_layers=1).config) - {"_use_default_values"}


def test_it_returns_what_diffusers_class_returns(
    sd3: Any, tiny_families: Mapping[str, ModelSpec], tiny_spec: ModelSpec
) -> None:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModelOutput

    (sample,) = call(sd3, return_dict=False)
    assert sample.shape == (2, tiny_spec.out_channels, 32, 32)
    assert type(call(sd3)) is Transformer2DModelOutput
    flux2 = transformer_of(StubEngine(tiny_families["flux2"]))
    tokens = torch.ones(1, 4, 12)
    with flux2.cache_context("cond"), torch.no_grad():
        output = flux2(tokens, torch.ones(1, 3, 24), timestep=torch.ones(1), guidance=torch.ones(1))
    assert type(output) is Flux2Transformer2DModelOutput and output.kv_cache is None


def test_types_are_converted_to_the_engines_and_back(tiny_spec: ModelSpec) -> None:
    engine = StubEngine(tiny_spec, precision="fp16")
    sample = call(transformer_of(engine), dtype=torch.bfloat16).sample
    assert sample.dtype == torch.bfloat16
    assert {name: t.dtype for name, t in engine.given[0].items()} == {
        "hidden_states": torch.float16,
        "encoder_hidden_states": torch.float16,
        "pooled_projections": torch.float16,
        "timestep": torch.float32,
        "img_ids": torch.float32,
    }


@pytest.mark.parametrize("name", ["encoder_hidden_states", "pooled_projections"])
def test_text_beyond_an_fp16_engine_is_refused(tiny_spec: ModelSpec, name: str) -> None:
    """As infinity it would make a black image. Each tensor is looked at once, for that waits for a GPU."""
    transformer = transformer_of(StubEngine(tiny_spec, precision="fp16"))
    width = tiny_spec.txt_dim if name == "encoder_hidden_states" else tiny_spec.pooled_dim
    text = torch.ones(2, *([5] * (name == "encoder_hidden_states")), width, dtype=torch.bfloat16)
    looked: list[Tensor] = []
    amax = Tensor.amax
    with mock.patch.object(Tensor, "amax", lambda tensor: looked.append(tensor) or amax(tensor)):
        other = text * 2  # of the negative prompt, in a call of its own
        for given in (text, other) * 3:
            call(transformer, dtype=torch.float16, **{name: given})
        assert len(looked) == 2
        other.mul_(1.5)
        call(transformer, dtype=torch.float16, **{name: other})
        with torch.inference_mode():
            call(transformer, dtype=torch.float16, **{name: text + 1})
    assert len(looked) == 4
    large = text.clone()
    large[1, ..., 3] = -1e5
    with pytest.raises(ContractError, match=rf"{name} fits[^$]*65504[^$]*bfloat16 with 9\.984e[^$]*--bf16"):
        call(transformer, **{name: large})
    call(transformer_of(StubEngine(tiny_spec, precision="bf16")), **{name: large})


def test_gradients_are_refused(sd3: Any) -> None:
    latent = torch.ones(1, 4, 32, 32, requires_grad=True)
    with pytest.raises(UsageError, match="gradients"):
        sd3(latent, torch.ones(1, 5, 24), pooled_projections=torch.ones(1, 20), timestep=torch.ones(1))


def test_an_engines_type_is_its_own(pipe: Any) -> None:
    assert pipe.transformer.dtype == torch.float32
    assert pipe.to(torch.float32) is pipe and pipe.transformer.float() is pipe.transformer
    assert pipe.transformer.type(torch.float32) is pipe.transformer.type("torch.FloatTensor") is pipe.transformer
    ours = pipe.transformer
    for change in (
        ours.half,
        ours.bfloat16,
        ours.double,
        lambda: ours.type(torch.float16),
        lambda: pipe.to("cpu", torch.float16),
    ):
        with pytest.raises(UsageError, match=r"computes in torch\.float32[^$]*dtype=torch\.float32"):
            change()


def test_an_engines_device_is_its_own(pipe: Any) -> None:
    assert pipe.to("cpu") is pipe and pipe.transformer.cpu().device == torch.device("cpu") == pipe.device
    for change in (pipe.transformer.cuda, lambda: pipe.transformer.cuda(1), lambda: pipe.transformer.to("cuda:0")):
        with pytest.raises(UsageError, match=r"this ort-cpu engine runs on cpu[^$]*from_bundle\(path, device=…\)"):
            change()


def test_the_cpu_frees_an_engine_of_a_gpu_which_comes_back(tiny_spec: ModelSpec) -> None:
    engines = [StubEngine(tiny_spec, device=ELSEWHERE, target="ort-cuda")]

    def load() -> StubEngine:
        engines.append(StubEngine(tiny_spec, device=ELSEWHERE, target="ort-cuda"))
        return engines[-1]

    transformer = transformer_of(engines[0], load)
    transformer.to("cpu")
    assert engines[0].closed and transformer.engine is None and transformer.device == CPU
    transformer.to("cpu")
    transformer.to(ELSEWHERE)
    assert len(engines) == 2 and transformer.engine is engines[1] and transformer.device == ELSEWHERE
    transformer.to("cpu")
    with pytest.raises(UsageError, match=r"inputs on cpu[^$]*ort-cpu"):
        call(transformer)
    call(transformer, ELSEWHERE)  # sequential offload asks for no device
    assert len(engines) == 3 and not engines[2].closed


def test_a_freed_engine_is_loaded_once_for_all_threads(tiny_spec: ModelSpec) -> None:
    loads: list[StubEngine] = []

    def load() -> StubEngine:
        time.sleep(0.05)
        loads.append(StubEngine(tiny_spec, device=ELSEWHERE, target="ort-cuda"))
        return loads[-1]

    transformer = transformer_of(StubEngine(tiny_spec, device=ELSEWHERE, target="ort-cuda"), load).to("cpu")
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(call, transformer, ELSEWHERE) for _ in range(4)]:
            done.result()
    assert len(loads) == 1 and len(loads[0].given) == 4


def test_an_engine_that_cannot_be_loaded_again_stays(tiny_spec: ModelSpec) -> None:
    engine = StubEngine(tiny_spec, device=ELSEWHERE, target="ort-cuda")
    with pytest.raises(UsageError, match="where it was loaded"):
        transformer_of(engine).to("cpu")
    assert not engine.closed


def test_model_offload_frees_the_engine_between_its_uses(
    tiny_spec: ModelSpec, pipeline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.empty_device_cache", lambda device: None)
    engines = [StubEngine(tiny_spec, device=ELSEWHERE, target="ort-cuda")]

    def load() -> StubEngine:
        engines.append(StubEngine(tiny_spec, device=ELSEWHERE, target="ort-cuda"))
        return engines[-1]

    offloaded = pipeline("StableDiffusion3Pipeline", transformer_of(engines[0], load), "sd3", vae=None)
    offloaded.enable_model_cpu_offload(device=ELSEWHERE)
    assert engines[0].closed
    call(offloaded.transformer, ELSEWHERE)
    call(offloaded.transformer, ELSEWHERE)
    assert len(engines) == 2 and not engines[1].closed
    offloaded.maybe_free_model_hooks()
    assert engines[1].closed


def test_the_conditioning_of_a_split_engine_stays_loaded() -> None:
    with pytest.raises(UsageError, match="one timestep at a time"):
        MMDiTEngineTransformer.from_bundle("anywhere", conditioning="released")


def test_every_bundle_option_reaches_the_engine(monkeypatch: pytest.MonkeyPatch, tiny_spec: ModelSpec) -> None:
    loaded: list[tuple[Any, ...]] = []

    def load(path: Any, target: str, **options: Any) -> StubEngine:
        loaded.append((str(path), target, options))
        return StubEngine(tiny_spec, device=ELSEWHERE, target="ort-cuda")

    monkeypatch.setattr(Engine, "load", load)
    transformer = MMDiTEngineTransformer.from_bundle("b", "auto", device="cuda", specialize="eager", verify=True)
    transformer.to("cpu").to(ELSEWHERE)
    assert loaded == [
        ("b", "auto", {"device": "cuda", "specialize": "eager", "verify": True}),
        ("bundle", "ort-cuda", {"device": ELSEWHERE, "specialize": "eager", "verify": False}),
    ]


def test_an_engine_is_not_copied(sd3: Any) -> None:
    for make in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(UsageError, match="in each process"):
            make(sd3)


def test_an_older_diffusers_is_refused() -> None:
    check_version(diffusers.__version__)
    check_version("1.0.0.dev0")
    with pytest.raises(MissingPackageError, match=r"version 0\.36\.0[^$]*mmdit-deploy\[diffusers\]"):
        check_version("0.36.0")


@pytest.mark.parametrize("name", [name for name in vars(Compiled) if not name.startswith("_")])
def test_methods_that_would_change_weights_are_refused(sd3: Any, name: str) -> None:
    assert hasattr(nn.Module, name) or hasattr(diffusers.ModelMixin, name)
    with pytest.raises(UsageError, match=name) as caught:
        getattr(sd3, name)({})
    assert caught.value.fix and caught.value.received


@pytest.mark.parametrize("name", MISSING)
def test_parts_that_an_engine_has_not_are_missing_with_a_reason(sd3: Any, name: str) -> None:
    assert not hasattr(sd3, name) and getattr(sd3, name, None) is None
    with pytest.raises(UsageError, match=name) as caught:
        getattr(sd3, name)
    assert caught.value.fix


def test_another_missing_attribute_is_as_everywhere(sd3: Any) -> None:
    with pytest.raises(AttributeError, match="no attribute 'wings'"):
        _ = sd3.wings


def test_a_pipeline_is_saved_without_the_engine_and_loaded_with_it(pipe: Any, tmp_path: Path) -> None:
    engine = pipe.transformer
    with pytest.raises(UsageError, match=r"pipe\.transformer to None"):
        pipe.save_pretrained(tmp_path / "whole")
    pipe.transformer = None
    pipe.save_pretrained(tmp_path / "rest")
    absent = {name: None for name, part in pipe.components.items() if part is None}
    again = type(pipe).from_pretrained(tmp_path / "rest", **{**absent, "transformer": engine})
    assert again.transformer is engine and again.vae is not pipe.vae


def test_a_whole_pipeline_is_loaded_with_an_engine_for_its_transformer(
    pipe: Any, pipeline: Callable[..., Any], tmp_path: Path
) -> None:
    engine = pipe.transformer
    model = diffusers.SD3Transformer2DModel(**{**engine.config, "num_layers": 1})
    whole = pipeline("StableDiffusion3Pipeline", model, "sd3")
    whole.save_pretrained(tmp_path)
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()  # nor is it read
    absent = {name: None for name, part in whole.components.items() if part is None}
    assert type(whole).from_pretrained(tmp_path, **absent, transformer=engine).transformer is engine
    later = type(whole).from_pretrained(tmp_path, **absent, transformer=None)
    later.transformer = engine
    assert later.components["transformer"] is engine


def test_sibling_pipelines_share_the_engine(pipe: Any) -> None:
    engine = pipe.transformer
    sibling = diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(pipe, transformer=engine, dtype=engine.dtype)
    assert sibling.transformer is engine and not engine.engine.closed
    automatic = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(automatic) is type(sibling) and automatic.transformer is engine


def small(pipe: Any, prompts: dict[str, Tensor], **more: Any) -> Any:
    return pipe(**prompts, width=32, height=32, num_inference_steps=4, output_type="latent", **more)


def test_what_pipelines_ask_for_is_refused_from_within(
    pipeline: Callable[..., Any], prompts: Any, tiny_spec: ModelSpec
) -> None:
    spec = dataclasses.replace(tiny_spec, latent_channels=16, out_channels=16, pooled_dim=20)
    pipe = pipeline("StableDiffusion3Pipeline", transformer_of(StubEngine(spec)), "sd3")
    embedded = prompts("sd3", negative=True)
    small(pipe, embedded)
    for arguments, words in (
        ({"skip_guidance_layers": [0], "skip_layer_guidance_stop": 1.0}, "skip_layers"),
        ({"joint_attention_kwargs": {"scale": 0.7}}, "--lora"),
        ({"ip_adapter_image_embeds": torch.ones(2, 1, 4)}, "IP-Adapter"),
        ({"ip_adapter_image": torch.ones(1, 3, 8, 8)}, "IP-Adapter"),
    ):
        with pytest.raises(UsageError, match=words):
            small(pipe, embedded, **arguments)


def test_a_flux_ip_adapter_is_refused(
    pipeline: Callable[..., Any], prompts: Any, tiny_families: Mapping[str, ModelSpec]
) -> None:
    pipe = pipeline("FluxPipeline", transformer_of(StubEngine(tiny_families["flux1"])), "flux1")
    with pytest.raises(UsageError, match="IP-Adapter"):
        small(pipe, prompts("flux1"), ip_adapter_image_embeds=[torch.ones(1, 1, 4)])


@pytest.mark.parametrize("class_name", ["StableDiffusion3PAGPipeline", "StableDiffusion3PAGImg2ImgPipeline"])
def test_perturbed_attention_is_refused(
    class_name: str, pipeline: Callable[..., Any], prompts: Any, tiny_spec: ModelSpec
) -> None:
    spec = dataclasses.replace(tiny_spec, latent_channels=16, out_channels=16, pooled_dim=20)
    pipe = pipeline(class_name, transformer_of(StubEngine(spec)), "sd3")
    more = {"image": torch.ones(1, 3, 32, 32)} if "Img2Img" in class_name else {}
    with pytest.raises(UsageError, match="perturbed attention"):
        small(pipe, prompts("sd3", negative=True), pag_scale=1.0, **more)


@pytest.mark.parametrize(("class_name", "family"), [("StableDiffusion3Pipeline", "sd3"), ("FluxPipeline", "flux1")])
def test_a_lora_of_the_pipeline_is_refused(
    class_name: str, family: str, pipeline: Callable[..., Any], tiny_families: Any, tiny_spec: ModelSpec
) -> None:
    spec = {"sd3": tiny_spec, **tiny_families}[family]
    pipe = pipeline(class_name, transformer_of(StubEngine(spec)), family)
    lora = {
        f"transformer.transformer_blocks.0.attn.to_q.lora_{part}.weight": torch.ones(shape)
        for part, shape in (("A", (2, 64)), ("B", (64, 2)))
    }
    with pytest.raises(UsageError, match="--lora FILE:SCALE"):
        pipe.load_lora_weights(lora)
    pipe.unload_lora_weights()  # as services do between requests: there is nothing to unload


def test_group_offload_leaves_the_engine_out(
    pipeline: Callable[..., Any], prompts: Any, tiny_families: Mapping[str, ModelSpec]
) -> None:
    spec = dataclasses.replace(tiny_families["flux1"], latent_channels=4, out_channels=4, pooled_dim=20)

    def pipe() -> Any:
        return pipeline("FluxPipeline", transformer_of(StubEngine(spec)), "flux1")

    options = {"onload_device": CPU, "offload_device": CPU, "offload_type": "leaf_level"}
    with pytest.raises(UsageError, match=r'exclude_modules="transformer"'):
        pipe().enable_group_offload(**options)
    offloaded = pipe()
    offloaded.enable_group_offload(**options, exclude_modules="transformer")
    small(offloaded, prompts("flux1"))
