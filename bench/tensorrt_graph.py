"""What TensorRT-RTX makes of our graph: kernels and bytes by block, against the graph before and the plain export.

Engines for SM89 are built without a GPU, from a few blocks at real width with random weights, and their lists of
kernels are read. Bytes are those that kernels read and write at the opt shape (`mmdit_deploy/build/traffic.py`), the
floor is what a block must move at least (`mmdit_deploy/build/floor.py`). No kernel is run and no time is measured.

- `ours`: the graph that mmdit-export builds.
- `before`: the same without joining the norms of Q and K, as the project built it before.
- `plain`: torch.onnx.export of diffusers' SD3, at opset 23, as it comes; per joint block, (kernels at depth 5 − those
  at depth 3) / 2. Its image size is static, because the model crops positions by Python integers. Its bytes are read
  from a second build with every size fixed, where the list itself has all dims; ours too, for that comparison.

    python bench/tensorrt_graph.py          SD3-like: width 1536, batch 1:2:4, 4096 + 333 tokens
    python bench/tensorrt_graph.py --flux   also FLUX.1-dev, 2 + 4 blocks at real width
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from measure import write_result

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "dist" / "bench" / "tensorrt_graph"
HEADS = 24
OPT = {"batch": 2, "img_tokens": 4096, "txt_tokens": 333}
BOUNDS = {"kernels_per_joint_block": 17, "bytes_over_before": 0.80, "kernels_per_single_block": 8}
AIMS = {"kernels_per_joint_block": 14, "bytes_over_floor": 1.2}


def ours(spec: Any, *, joined: bool, fixed: bool) -> dict[str, Any]:
    """One build of our graph; the last block of SD3 is smaller, so blocks in the middle are reported."""
    import onnx_ir as ir

    from mmdit_deploy.contract import Contract, Range
    from mmdit_deploy.graph.lower import DIALECTS
    from mmdit_deploy.graph.lower.joint_qk_norm import joint_qk_norm
    from mmdit_deploy.graph.onnx_file import to_ir
    from mmdit_deploy.graph.passes import run
    from mmdit_deploy.model import calls
    from mmdit_deploy.spec import precision

    fp16 = precision("fp16")
    folder = WORK / spec.name
    if not (folder / "model.onnx").exists():
        from mmdit_deploy.checkpoint.weights import RandomWeights
        from mmdit_deploy.export import ExportRequest, export

        export(ExportRequest(spec, RandomWeights(0), fp16, ("ort-cpu",), out=folder, force=True, verify=False))
    model = to_ir(onnx.load(folder / "model.onnx", load_external_data=False), folder)
    run(model, [step for step in DIALECTS["trt"] if joined or step is not joint_qk_norm])
    ranges = {axis: Range(size, size, size) for axis, size in OPT.items()} if fixed else {}
    profiles = Contract.of(spec, fp16, ranges).profiles
    return built(ir.to_proto(model), folder, profiles, [call.path for call in calls(spec)])


def built(graph: onnx.ModelProto, folder: Path, profiles: Any, calls: list[str]) -> dict[str, Any]:
    """Kernels and bytes of an engine, whole and by call."""
    from mmdit_deploy.build.build_log import BuildLog
    from mmdit_deploy.build.engine_builder import build_engine
    from mmdit_deploy.build.flavours import RTX
    from mmdit_deploy.build.layers import kernels_by_call
    from mmdit_deploy.build.opt_sizes import at_opt
    from mmdit_deploy.build.traffic import traffic_by_call, traffic_of

    engine = folder / "bench.engine"
    engine.unlink(missing_ok=True)
    with BuildLog(folder / "build.log", lambda line: print(line, file=sys.stderr)) as log:
        made = build_engine(RTX, graph, folder, engine, log, profiles=profiles, capabilities=("sm89",))
    engine.unlink()
    layers = at_opt(made.layers, graph, profiles)
    kernels = [layer for layer in layers if layer.is_kernel]
    return {
        "kernels": len(kernels),
        "kernels_by_call": kernels_by_call(layers, calls),
        "bytes": traffic_of(kernels).to_json(),
        "bytes_by_call": {call: moved.to_json() for call, moved in traffic_by_call(layers, calls).items()},
        "fused_attentions": sum(layer.is_fused_attention for layer in kernels),
        "activation_bytes": made.activation_bytes,
        "list": [[layer.name, layer.type] for layer in kernels],
    }


def plain(depth: int, *, fixed: bool) -> dict[str, Any]:
    """The plain export of diffusers' SD3, built with the same profile."""
    import torch
    from rivals import export_plainly, save, sd3

    from mmdit_deploy.contract import Range

    folder = WORK / f"plain-{depth}"
    if not (folder / "model.onnx").exists():
        torch.manual_seed(0)
        program, _ = export_plainly(sd3(depth, HEADS, torch.float16), torch.float16, side=64)
        save(program, folder)
        torch.set_default_dtype(torch.float32)
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    sizes = {"batch": Range(1, 2, 4), "txt_tokens": Range(2, 333, 512)}
    if fixed:
        sizes = {axis: Range(size.opt, size.opt, size.opt) for axis, size in sizes.items()}
    return built(graph, folder, (sizes,), [])


