"""The TensorRT runtime on a fake of TensorRT (`fake_tensorrt`); test_tensorrt_gpu.py has the real one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_tensorrt import FakeStream
from mmdit_deploy.build import EngineRecord
from mmdit_deploy.contract import Range
from mmdit_deploy.errors import ContractError, MachineError
from mmdit_deploy.runtime import TensorRTEngine, tensorrt
from mmdit_deploy.runtime.chain import last_read
from mmdit_deploy.runtime.tensorrt import choose_profile

Build = Callable[..., tuple[EngineRecord, list[Path]]]
TARGETS = ("rtx:sm89", "trt")


def same(received: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return received.keys() == wanted.keys() and all(torch.equal(received[n], wanted[n]) for n in wanted)


# ---- running ----


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_the_segments_run_as_one_at_any_shape(
    fake: Any, chain: Any, build: Build, target: str, cuda_graphs: bool
) -> None:
    engine = TensorRTEngine(*build(target), cuda_graphs=cuda_graphs)
    assert fake.loaded == ["segment-0", "segment-1", "segment-2"]
    for seed, (batch, img_tokens) in enumerate([(2, 9), (1, 2), (4, 64), (2, 9), (2, 9)]):
        inputs = chain.feed(batch, img_tokens, seed)
        before = {name: t.clone() for name, t in inputs.items()}
        assert same(chain.run(engine, inputs), chain.expected(inputs))
        assert same(inputs, before)


@pytest.mark.parametrize("target", TARGETS)
def test_it_reads_and_writes_the_tensors_own_memory(fake: Any, chain: Any, build: Build, target: str) -> None:
    engine = TensorRTEngine(*build(target))
    inputs = chain.feed()
    results, sizes = chain.outputs(inputs)
    engine.run(inputs, results, sizes)
    first, second, last = fake.addresses
    assert first["timestep"] == inputs["timestep"].data_ptr()
    assert first["hidden_states"] == last["hidden_states"] == inputs["hidden_states"].data_ptr()
    assert second["blocks.0"] == last["blocks.0"] == results["blocks.0"].data_ptr()
    assert last["sample"] == results["sample"].data_ptr()
    assert first["h"] == second["h"] and first["c"] == last["c"] and second["g"] == last["g"]


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_views_and_odd_addresses_are_copied(fake: Any, chain: Any, build: Build, cuda_graphs: bool) -> None:
    """TensorRT takes no strides, and no address but multiples of 256 bytes."""
    engine = TensorRTEngine(*build(), cuda_graphs=cuda_graphs)
    plain = chain.feed()
    wanted = chain.expected(plain)
    strided = {name: torch.stack([t, t], dim=-1)[..., 0] for name, t in plain.items()}
    offset = {name: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for name, t in plain.items()}
    assert not strided["hidden_states"].is_contiguous() and offset["hidden_states"].data_ptr() % 64
    for inputs in (strided, offset):
        assert same(chain.run(engine, inputs), wanted)
    results, sizes = chain.outputs(plain)
    odd = {name: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for name, t in results.items()}
    engine.run(plain, odd, sizes)
    assert same(odd, wanted)
    assert all(address % 64 == 0 for addresses in fake.addresses for address in addresses.values())


def test_addresses_on_a_gpu_are_multiples_of_256() -> None:
    assert tensorrt.ALIGNMENT == 256


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_gradients_and_inference_mode_do_not_matter(
    fake: Any, chain: Any, build: Build, target: str, cuda_graphs: bool
) -> None:
    """A tensor that was made in inference mode cannot be written to outside of it: not one of ours is."""
    engine = TensorRTEngine(*build(target), cuda_graphs=cuda_graphs)
    inputs = chain.feed()
    wanted = chain.expected(inputs)
    with torch.inference_mode():
        assert same(chain.run(engine, inputs), wanted)
    for tensor in inputs.values():
        tensor.requires_grad_()
    received = chain.run(engine, inputs)
    assert same(received, wanted) and not any(t.requires_grad for t in received.values())


def test_tensors_between_segments_are_given_back_after_their_last_reader(
    fake: Any, chain: Any, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, files = build()
    assert last_read(record.segments) == [
        {"timestep"},
        {"h"},
        {"g", "c", "blocks.0", "hidden_states", "sample"},
    ]
    engine = TensorRTEngine(record, files)
    inputs = chain.feed()
    # What is freed may be given to the next tensor, here as on a GPU: g may come where h was.
    for _ in range(3):
        assert same(chain.run(engine, inputs), chain.expected(inputs))


def test_shapes_are_set_when_they_change(fake: Any, chain: Any, build: Build) -> None:
    engine = TensorRTEngine(*build())
    inputs, other = chain.feed(), chain.feed(1, 5)
    for feed, times in ((inputs, 1), (inputs, 1), (other, 2), (inputs, 3)):
        chain.run(engine, feed)
        assert fake.count("shape timestep") == times


# ---- profiles ----


def test_the_first_profile_that_holds_all_sizes_is_taken(chain: Any) -> None:
    sizes = {"batch": 2, "img_tokens": 9, "txt_tokens": 4}
    assert choose_profile((chain.narrow, chain.ranges), sizes) == 0
    assert choose_profile((chain.ranges, chain.narrow), sizes) == 0
    assert choose_profile((chain.narrow, chain.ranges), {**sizes, "img_tokens": 17}) == 1
    assert choose_profile((chain.narrow, chain.ranges), {**sizes, "img_tokens": 16}) == 0


def test_sizes_that_no_profile_holds(chain: Any) -> None:
    """Each size may be in some profile's range: all must be in one's."""
    one = {"batch": Range(1, 1, 1), "img_tokens": Range(2, 8, 64), "txt_tokens": Range(2, 4, 8)}
    two = {"batch": Range(2, 2, 4), "img_tokens": Range(2, 4, 8), "txt_tokens": Range(2, 4, 8)}
    with pytest.raises(ContractError) as caught:
        choose_profile((one, two), {"batch": 2, "img_tokens": 9, "txt_tokens": 4})
    assert "batch=2,img_tokens=9,txt_tokens=4" in str(caught.value.received)
    assert "batch of batch=1:1:1,img_tokens=2:8:64" in str(caught.value.received)
    assert "img_tokens of batch=2:2:4,img_tokens=2:4:8" in str(caught.value.received)
    assert "--profile batch=2,img_tokens=9,txt_tokens=4" in str(caught.value.fix) and caught.value.exit_status == 2


@pytest.mark.parametrize("target", TARGETS)
def test_each_profile_has_contexts_of_its_own(fake: Any, chain: Any, build: Build, target: str) -> None:
    """The first profile's are made at load: what lacks memory fails there."""
    engine = TensorRTEngine(*build(target, (chain.narrow, chain.ranges)))
    assert [c.profile for c in fake.contexts] == [0, 0, 0]
    for img_tokens, made in ((9, 3), (16, 3), (17, 6), (9, 6), (40, 6)):
        inputs = chain.feed(2, img_tokens)
        assert same(chain.run(engine, inputs), chain.expected(inputs))
        assert len(fake.contexts) == made
    assert [c.profile for c in fake.contexts] == [0, 0, 0, 1, 1, 1]


