"""Enterprise TensorRT is the same code with another module: what differs is data. No GPU here, so its module is a fake.

What is tested is what is asked of it: the GPU of this machine, a timing cache, and the layer list by the inspector.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnx.parser
import pytest

from mmdit_deploy.build import RTX, TENSORRT
from mmdit_deploy.build.build_log import BuildLog
from mmdit_deploy.build.engine_builder import BuiltEngine, build_engine
from mmdit_deploy.contract import Range
from mmdit_deploy.errors import GraphError, MachineError

RANGES = {"batch": Range(1, 1, 2), "img_tokens": Range(4, 16, 48), "txt_tokens": Range(2, 8, 16)}
GRAPH = onnx.parser.parse_model(
    '<ir_version: 11, opset_import: ["": 23]>'
    "small (float16[batch,img_tokens,32] x) => (float16[batch,img_tokens,32] y)"
    "{ y = Attention<q_num_heads=2, kv_num_heads=2>(x, x, x) }"
)
ROOT = Path(__file__).parents[2]
ENGINE = b"an engine"
LAYERS = [
    {"Name": "_gemm_mha_v2_myl0_1", "LayerType": "kgen", "Inputs": [], "Outputs": [], "Metadata": "[ONNX Layer: attn]"}
]


class Fake:
    """The part of ``tensorrt`` that a build uses, and what was asked of it. It has no ``ComputeCapability``."""

    def __init__(self) -> None:
        self.configs: list[Any] = []
        self.networks: list[int] = []
        self.builds = self.loads = True
        self.makes: Callable[[bytes], bool] = lambda data: not data.startswith(b"broken")  # a timing cache of it
        self.inspected: list[bytes] = []

    def module(self) -> Any:
        fake = self

        class Base:
            def __init__(self) -> None:
                pass

        class Config(SimpleNamespace):
            def clear_flag(self, flag: str) -> None:
                self.cleared = flag

            def add_optimization_profile(self, profile: Any) -> None:
                self.profiles.append(profile.shapes)

            def create_timing_cache(self, data: bytes) -> Any:
                if not fake.makes(data):
                    return None
                return SimpleNamespace(data=data, serialize=lambda: memoryview(data + b"timed;"))

            def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
                assert not ignore_mismatch
                if cache.data.startswith(b"another GPU"):
                    return False
                self.timings = cache.data
                return True

        class Profile(SimpleNamespace):
            def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
                self.shapes[name] = shapes

        class Builder:
            def __init__(self, logger: Any):
                self.logger = logger

            def create_network(self, flags: int) -> Any:
                fake.networks.append(flags)
                return SimpleNamespace(num_layers=0)

            def create_builder_config(self) -> Any:
                fake.configs.append(Config(profiles=[]))
                return fake.configs[-1]

            def create_optimization_profile(self) -> Any:
                return Profile(shapes={})

            def build_serialized_network_to_stream(self, network: Any, config: Any, writer: Any) -> bool:
                if not fake.builds:
                    self.logger.log(SimpleNamespace(name="ERROR"), "could not find any implementation")
                    return False
                return all(writer.write(part) == len(part) for part in (ENGINE[:4], ENGINE[4:]))

        class Runtime:
            def __init__(self, logger: Any):
                self.logger = logger

            def deserialize_cuda_engine(self, data: bytes) -> Any:
                fake.inspected.append(data)
                if not fake.loads:
                    self.logger.log(SimpleNamespace(name="ERROR"), "cudaErrorMemoryAllocation")
                inspector = SimpleNamespace(get_engine_information=lambda _: json.dumps({"Layers": LAYERS}))
                return SimpleNamespace(create_engine_inspector=lambda: inspector) if fake.loads else None

        return SimpleNamespace(
            __version__="10.99.0",
            ILogger=Base,
            IProgressMonitor=Base,
            IStreamWriter=Base,
            Builder=Builder,
            Runtime=Runtime,
            OnnxParser=lambda network, logger: SimpleNamespace(parse=lambda data, path: True),
            NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
            ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
            BuilderFlag=SimpleNamespace(TF32="tf32"),
            HardwareCompatibilityLevel=SimpleNamespace(NONE="none", AMPERE_PLUS="ampere"),
            LayerInformationFormat=SimpleNamespace(JSON="json"),
        )


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """The fake, in the place of the module, on a machine with a GPU and an empty cache."""
    fake = Fake()
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module())
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3 / MIG 1g")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fake


@pytest.fixture
def build(tmp_path: Path, fake: Fake) -> Callable[[str], BuiltEngine]:
    """Builds an engine file of a name."""

    def call(name: str) -> BuiltEngine:
        with BuildLog(tmp_path / f"{name}.log", lambda _: None) as log:
            return build_engine(TENSORRT, GRAPH, tmp_path, tmp_path / name, log, profiles=[RANGES])

    return call


def timings(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.timing"))


def test_it_builds_for_the_gpu_of_this_machine(tmp_path: Path, fake: Fake, build: Callable[[str], BuiltEngine]) -> None:
    built = build("engine")
    assert (tmp_path / "engine").read_bytes() == ENGINE and built.file.size == len(ENGINE)
    (config,) = fake.configs
    assert not hasattr(config, "num_compute_capabilities")
    assert (config.hardware_compatibility_level, config.profiling_verbosity) == ("none", "detailed")
    assert config.cleared == "tf32"
    assert config.profiles == [{"x": ((1, 4, 32), (1, 16, 32), (2, 48, 32))}]
    assert fake.networks == [2]  # strongly typed: precision is in the graph


def test_layers_are_read_from_the_engine_on_the_disk(fake: Fake, build: Callable[[str], BuiltEngine]) -> None:
    built = build("engine")
    assert fake.inspected == [ENGINE]
    assert [(layer.name, layer.sources) for layer in built.layers] == [("_gemm_mha_v2_myl0_1", (("attn", ""),))]


def test_timings_are_kept_between_builds(tmp_path: Path, fake: Fake, build: Callable[[str], BuiltEngine]) -> None:
    build("first")
    (cache,) = timings(tmp_path)
    assert cache.read_bytes() == b"timed;" and "/" not in cache.name and "H100" not in cache.name
    build("second")
    assert [config.timings for config in fake.configs] == [b"", b"timed;"]
    assert timings(tmp_path) == [cache] and cache.read_bytes() == b"timed;timed;"


def test_another_gpu_has_timings_of_its_own(
    tmp_path: Path, fake: Fake, build: Callable[[str], BuiltEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    build("first")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA L4")
    build("second")
    assert fake.configs[-1].timings == b"" and len(timings(tmp_path)) == 2


def said(tmp_path: Path, name: str) -> list[str]:
    """Our own lines in the log of a build."""
    lines = (tmp_path / f"{name}.log").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("-- ") for line in lines if line.startswith("-- ")]


@pytest.mark.parametrize("content", [b"broken", b"another GPU's timings;"])
def test_timings_that_tensorrt_does_not_take_are_measured_anew(
    tmp_path: Path, fake: Fake, build: Callable[[str], BuiltEngine], content: bytes
) -> None:
    build("first")
    (cache,) = timings(tmp_path)
    cache.write_bytes(content)
    build("second")
    assert fake.configs[-1].timings == b"" and cache.read_bytes() == b"timed;"
    assert said(tmp_path, "first") == [] and said(tmp_path, "second") == [
        f"TensorRT does not take the timings of {cache}"
    ]


def test_without_a_timing_cache_it_builds_all_the_same(
    tmp_path: Path, fake: Fake, build: Callable[[str], BuiltEngine]
) -> None:
    fake.makes = lambda data: False
    build("engine")
    assert (tmp_path / "engine").read_bytes() == ENGINE and not timings(tmp_path)


def test_a_cache_folder_that_cannot_be_used_does_not_cost_the_build(
    tmp_path: Path, build: Callable[[str], BuiltEngine]
) -> None:
    """It is found out when gigabytes are built."""
    (tmp_path / "cache").write_text("in the way")
    assert build("engine").file.size == len(ENGINE) and (tmp_path / "engine").read_bytes() == ENGINE
    assert [line.split(":")[0] for line in said(tmp_path, "engine")] == [
        "the cache is not read",
        "the cache is not kept",
    ]


def test_a_user_without_a_home_builds_all_the_same(
    tmp_path: Path, build: Callable[[str], BuiltEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification has ignored
    monkeypatch.chdir(tmp_path)
    build("engine")
    assert (tmp_path / "engine").read_bytes() == ENGINE and not (tmp_path / "relative").exists()
    assert said(tmp_path, "engine") == ["no timings are kept: the user has no home"]


def test_a_build_that_failed_keeps_no_timings_and_no_file(
    tmp_path: Path, fake: Fake, build: Callable[[str], BuiltEngine]
) -> None:
    fake.builds = False
    with pytest.raises(GraphError, match="TensorRT must be able to build small") as caught:
        build("engine")
    assert caught.value.received == "could not find any implementation"
    assert not timings(tmp_path) and not (tmp_path / "engine").exists()


def test_an_engine_that_does_not_load_here_is_none(fake: Fake, build: Callable[[str], BuiltEngine]) -> None:
    fake.loads = False
    with pytest.raises(MachineError, match="a built engine must load on this GPU") as caught:
        build("engine")
    assert caught.value.received == "cudaErrorMemoryAllocation"


def test_what_cannot_be_told_while_it_is_inspected_gets_out(
    tmp_path: Path, fake: Fake, build: Callable[[str], BuiltEngine]
) -> None:
    def gone(line: str) -> None:
        raise BrokenPipeError(line)

    fake.loads = False
    with BuildLog(tmp_path / "log", gone) as log, pytest.raises(BrokenPipeError, match="cudaErrorMemoryAllocation"):
        build_engine(TENSORRT, GRAPH, tmp_path, tmp_path / "engine", log, profiles=[RANGES])


def test_a_version_whose_parser_lacks_what_the_graph_has(fake: Fake, build: Callable[[str], BuiltEngine]) -> None:
    sys.modules["tensorrt"].__version__ = "10.14.1.48.post1"
    with pytest.raises(MachineError, match=r"building with TensorRT needs TensorRT 10\.15 or later") as caught:
        build("engine")
    assert caught.value.exit_status == 3 and not fake.configs
    assert (caught.value.received, caught.value.fix) == ("TensorRT 10.14.1.48.post1", TENSORRT.install)


def test_what_pip_installs_will_do() -> None:
    """The extras, and the versions that a build asks for."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for flavour, extra in ((RTX, "rtx"), (TENSORRT, "trt")):
        assert extras[extra][0].split(";")[0].split(",")[0] == f"{flavour.distributions[0]}>={flavour.minimum}"
        assert f"[{extra}]" in flavour.install
