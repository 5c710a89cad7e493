"""What islands of fp32 cost in an fp16 engine: kernels and bytes by block, with nothing in fp32 and with this or that.

Engines for SM89 are built without a GPU from four joint blocks of SD3's width, and their lists of kernels are read. No
kernel is run and no time is measured. Bytes are those that kernels read and write at the opt shape.

- `pure`: nothing is in fp32.
- `auto`: the plan of a model whose image stream was scaled to overflow in blocks.2 and in the last block, as the
  calibration finds it.
- the others: one kind of region in all blocks, to see what each costs: the residual streams, the norms, gates and
  modulation, one linear layer's product, and an attention in bf16.

A block in the middle (`blocks.1`) stands for the kinds of regions; of `auto` every block is reported.

    python bench/fp16_islands.py
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from typing import Any

import torch
from measure import write_result
from tensorrt_graph import ROOT, block, built

from mmdit_deploy.calibration.fp16_emulation import Bound
from mmdit_deploy.calibration.fp16_ranges import ranges_of
from mmdit_deploy.calibration.fp16_regions import regions
from mmdit_deploy.calibration.fp16_search import plan_fp16
from mmdit_deploy.calibration.graph_values import fused_functions, graph_values
from mmdit_deploy.calibration.observe import Observer
from mmdit_deploy.checkpoint import write_safetensors
from mmdit_deploy.checkpoint.keys import Part
from mmdit_deploy.checkpoint.weights import RandomWeights, stream_parts, weights_layout
from mmdit_deploy.contract import Contract
from mmdit_deploy.eager.programs import programs_of
from mmdit_deploy.graph.pipeline import build_graphs
from mmdit_deploy.model import calls
from mmdit_deploy.precision import PrecisionPlan
from mmdit_deploy.spec import ModelSpec, precision
from mmdit_deploy.verify.cases import case_inputs
from mmdit_deploy.verify.records import Case
from mmdit_deploy.verify.tolerances import TOLERANCES

WORK = ROOT / "dist" / "bench" / "fp16_islands"
SPEC = ModelSpec("sd3-4", 4, 24)
FP16 = precision("fp16")
CONTRACT = Contract.of(SPEC, FP16)
Wide = Mapping[str, frozenset[str]]


class Overflowing(RandomWeights):
    """Random weights, but that the image's MLPs of the last two blocks make numbers beyond fp16."""

    def part(self, part: Part) -> torch.Tensor:
        tensor = super().part(part)
        return tensor * 2e5 if re.fullmatch(r"transformer_blocks\.[23]\.ff\.net\.2\.weight", part.key) else tensor


def plans() -> dict[str, Wide]:
    """What stays in fp32, by name of the build."""
    chain = calls(SPEC)
    programs, functions = programs_of(chain, torch.float16), fused_functions(chain, torch.float16)
    samples = [case_inputs(Case(1, 8, 9, 16, timestep=t), CONTRACT, SPEC) for t in (900.0, 100.0)]
    observer = Observer(SPEC, Overflowing(0), torch.float16, programs=programs)
    observer.evaluate(samples)
    tolerance = TOLERANCES["fp16"]
    auto = plan_fp16(
        SPEC,
        Overflowing(0),
        ranges_of(observer.statistics),
        samples,
        Bound(tolerance.min_cosine, tolerance.max_rel_l2),
        programs=programs,
        functions=functions,
    )
    print(auto.text())
    places = graph_values(programs, functions)
    everywhere: dict[str, dict[str, frozenset[str]]] = {}
    for call in chain:
        if call.block is None or call.modulates:
            continue
        function = functions[call.kind.function]
        for region in regions(function, dict.fromkeys(places[function.name].values.values())):
            name = "residual streams" if region.stream else region.label
            if name in ("residual streams", "norms of the streams", "gates and modulation", "product of img.mlp.down"):
                kept = everywhere.setdefault(name, {})
                # What modulates comes out of calls of their own, in fp16.
                inside = region.values - {"img_modulation", "txt_modulation"}
                kept[call.path] = kept.get(call.path, frozenset()) | inside
        values = frozenset({"split_2_split_2", "view_2", "cat_2"})  # the image's V, and all V
        everywhere.setdefault("attention in bf16", {})[call.path] = values
    return {"pure": {}, "auto": auto.wide, **{name: agreed(kept) for name, kept in everywhere.items()}}


def agreed(kept: dict[str, frozenset[str]]) -> Wide:
    """With the first block's inputs and the last one's output as their neighbours have them, in fp16."""
    first, last = "blocks.0", f"blocks.{SPEC.depth - 1}"
    return {
        **kept,
        first: kept[first] - {"hidden_states", "encoder_hidden_states"},
        last: kept[last] - {"img_out"},
    }


def build(wide: Wide) -> dict[str, Any]:
    """Kernels and bytes of an engine, by call."""
    plan = PrecisionPlan(FP16, wide=wide)
    graphs = build_graphs(SPEC, CONTRACT, FP16, weights_layout(SPEC, torch.float16), dialects=("trt",), plan=plan)
    return built(graphs.of("trt"), WORK, CONTRACT.profiles, [call.path for call in calls(SPEC)])


def main() -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    write_safetensors(
        WORK / "weights.safetensors",
        weights_layout(SPEC, torch.float16),
        stream_parts(SPEC, RandomWeights(0), torch.float16),
    )
    made = {}
    for name, wide in plans().items():
        made[name] = build(wide)
        print(name, block(made[name], "blocks.1"), flush=True)
    shutil.rmtree(WORK)
    pure = {path: block(made["pure"], path) for path in (f"blocks.{i}" for i in range(SPEC.depth))}

    def cost(of: str, path: str) -> dict[str, Any]:
        now, before = block(made[of], path), pure[path]
        return {
            **now,
            "kernels_more": now["kernels"] - before["kernels"],
            "bytes_over_pure": round(now["bytes"] / before["bytes"], 4),
        }

    write_result(
        "fp16_islands",
        {
            "spec": {"width": SPEC.width, "depth": SPEC.depth},
            "sizes": {axis: size.opt for axis, size in CONTRACT.profiles[0].items()},
            "pure": pure,
            "auto": {path: cost("auto", path) for path in pure},
            "one kind in all blocks, blocks.1": {
                name: cost(name, "blocks.1") for name in made if name not in ("pure", "auto")
            },
            "fused_attentions": {name: one["fused_attentions"] for name, one in made.items()},
            "engine": {name: {"kernels": one["kernels"], "bytes": one["bytes"]["bytes"]} for name, one in made.items()},
        },
    )


if __name__ == "__main__":
    main()