def test_all_contexts_share_one_workspace(fake: Any, chain: Any, build: Build) -> None:
    engine = TensorRTEngine(*build("rtx:sm89", (chain.narrow, chain.ranges)))
    chain.run(engine, chain.feed(2, 40))
    assert len(fake.contexts) == 6 and len({c.memory for c in fake.contexts}) == 1
    assert {config.allocation.name for config in fake.configs} == {"USER_MANAGED"}


# ---- streams ----


def test_work_goes_to_the_callers_stream(fake: Any, chain: Any, build: Build) -> None:
    engine = TensorRTEngine(*build())
    mine = FakeStream()
    with torch.cuda.stream(mine):
        chain.run(engine, chain.feed())
        chain.run(engine, chain.feed())
    ran = [e for e in fake.events if e.startswith("run")]
    assert len(ran) == 6 and all(e.endswith(f" on {mine.cuda_stream}") for e in ran)


def test_the_default_stream_is_worked_for_beside_it(fake: Any, chain: Any, build: Build) -> None:
    """TensorRT waits for the whole device around a call on the default stream, and cannot capture there."""
    engine = TensorRTEngine(*build())
    fake.events.clear()
    chain.run(engine, chain.feed())
    own = next(e for e in fake.events if e.startswith("run")).rsplit(" ", 1)[1]
    assert own != "0"
    assert fake.events[0] == f"{own} waits for 0" and fake.events[-1] == f"0 waits for {own}"
    assert "synchronize" not in fake.events


