"""Targets: their names, what is refused by name alone, and what each one runs."""

from __future__ import annotations

import pytest

from mmdit_deploy.build import RTX, TENSORRT, check_targets, dialect_of, execution_of, parse_target, stepped_dialect_of
from mmdit_deploy.errors import UsageError
from mmdit_deploy.graph.lower import DIALECTS
from mmdit_deploy.precision import SCHEMES
from mmdit_deploy.spec import PRECISIONS, QUANTIZED, Precision, precision

FP16 = PRECISIONS["fp16"]
NAMES = ("ort-cpu", "ort-cuda", "rtx:sm89", "rtx:sm75+sm80+sm86+sm89+sm120+sm121", "trt")


@pytest.mark.parametrize("name", NAMES)
def test_a_target_keeps_its_name(name: str) -> None:
    target = parse_target(name)
    assert target.name == name and parse_target(target.name) == target
    assert target.device == ("cpu" if name == "ort-cpu" else "cuda")
    assert (target.provider is None) != (target.flavour is None)
    assert target.flavour is {"r": RTX, "t": TENSORRT}.get(name[0])


@pytest.mark.parametrize(
    ("name", "same_as"),
    [
        ("rtx:sm120+sm89", "rtx:sm89+sm120"),
        ("rtx:sm89+sm89", "rtx:sm89"),
        ("rtx:sm121+sm75+sm121+sm86", "rtx:sm75+sm86+sm121"),
    ],
)
def test_one_engine_has_one_name(name: str, same_as: str) -> None:
    target = parse_target(name)
    assert target == parse_target(same_as) and target.name == same_as
    assert target.capabilities == tuple(same_as.removeprefix("rtx:").split("+"))


def test_every_capability_has_a_number() -> None:
    for sm, number in RTX.capabilities.items():
        major, minor = number.split(".")
        assert sm == f"sm{major}{minor}"


@pytest.mark.parametrize(
    "name",
    ["", "tpu", "ORT-CPU", "ort", "ort-cpu ", "rtx", "rtx:", "rtx:89", "rtx:sm", "rtx:SM89", "rtx:sm89+", "rtx:+sm89"]
    + ["rtx:sm89,sm86", "rtx:sm89 sm86", "trt:sm89", "rtx:sm89\n", "rtx:../../sm89"],
)
def test_what_is_no_target(name: str) -> None:
    with pytest.raises(UsageError, match="a target is one of ort-cpu") as caught:
        parse_target(name)
    assert caught.value.exit_status == 2 and caught.value.received == repr(name) and caught.value.fix


@pytest.mark.parametrize(
    ("name", "unknown", "fix"),
    [
        ("rtx:sm90", "sm90", "--target trt, on a machine with that GPU"),
        ("rtx:sm89+sm100", "sm100", "--target trt"),
        ("rtx:sm103+sm90", "sm103, sm90", "--target trt"),
        ("rtx:sm61", "sm61", "--target rtx:sm89"),
        ("rtx:sm999+sm89", "sm999", "--target rtx:sm89"),
        ("rtx:sm089", "sm089", "--target rtx:sm89"),
    ],
)
def test_a_gpu_that_it_does_not_build_for(name: str, unknown: str, fix: str) -> None:
    with pytest.raises(UsageError, match=r"TensorRT-RTX builds for sm75, sm80, .*sm121") as caught:
        parse_target(name)
    assert (caught.value.exit_status, caught.value.received) == (2, unknown)
    assert caught.value.fix is not None and caught.value.fix.startswith(fix)


@pytest.mark.parametrize("names", [["rtx:sm75"], ["ort-cpu", "rtx:sm89+sm75"]])
def test_bf16_needs_ampere(names: list[str]) -> None:
    with pytest.raises(UsageError, match="bf16 needs a GPU of compute capability sm80") as caught:
        check_targets(names, PRECISIONS["bf16"])
    assert caught.value.exit_status == 2 and "sm75" in str(caught.value.received) and caught.value.fix
    assert check_targets(names, FP16) and check_targets(names, PRECISIONS["fp32"])
    assert check_targets(["rtx:sm80+sm89"], PRECISIONS["bf16"])


@pytest.mark.parametrize(
    ("name", "target", "lacking"),
    [
        *(("fp8", f"rtx:{sm}", sm) for sm in ("sm75", "sm80", "sm86")),
        *(("fp4", f"rtx:{sm}", sm) for sm in ("sm75", "sm80", "sm86", "sm89")),
        ("w4a16", "rtx:sm75", "sm75"),
        ("fp8", "rtx:sm86+sm89+sm120", "sm86"),
        ("fp4", "rtx:sm86+sm89+sm120", "sm86, sm89"),
    ],
)
def test_a_gpu_without_the_format_is_refused_before_the_build(name: str, target: str, lacking: str) -> None:
    with pytest.raises(UsageError, match="needs a GPU of compute capability sm") as caught:
        check_targets(["ort-cpu", target], precision(name))
    assert caught.value.exit_status == 2 and caught.value.fix
    assert str(caught.value.received) == (target if "+" not in target else f"{target}: {lacking}")
    assert ("drop" in str(caught.value.fix)) == ("+" in target)