def block(made: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One block of a build."""
    return {"kernels": made["kernels_by_call"][name], **made["bytes_by_call"][name]}


def per_block(deep: Mapping[str, Any], shallow: Mapping[str, Any], blocks: int) -> dict[str, float]:
    """Of plain exports, whose kernels belong to no call."""
    return {
        "kernels": (deep["kernels"] - shallow["kernels"]) / blocks,
        **{k: (deep["bytes"][k] - shallow["bytes"][k]) / blocks for k in ("read", "weights", "written", "bytes")},
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--flux", action="store_true")
    args = p.parse_args()
    from mmdit_deploy.build.floor import floors
    from mmdit_deploy.contract import Contract
    from mmdit_deploy.families import preset
    from mmdit_deploy.spec import ModelSpec, precision

    WORK.mkdir(parents=True, exist_ok=True)
    spec = ModelSpec("sd3-4", 4, HEADS)
    builds = {
        f"{name}{', sizes fixed' if fixed else ''}": ours(spec, joined=name == "ours", fixed=fixed)
        for name in ("ours", "before")
        for fixed in (False, True)
    }
    plains = {fixed: [plain(depth, fixed=fixed) for depth in (5, 3)] for fixed in (False, True)}
    floor = floors(spec, OPT, 2)["blocks.1"]
    joint = {name: block(made, "blocks.1") for name, made in builds.items()}
    joint["plain"] = {"kernels": per_block(*plains[False], 2)["kernels"]}
    joint["plain, sizes fixed"] = per_block(*plains[True], 2)
    of, was, rival = (joint[f"{name}, sizes fixed"]["bytes"] for name in ("ours", "before", "plain"))
    result: dict[str, Any] = {
        "sizes": OPT,
        "joint_block": joint,
        "floor_bytes": floor.nbytes,
        "bounds": BOUNDS,
        "aims": AIMS,
        "ratios": {
            "kernels_per_joint_block": joint["ours"]["kernels"],
            "bytes_over_before": of / was,
            "bytes_over_plain": of / rival,
            "bytes_over_floor": of / floor.nbytes,
            "activation_bytes_over_before": builds["ours"]["activation_bytes"] / builds["before"]["activation_bytes"],
        },
    }
    if args.flux:
        flux = dataclasses.replace(preset("flux1-dev"), name="flux1-dev-2-4", depth=2, single_depth=4)
        made = {name: ours(flux, joined=name == "ours", fixed=False) for name in ("ours", "before")}
        profile = Contract.of(flux, precision("fp16")).profiles[0]
        least = floors(flux, {axis: sizes.opt for axis, sizes in profile.items()}, 2)
        result["flux1"] = {
            name: {call: block(build, call) for call in ("blocks.1", "single_blocks.1")} for name, build in made.items()
        }
        result["flux1"]["floor_bytes"] = {call: least[call].nbytes for call in ("blocks.1", "single_blocks.1")}
        result["ratios"]["kernels_per_single_block"] = result["flux1"]["ours"]["single_blocks.1"]["kernels"]
    shutil.rmtree(WORK)
    write_result("tensorrt_graph", result)


if __name__ == "__main__":
    main()