def test_a_call_on_another_stream_waits_for_the_call_before(fake: Any, chain: Any, build: Build) -> None:
    """They share activation memory."""
    engine = TensorRTEngine(*build())
    one, two = FakeStream(), FakeStream()
    with torch.cuda.stream(one):
        chain.run(engine, chain.feed())
    fake.events.clear()
    with torch.cuda.stream(two):
        chain.run(engine, chain.feed())
        chain.run(engine, chain.feed())
    assert fake.events[0] == f"{two.cuda_stream} waits for the call on {one.cuda_stream}"
    assert fake.count(f"{two.cuda_stream} waits") == 1


def test_threads_take_turns(fake: Any, chain: Any, build: Build) -> None:
    engine = TensorRTEngine(*build())
    results: dict[int, bool] = {}

    def work(seed: int) -> None:
        inputs = chain.feed(1 + seed % 4, 4 + seed, seed)
        results[seed] = same(chain.run(engine, inputs), chain.expected(inputs))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(8), True)


# ---- CUDA graphs ----


def test_one_graph_is_captured_for_each_shape_and_profile(fake: Any, chain: Any, build: Build) -> None:
    engine = TensorRTEngine(*build("trt", (chain.narrow, chain.ranges)), cuda_graphs=True)
    for (batch, img_tokens), captured in (((2, 9), 1), ((2, 9), 1), ((2, 17), 2), ((1, 9), 3), ((2, 17), 3)):
        inputs = chain.feed(batch, img_tokens, seed=batch)
        assert same(chain.run(engine, inputs), chain.expected(inputs))
        assert fake.count("capture") == captured
    assert fake.count("replay") == 5


def test_what_is_captured_ran_once_before_and_has_contexts_of_its_own(fake: Any, chain: Any, build: Build) -> None:
    """TensorRT works new shapes into a context at its next run, and a graph breaks when its context changes."""
    engine = TensorRTEngine(*build("trt"), cuda_graphs=True)
    fake.events.clear()
    chain.run(engine, chain.feed())
    order = [e.split()[0] for e in fake.events if e.split()[0] in ("context", "run", "capture", "replay")]
    assert order == ["context"] * 3 + ["run"] * 3 + ["capture"] + ["run"] * 3 + ["replay"]
    captured = fake.addresses[3:]
    executed = len(fake.addresses)
    chain.run(engine, chain.feed())
    chain.run(engine, chain.feed(1, 7))
    assert len(fake.contexts) == 9
    assert len(fake.addresses) == executed + 6 and fake.count("run") == 12  # the third call's, twice; no others
    assert {a for addresses in captured for a in addresses.values()}.isdisjoint(
        a for addresses in fake.addresses[executed:] for a in addresses.values()
    )


def test_graphs_are_few_and_the_longest_unused_goes_first(
    fake: Any, chain: Any, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "MAX_GRAPHS", 2)
    engine = TensorRTEngine(*build("trt"), cuda_graphs=True)
    for img_tokens, captured in ((2, 1), (3, 2), (2, 2), (4, 3), (2, 3), (3, 4)):
        inputs = chain.feed(1, img_tokens)
        assert same(chain.run(engine, inputs), chain.expected(inputs))
        assert fake.count("capture") == captured, img_tokens
    # Before one is given up, what may still run it is waited for.
    assert "synchronize" in fake.events


def test_tensorrt_rtx_captures_its_own_graphs(fake: Any, chain: Any, build: Build) -> None:
    """It swaps kernels as it goes. The tensors are still ours, at the same addresses for the same shape."""
    plain = TensorRTEngine(*build())
    assert {c.cuda_graph_strategy for c in fake.configs} == {None}
    engine = TensorRTEngine(*build(), cuda_graphs=True)
    assert [c.cuda_graph_strategy.name for c in fake.configs[3:]] == ["WHOLE_GRAPH_CAPTURE"] * 3
    inputs = chain.feed()
    wanted = chain.run(plain, inputs)
    fake.addresses.clear()
    for seed in (0, 0, 1):
        chain.run(engine, chain.feed(seed=seed))
    assert same(chain.run(engine, inputs), wanted)
    assert not fake.count("capture") and fake.count("synchronize") == 0
    assert fake.addresses[:3] == fake.addresses[3:6] == fake.addresses[6:9]


def test_what_cannot_be_captured_is_said(fake: Any, chain: Any, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise RuntimeError("operation failed due to a previous error during capture\nmore")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end", fail)
    engine = TensorRTEngine(*build("trt"), cuda_graphs=True)
    with pytest.raises(MachineError, match="without cuda_graphs") as caught:
        chain.run(engine, chain.feed())
    assert "more" not in str(caught.value.received) and torch.cuda.current_stream().cuda_stream == 0
