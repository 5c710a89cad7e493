"""FLUX and Qwen-Image overflow in fp16: what leaves a block is clipped there, as diffusers does, and nowhere else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from mmdit_deploy.checkpoint.keys import Part, parameters
from mmdit_deploy.checkpoint.weights import RandomWeights, read_parameter
from mmdit_deploy.contract import Contract
from mmdit_deploy.graph.pipeline import Graphs
from mmdit_deploy.model import MMDiT
from mmdit_deploy.model.layers import FP16_MAX
from mmdit_deploy.runtime import open_session, run_session
from mmdit_deploy.spec import PRECISIONS, ModelSpec
from mmdit_deploy.verify import Case
from mmdit_deploy.verify.cases import case_inputs

CASE = Case(1, 3, 4, 5, timestep=500.25)
# The last layer of each stream's last block, whose bias is added to what the block returns.
LAST = {
    "flux1": ("single_transformer_blocks.2.proj_out.bias", "single_blocks.2"),
    "qwen-image": ("transformer_blocks.1.img_mlp.net.2.bias", "blocks.1"),
}
FP16 = PRECISIONS["fp16"]


class Overflowing(RandomWeights):
    """Random weights, but that one block adds about ±60000 to every channel, times its gate, twice."""

    def __init__(self, family: str):
        super().__init__(0)
        self.bias = LAST[family][0]

    def part(self, part: Part) -> Tensor:
        tensor = super().part(part)
        if part.key == self.bias:
            return torch.full_like(tensor, 60_000.0)
        if part.key.endswith((".norm.linear.bias", ".img_mod.1.bias")):
            return tensor + 3.0  # gates of about 3: three times 60000 is beyond fp16
        return tensor


@pytest.fixture(params=LAST)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def half_model(spec: ModelSpec, family: str) -> MMDiT:
    """Our eager model with fp16 weights; tables of frequencies stay fp32."""
    with torch.device("meta"):
        model = MMDiT(spec)
    state = {p.path: read_parameter(Overflowing(family), p, torch.float16) for p in parameters(spec)}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def run(model: MMDiT, block: str, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        sample, tokens = model(**inputs, outputs=(block,))
    return sample, tokens


def test_eager_overflows_without_and_not_with_it(family: str, tiny_families: Mapping[str, ModelSpec]) -> None:
    spec, block = tiny_families[family], LAST[family][1]
    inputs = case_inputs(CASE, Contract.of(spec, FP16, outputs=(block,)), spec)
    bare = dataclasses.replace(spec, fp16_clip=False)
    assert run(half_model(bare, family), block, inputs)[1].isinf().any()
    sample, tokens = run(half_model(spec, family), block, inputs)
    assert tokens.abs().max() == FP16_MAX and tokens.isfinite().all() and sample.isfinite().all()


def test_graphs_hold_it_in_fp16_alone(
    family: str,
    tiny_families: Mapping[str, ModelSpec],
    graphs_of: Callable[..., Graphs],
    save_graphs: Callable[..., Path],
    tmp_path: Path,
) -> None:
    spec, block = tiny_families[family], LAST[family][1]
    for precision in ("fp16", "fp32"):
        made = graphs_of(spec, precision, ("ort",), (block,))
        clips = sum(node.op_type == "Clip" for f in made.standard.functions for node in f.node)
        assert (clips > 0) == (precision == "fp16")
    graphs = graphs_of(spec, "fp16", ("ort",), (block,))
    contract = Contract.of(spec, FP16, outputs=(block,))
    inputs = case_inputs(CASE, contract, spec)
    expected = run(half_model(spec, family), block, inputs)
    folder = save_graphs(tmp_path, spec, Overflowing(family), graphs, "fp16")
    sizes = {"batch": CASE.batch, "img_tokens": CASE.img_tokens, "txt_tokens": CASE.txt_tokens}
    outputs = [(t.name, torch.float16, t.shape(sizes)) for t in contract.outputs]
    for file in ("model.onnx", "model.ort.onnx"):
        onnx.checker.check_model(str(folder / file))
        received = run_session(open_session(folder / file, "ort-cpu"), inputs, outputs)
        assert received[block].abs().max() == FP16_MAX
        torch.testing.assert_close(received["sample"], expected[0], rtol=0.02, atol=0.02)