def test_gpus_with_the_format_are_not_refused() -> None:
    for name, target in (("fp8", "rtx:sm89+sm120+sm121"), ("fp4", "rtx:sm120+sm121"), ("w4a16", "rtx:sm80+sm121")):
        assert check_targets([target], precision(name, "bf16"))
    assert check_targets(["rtx:sm75+sm80+sm86+sm89+sm120"], precision("int8"))
    assert all(check_targets(["ort-cpu", "ort-cuda"], precision(name)) for name in QUANTIZED)


def test_schemes_and_base_count_as_the_precision_does() -> None:
    with pytest.raises(UsageError, match="FP8 needs") as caught:
        check_targets(["rtx:sm86"], precision("int8"), [SCHEMES["fp8-weights"]])
    assert caught.value.received == "rtx:sm86"
    with pytest.raises(UsageError, match="bf16 needs") as caught:
        check_targets(["rtx:sm75"], precision("int8", "bf16"))
    assert "--base fp16" in str(caught.value.fix)


@pytest.mark.parametrize(("capability", "refused"), [((8, 6), True), ((8, 9), False), ((9, 0), False)])
def test_this_machines_gpu_is_asked(
    capability: tuple[int, int], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    if not refused:
        assert check_targets(["trt"], precision("fp8"))
        return
    with pytest.raises(UsageError, match="FP8 needs a GPU of compute capability sm89") as caught:
        check_targets(["trt"], precision("fp8"))
    assert caught.value.received == "trt: sm86 (this machine's GPU)"


def test_of_a_gpu_that_torch_does_not_see_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert check_targets(["trt"], precision("fp4"))


def test_the_same_target_twice_is_one() -> None:
    names = ["rtx:sm89+sm86", "ort-cpu", "rtx:sm86+sm89", "ort-cpu"]
    assert [t.name for t in check_targets(names, FP16)] == ["rtx:sm86+sm89", "ort-cpu"]


def test_no_target_is_none_to_build() -> None:
    with pytest.raises(UsageError, match="at least one target"):
        check_targets([], FP16)


def test_folders() -> None:
    folders = [parse_target(name).folder for name in ("rtx:sm89", "rtx:sm120+sm86", "trt")]
    assert folders == ["engines/rtx-sm89", "engines/rtx-sm86+sm120", "engines/trt"]
    assert len({parse_target(name).folder for name in NAMES}) == len(NAMES)


def every_precision() -> list[Precision]:
    return [*PRECISIONS.values(), *(precision(name, base) for name in QUANTIZED for base in ("fp16", "bf16"))]


def test_dialects() -> None:
    for name in NAMES:
        for p in every_precision():
            target = parse_target(name)
            shipped, stepped = dialect_of(target, p), stepped_dialect_of(target, p)
            assert shipped in DIALECTS and stepped in {*DIALECTS, "standard"}
            assert (shipped == "trt") == (target.flavour is not None)
            # ONNX Runtime's own graph is stepped through; of a TensorRT engine it is the standard one, on the CPU.
            assert stepped == shipped or stepped.startswith("standard")
            assert stepped.endswith("bf16") == (p.base == "bf16" and name != "ort-cuda")
            assert ("emulated-fp4" in stepped) == (p.name == "fp4")


def test_how_it_computes_is_said_in_words() -> None:
    words = {(n, p): execution_of(parse_target(n), precision) for n in NAMES for p, precision in PRECISIONS.items()}
    assert words["rtx:sm89", "fp16"] == "TensorRT-RTX, fp16 kernels, fused attention"
    assert words["rtx:sm89", "fp32"] == "TensorRT-RTX, fp32 kernels, written out attention"
    assert words["trt", "bf16"] == "TensorRT, bf16 kernels, fused attention"
    assert words["ort-cuda", "bf16"] == "ONNX Runtime on CUDA, bf16 kernels"
    assert "emulated" in words["ort-cpu", "bf16"] and "casts" in words["ort-cpu", "fp16"]


def test_what_is_quantized_is_said_in_words() -> None:
    def words(target: str, name: str, base: str = "fp16") -> str:
        return execution_of(parse_target(target), precision(name, base))

    assert words("rtx:sm89", "fp8") == "TensorRT-RTX, fp8 and fp16 kernels, fused attention"
    assert words("rtx:sm89", "int8", "bf16") == "TensorRT-RTX, int8 and bf16 kernels, fused attention"
    assert "fp4 emulated" in words("ort-cpu", "fp4") and "fp4 emulated" in words("ort-cuda", "fp4")
    assert "bf16 emulated" in words("ort-cpu", "fp4", "bf16") and "emulated" not in words("ort-cpu", "fp8")
    assert "fp8 by Quantize and Dequantize" in words("ort-cpu", "fp8")
