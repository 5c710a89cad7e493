"""The C API gives what Python gives, and every error as a status with a rule, what was received and a fix."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from mmdit_deploy.runtime import Engine

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def api() -> ModuleType:
    """The binding beside this file."""
    spec = importlib.util.spec_from_file_location("mmdit_c_api", Path(__file__).with_name("c_api.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lib(api: ModuleType, release: Path) -> Any:
    """The shared library."""
    return api.library(release / "libmmdit_engine.so")


@pytest.fixture(scope="module")
def engine(api: ModuleType, lib: Any, bundle_of: Callable[..., Path]) -> Any:
    """An engine in one piece."""
    loaded = api.CEngine(lib, bundle_of())
    yield loaded
    loaded.close()


def arrays(batch: int = 2, img_tokens: int = 20, txt_tokens: int = 7, seed: int = 0) -> Arrays:
    """Inputs of the tiny model."""
    made = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return made.standard_normal(shape).astype(np.float32)

    return {
        "hidden_states": normal(batch, img_tokens, 16),
        "encoder_hidden_states": normal(batch, txt_tokens, 24),
        "timestep": np.linspace(900, 500, batch, dtype=np.float32),
        "pooled_projections": normal(batch, 20),
        "img_ids": np.stack(np.divmod(np.arange(img_tokens), 5), -1).astype(np.float32),
    }


def tensors(api: ModuleType, named: Mapping[str, np.ndarray]) -> list[Any]:
    return [api.tensor(name, array) for name, array in named.items()]


def run(api: ModuleType, engine: Any, inputs: Arrays) -> np.ndarray:
    out = np.empty_like(inputs["hidden_states"])
    engine.run(tensors(api, inputs), [api.tensor("sample", out)])
    return out


def pythons(bundle: Path, inputs: Arrays) -> np.ndarray:
    with Engine.load(bundle) as engine:
        return engine({name: torch.from_numpy(array) for name, array in inputs.items()})["sample"].numpy()


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_a_step_is_pythons_to_the_bit_and_inputs_stay(
    api: ModuleType, lib: Any, bundle_of: Callable[..., Path], split: bool
) -> None:
    inputs = arrays()
    before = {name: array.copy() for name, array in inputs.items()}
    loaded = api.CEngine(lib, bundle_of(split=split))
    assert run(api, loaded, inputs).tobytes() == pythons(bundle_of(split=split), inputs).tobytes()
    assert all(np.array_equal(inputs[name], before[name]) for name in inputs)
    loaded.close()


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_a_step_of_a_schedule_is_the_call_with_all_inputs(
    api: ModuleType, lib: Any, bundle_of: Callable[..., Path], split: bool
) -> None:
    loaded = api.CEngine(lib, bundle_of(split=split))
    inputs = arrays()
    times = np.linspace(1000, 0, 6, dtype=np.float32).reshape(3, 2)
    table = loaded.condition(tensors(api, {"timestep": times, "pooled_projections": inputs["pooled_projections"]}))
    rest = {name: inputs[name] for name in ("hidden_states", "encoder_hidden_states", "img_ids")}
    for step in range(3):
        by_step = np.empty_like(inputs["hidden_states"])
        loaded.run_step(tensors(api, rest), table, step, [api.tensor("sample", by_step)])
        at_once = run(api, loaded, {**inputs, "timestep": times[step]})
        np.testing.assert_allclose(by_step, at_once, rtol=1e-5, atol=1e-6)
        assert split or np.array_equal(by_step, at_once)
    with pytest.raises(api.Refused, match="a step is one of the conditioning's 3"):
        loaded.run_step(tensors(api, rest), table, 3, [api.tensor("sample", by_step)])
    with pytest.raises(api.Refused, match="no input besides"):
        loaded.run_step(tensors(api, inputs if not split else {**rest, "modulation": times}), table, 0, [])
    lib.mmdit_conditioning_free(table)
    loaded.close()


def test_another_engines_conditioning_is_refused(api: ModuleType, lib: Any, bundle_of: Callable[..., Path]) -> None:
    first, second = api.CEngine(lib, bundle_of()), api.CEngine(lib, bundle_of())
    inputs = arrays()
    schedule = {"timestep": inputs["timestep"][None], "pooled_projections": inputs["pooled_projections"]}
    table = first.condition(tensors(api, schedule))
    rest = {name: inputs[name] for name in ("hidden_states", "encoder_hidden_states", "img_ids")}
    with pytest.raises(api.Refused, match="made by the engine that is called"):
        second.run_step(tensors(api, rest), table, 0, tensors(api, {"sample": inputs["hidden_states"].copy()}))
    lib.mmdit_conditioning_free(table)
    first.close()
    second.close()


def test_a_freed_engines_conditioning_is_refused_by_those_in_its_place(
    api: ModuleType, lib: Any, bundle_of: Callable[..., Path]
) -> None:
    freed = api.CEngine(lib, bundle_of())
    inputs = arrays()
    schedule = {"timestep": inputs["timestep"][None], "pooled_projections": inputs["pooled_projections"]}
    table = freed.condition(tensors(api, schedule))
    freed.close()
    rest = {name: inputs[name] for name in ("hidden_states", "encoder_hidden_states", "img_ids")}
    for _ in range(8):  # some get the memory that it had
        other = api.CEngine(lib, bundle_of())
        with pytest.raises(api.Refused, match="made by the engine that is called"):
            other.run_step(tensors(api, rest), table, 0, tensors(api, {"sample": inputs["hidden_states"].copy()}))
        other.close()
    lib.mmdit_conditioning_free(table)


def test_the_contract_is_the_bundles(api: ModuleType, engine: Any, bundle_of: Callable[..., Path]) -> None:
    contract = json.loads((bundle_of() / "manifest.json").read_text())["contract"]
    for kind in ("input", "output"):
        expected = {t["name"]: (api.DTYPES[t["dtype"]], t["axes"]) for t in contract[f"{kind}s"]}
        assert engine.specs(kind) == expected
    assert {axis: list(engine.range(axis)) for axis in contract["ranges"]} == contract["ranges"]
    assert engine.range("pixels") is None
    assert (engine.text("name"), engine.text("target")) == ("tiny", "ort-cpu")
    assert engine.lib.mmdit_engine_on_gpu(engine._handle) == 0
    assert engine.lib.mmdit_engine_time_scale(engine._handle) == 1.0


BROKEN: dict[str, tuple[Callable[[Arrays], Any], str]] = {
    "an input is missing": (lambda i: i.pop("img_ids"), "missing: img_ids"),
    "an unknown input": (lambda i: i.update(image=i["timestep"]), "unknown: image"),
    "another dtype": (lambda i: i.update(hidden_states=i["hidden_states"].astype(np.float16)), "is float32"),
    "another rank": (lambda i: i.update(timestep=i["timestep"][None]), "has the axes [batch]"),
    "another width": (lambda i: i.update(pooled_projections=i["pooled_projections"][:, :19].copy()), "must be 20"),
    "two sizes of one axis": (lambda i: i.update(timestep=i["timestep"][:1]), "batch is one size in all tensors"),
    "a batch beyond the range": (lambda i: i.update(arrays(batch=9)), "batch must be 1 to 8"),
    "no token": (lambda i: i.update(arrays(txt_tokens=0)), "pass at least one"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_inputs_that_break_the_contract_are_refused(api: ModuleType, engine: Any, case: str) -> None:
    change, said = BROKEN[case]
    inputs = arrays()
    change(inputs)
    with pytest.raises(api.Refused) as refusal:
        run(api, engine, inputs)
    assert refusal.value.kind == "contract"
    assert said in str(refusal.value)
    assert refusal.value.fix


def test_outputs_that_do_not_fit_are_refused(api: ModuleType, engine: Any) -> None:
    inputs = arrays()
    out = np.zeros_like(inputs["hidden_states"])
    given = tensors(api, inputs)
    for outputs, said in (
        ([], "missing: sample"),
        ([api.tensor("sample", out[:1])], "[2, 20, 16]"),
        ([api.tensor("sample", np.empty(out.shape, np.float16))], "float32 [2, 20, 16]"),
        ([api.tensor("sample", inputs["hidden_states"])], "sample overlaps hidden_states"),
        ([api.tensor("sample", out, data=None)], "a null pointer"),
        ([api.tensor("sample", out, data=out.ctypes.data + 1)], "a multiple of its elements' size"),
    ):
        with pytest.raises(api.Refused) as refusal:
            engine.run(given, outputs)
        assert refusal.value.kind == "contract" and said in str(refusal.value)


def test_calls_that_make_no_sense_are_refused(api: ModuleType, lib: Any, engine: Any, bundle_of: Any) -> None:
    inputs = arrays()
    out = np.empty_like(inputs["hidden_states"])
    given = tensors(api, inputs)
    for tensor, said in (
        (api.tensor(None, out), "a tensor has a name"),
        (api.tensor("x", out, dtype=9), "mmdit_dtype"),
        (api.tensor("x", out, rank=-1), "a tensor has a shape"),
        (api.tensor("x", out, shape=None), "a tensor has a shape"),
        (given[0], "named once"),
    ):
        with pytest.raises(api.Refused) as refusal:
            engine.run([*given, tensor], [])
        assert refusal.value.kind == "usage" and said in str(refusal.value)
    with pytest.raises(api.Refused, match="a stream is the GPU's"):
        engine.run(given, [api.tensor("sample", out)], stream=4096)
    for options, said in (
        ({"struct_size": 8}, "struct_size is sizeof"),
        ({"verify": 3}, "mmdit_verify"),
        ({"specialize": -1}, "mmdit_specialize"),
        ({"target": b"tpu"}, "a target is one of"),
    ):
        with pytest.raises(api.Refused, match=said) as refusal:
            api.CEngine(lib, bundle_of(), **options)
        assert refusal.value.kind == "usage"


def test_a_null_pointer_and_a_missing_bundle_are_errors(api: ModuleType, lib: Any, tmp_path: Path) -> None:
    assert lib.mmdit_engine_load(None, None, None, None) == 1
    assert lib.mmdit_error_message(None) == b""
    lib.mmdit_engine_free(None)
    with pytest.raises(api.Refused) as refusal:
        api.CEngine(lib, tmp_path / "nowhere")
    assert refusal.value.kind == "bundle"


def _receipt(bundle: Path) -> str:
    """What a receipt for a bundle's files as they are says."""
    content = (bundle / "manifest.json").read_bytes()
    lines = ["mmdit-deploy verified 1", f"manifest {hashlib.sha256(content).hexdigest()}"]
    for name in sorted(json.loads(content)["files"]):
        found = (bundle / name).stat()
        lines.append(f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {name}")
    return "\n".join(lines) + "\n"


def _flip_keeping_times(path: Path) -> None:
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_once_hashes_again_only_when_a_file_changed(api: ModuleType, lib: Any, bundle: Path, tmp_path: Path) -> None:
    once = {"verify": 1, "receipts": os.fsencode(tmp_path / "receipts")}
    api.CEngine(lib, bundle, **once).close()
    # Files that have just been written may be written again within the clock's tick: nothing is left yet.
    assert not list(tmp_path.glob("receipts/*"))
    time.sleep(2.1)
    api.CEngine(lib, bundle, **once).close()
    (receipt,) = (tmp_path / "receipts").iterdir()
    assert receipt.name == hashlib.sha256(os.fsencode(bundle.resolve())).hexdigest()
    assert receipt.read_text() == _receipt(bundle)
    assert (tmp_path / "receipts").stat().st_mode & 0o777 == 0o700

    _flip_keeping_times(bundle / "weights.safetensors")
    with pytest.raises(api.Refused, match="SHA-256"):
        api.CEngine(lib, bundle, **once)
    # Nobody hashes what a receipt vouches for: this one was written here, for the changed file.
    receipt.write_text(_receipt(bundle))
    api.CEngine(lib, bundle, **once).close()
    with pytest.raises(api.Refused, match="SHA-256"):
        api.CEngine(lib, bundle)
    # Another manifest needs another receipt, whatever the files.
    manifest = bundle / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(api.Refused, match="SHA-256"):
        api.CEngine(lib, bundle, **once)
    api.CEngine(lib, bundle, verify=2).close()


def test_a_copy_has_no_receipt_and_a_folder_that_cannot_be_written_to_is_no_error(
    api: ModuleType, lib: Any, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    api.CEngine(lib, bundle, verify=1, receipts=os.fsencode(tmp_path / "file/receipts")).close()
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    _flip_keeping_times(copy / "weights.safetensors")
    with pytest.raises(api.Refused, match="SHA-256"):
        api.CEngine(lib, copy, verify=1, receipts=os.fsencode(tmp_path / "receipts"))


def test_weights_are_mapped_while_the_engine_lives(api: ModuleType, lib: Any, bundle: Path) -> None:
    weights = str(bundle.resolve() / "weights.safetensors")
    loaded = api.CEngine(lib, bundle)
    assert weights in Path("/proc/self/maps").read_text()
    loaded.close()
    assert weights not in Path("/proc/self/maps").read_text()
