"""How much memory, disk and time each stage takes: measured figures, and what follows from them for a spec.

Memory is anonymous resident memory, as everywhere in this project. Mapped weights are counted apart: the kernel can
drop their pages, and then reads them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from mmdit_deploy.build import Target
from mmdit_deploy.calibration.sensitivity import units_of
from mmdit_deploy.calibration.trajectory import KEPT_STEPS, PROMPTS, SIZES, STEPS
from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.contract import Contract
from mmdit_deploy.model import Call, calls, conditioning_calls
from mmdit_deploy.model.partition import call_bytes, partition
from mmdit_deploy.precision import PrecisionPlan, linears
from mmdit_deploy.precision.weights import planned_call_bytes, planned_layout
from mmdit_deploy.preflight.plan import Plan, Stage, gb
from mmdit_deploy.runtime.memory import available_memory
from mmdit_deploy.spec import PRECISIONS, ModelSpec, Precision
from mmdit_deploy.verify.cases import default_cases
from mmdit_deploy.verify.records import Case
from mmdit_deploy.verify.whole import ORT_CPU_MEMORY_FACTOR

# Times were measured on 2 cores of an AMD EPYC without a GPU, one job at a time: they say minutes or hours, no more.

# bench/results/export_cost.json: tracing to lowered graphs takes 8.9 s at depth 24 and 8.4 s at depth 2.
GRAPH_SECONDS = 9.0
GRAPH_MEMORY = 400_000_000
GRAPH_DISK = 32 * 2**20  # graphs, reference, manifest and report, rounded up

# bench/results/export_cost.json: 39.0 s for SD3.5-Large's 16.1 GB less 19.5 s for SD3-Medium's 4.06 GB, from a
# checkpoint in the file cache. Random weights, 5 blocks 1536 wide, torch on one thread while another job had the second
# core: 11 s per 10^9 values as fp32, 12 s as fp16.
CHECKPOINT_SECONDS_PER_BYTE = 1.6e-9
RANDOM_SECONDS_PER_VALUE = 12e-9
# Tensors are streamed, so the largest counts. Peaks of export_cost.json, 0.378 GB and 0.421 GB, differ by the largest
# tensor's own 43 MB. Random weights are drawn in fp32 and converted: blocks 2432 wide peak 0.17 GB above 1536 wide,
# which is 7.8 bytes for each value that the largest tensor has more.
WEIGHTS_MEMORY = 350_000_000
RANDOM_BYTES_PER_VALUE = 8
# A tensor that a LoRA changes is held in fp32: measured 0.228 GB for one of 18432 × 3072.
MERGED_BYTES_PER_VALUE = 4
# Computed, not measured: a parameter in fp32 as it is quantized, with its codes and what is searched; smoothing makes
# another copy.
QUANTIZED_BYTES_PER_VALUE = 6
SMOOTHED_BYTES_PER_VALUE = 10

# bench/results/engine_build.json: TensorRT-RTX 1.7.1 for SM89, 24 joint blocks, 4.06 GB of fp16 weights, serialized to
# a stream: a peak of 5.7 GB of anonymous memory with the process's own, 2.0 GB in four segments; the weights' file is
# mapped besides. Three profiles were measured to take 3 × the kernels and 2 % more memory.
UNMEASURED = "these are TensorRT-RTX's figures; TensorRT times kernels as well, and takes longer, and GPU memory"
BUILD_SECONDS_PER_BYTE = 10.5e-9  # of weights, for each profile
PROCESS_MEMORY = 500_000_000  # Python with torch and TensorRT
BUILD_MEMORY = 130_000_000
BUILD_MEMORY_FACTOR = 1.4  # over the largest segment's weights
BUILD_MEMORY_PER_PROFILE = 0.01  # of that, for each profile after the first
BUILD_DISK_FACTOR = 1.02  # over the weights: they and the kernels
COMFORT = 0.9  # of the available memory: what the weights of a build and its memory should fit in together

# bench/results/parity_memory.json: depth 24 in fp16, streamed, 179 s and 1.06 GB; 168 s more with the whole engine.
# Taken to be arithmetic, and so to grow with parameters × tokens: 2.03e9 × 4083 there. Other sizes were not measured.
VERIFY_SECONDS_PER_VALUE_AND_TOKEN = 179 / 2.03e9 / 4083
WHOLE_SECONDS_PER_VALUE_AND_TOKEN = 168 / 2.03e9 / 4083
# Not measured: one evaluation of the eager model, of the four (two of them the engine's) of verification.
CALIBRATE_SECONDS_PER_VALUE_AND_TOKEN = VERIFY_SECONDS_PER_VALUE_AND_TOKEN / 4
# Not measured: evaluations of the model on the samples that calibration keeps. A budget follows each part from its own
# block to the end, and then measures several sets; an fp16 plan has each call exactly and a few times emulated.
BUDGET_PASSES_PER_UNIT = 0.5
BUDGET_PASSES = 8
FP16_PLAN_PASSES = 6
VERIFY_MEMORY = 350_000_000
VERIFY_BLOCK_FACTOR = 3  # over the largest call's weights in fp32 (eager call, session, its copy): fitted to 1.06 GB
VERIFY_BYTES_PER_TOKEN_AND_CHANNEL = 8  # computed, not measured: both chains' streams, of all cases at once
FP8_SCORES = 7  # tensors of scores in fp32 that the eager model holds as it computes an FP8 attention, and its slack


def make_plan(
    spec: ModelSpec,
    precision: Precision,
    contract: Contract,
    targets: Sequence[Target],
    *,
    from_checkpoint: bool,
    quantized: PrecisionPlan | None = None,
    calibrated: bool = False,
    budgeted: bool = False,
    islands: bool = False,
    merged: bool = False,
    segments: int | None = None,
    split: bool = False,
    verify: bool = True,
    thorough: bool = False,
    graph_only: bool = False,
    memory: int | None = None,
) -> Plan:
    """Say what an export will do and need. Nothing is refused for this machine's sake: that is `check_plan`'s.

    Args:
        from_checkpoint: weights are read; else they are made up.
        quantized: what is quantized, as `mmdit_deploy.precision.structure` has it; None for nothing.
        calibrated: the eager model is calibrated first; on how much is that of its own trajectories.
        budgeted: and of what is quantized, as much is chosen as a budget allows.
        islands: and what fp16 must keep in fp32 is found.
        merged: LoRAs are added to the weights, in fp32.
        segments: engines that each TensorRT target is cut into; None for as few as fit comfortably.
        split: the conditioning is an engine of its own, and only the trunk is cut into segments.
        verify, thorough, graph_only: as in an export.
        memory: bytes available; what this process may still take where not given.

    Raises:
        UsageError: there are not as many blocks as segments.
    """
    memory = available_memory() if memory is None else memory
    cut = [target for target in targets if target.flavour is not None]
    table = parameters(spec)
    numel = sum(p.numel for p in table)
    quantized = quantized or PrecisionPlan(precision)
    total = planned_layout(spec, quantized, {"format": "pt"}).total_bytes
    stages = [_calibration(spec, numel)] if calibrated else []
    if calibrated and budgeted:
        passes = BUDGET_PASSES + BUDGET_PASSES_PER_UNIT * len(units_of(spec, quantized))
        stages.append(_search("budget", spec, numel, passes))
    if calibrated and islands:
        stages.append(_search("fp16 plan", spec, numel, FP16_PLAN_PASSES))
    stages.append(Stage("graph", GRAPH_SECONDS, GRAPH_MEMORY, disk_bytes=GRAPH_DISK))
    counts: dict[str, int] = {}
    whole, bytes_of = calls(spec), planned_call_bytes(spec, quantized)
    apart = conditioning_calls(whole) if split else ()
    trunk = [call for call in whole if call not in apart]
    largest_of = _largest_segment(trunk, bytes_of)
    if not graph_only:
        largest = max(math.prod(part.shape) for p in table for part in p.parts)
        stages.append(
            Stage(
                "weights",
                total * CHECKPOINT_SECONDS_PER_BYTE if from_checkpoint else numel * RANDOM_SECONDS_PER_VALUE,
                WEIGHTS_MEMORY
                + max(
                    largest * (precision.itemsize if from_checkpoint else RANDOM_BYTES_PER_VALUE),
                    _quantizing(spec, quantized),
                )
                + largest * (MERGED_BYTES_PER_VALUE if merged else 0),
                disk_bytes=total,
            )
        )
        profiles = len(contract.profiles)
        if cut:
            auto = _fewest(largest_of, len(spec.block_names), profiles, memory)
            count = auto if segments is None else segments
            counts = {target.name: count for target in cut}
            conditioning = sum(bytes_of[call.path] for call in apart)
            for target in cut:
                stages.append(_build(target, total - conditioning, largest_of, count, auto, profiles, memory))
                if split:
                    stages.append(_build_conditioning(target, conditioning))
        if verify:
            cases = default_cases(contract, precision, thorough=thorough)
            stages += _verifications(spec, numel, targets, cases, memory, thorough, bool(quantized.attentions))
    return Plan(numel, total, tuple(stages), counts, memory)


def _calibration(spec: ModelSpec, numel: int) -> Stage:
    """Trajectories of the eager model; weights are kept between steps only where there is room."""
    tokens = _sampled_tokens()
    return Stage(
        "calibrate",
        numel * tokens * STEPS * CALIBRATE_SECONDS_PER_VALUE_AND_TOKEN,
        VERIFY_MEMORY
        + max(call_bytes(spec, PRECISIONS["fp32"]).values())
        + tokens * (VERIFY_BYTES_PER_TOKEN_AND_CHANNEL * spec.width + 4 * spec.mlp_width),
    )


def _search(name: str, spec: ModelSpec, numel: int, passes: float) -> Stage:
    """What is found out by running the eager model again and again, on the samples that calibration kept.

    Each sample has an exact chain and another one; a call's weights are there exactly, and as they are tried.
    """
    tokens = len(KEPT_STEPS) * _sampled_tokens()
    return Stage(
        name,
        numel * tokens * passes * CALIBRATE_SECONDS_PER_VALUE_AND_TOKEN,
        VERIFY_MEMORY
        + VERIFY_BLOCK_FACTOR * max(call_bytes(spec, PRECISIONS["fp32"]).values())
        + tokens * (2 * VERIFY_BYTES_PER_TOKEN_AND_CHANNEL * spec.width + 4 * spec.mlp_width),
    )


def _sampled_tokens() -> int:
    """Tokens of one step of all trajectories."""
    return PROMPTS * sum(rows * cols + txt_tokens for rows, cols, txt_tokens in SIZES)


def _quantizing(spec: ModelSpec, plan: PrecisionPlan) -> int:
    """Memory of quantizing the parameter that takes most."""
    table = linears(spec)
    return max(
        (
            table[path].numel * (SMOOTHED_BYTES_PER_VALUE if linear.scheme.smooth else QUANTIZED_BYTES_PER_VALUE)
            for path, linear in plan.linears.items()
        ),
        default=0,
    )


def _largest_segment(chain: Sequence[Call], weights: Mapping[str, int]) -> Callable[[int], int]:
    """Bytes of the largest segment's weights, by the number of segments."""
    return lambda segments: max(sum(weights[p] for p in run) for run in partition(chain, weights, segments))


def _build_memory(largest: int, profiles: int) -> int:
    """Anonymous memory of building segments one after the other."""
    factor = BUILD_MEMORY_FACTOR * (1 + BUILD_MEMORY_PER_PROFILE * (profiles - 1))
    return PROCESS_MEMORY + BUILD_MEMORY + round(factor * largest)


def _fewest(largest_of: Callable[[int], int], blocks: int, profiles: int, memory: int) -> int:
    """The fewest segments whose build fits comfortably; where none does, the fewest of the smallest there are."""
    best, smallest = 1, largest_of(1)
    for count in range(1, blocks + 1):
        largest = largest_of(count)
        if _build_memory(largest, profiles) + largest <= COMFORT * memory:
            return count
        if largest < smallest:
            best, smallest = count, largest
    return best


def _build(
    target: Target, total: int, largest_of: Callable[[int], int], count: int, auto: int, profiles: int, memory: int
) -> Stage:
    largest = largest_of(count)
    if auto != count and _build_memory(largest_of(auto), profiles) <= memory:
        remedy = f"--segments {auto}, or --segments auto"
    else:
        needed = gb(_build_memory(largest_of(auto), profiles))
        remedy = f"build {target.name} where there is more memory: even in {auto} segments it takes {needed}"
    return Stage(
        f"build {target.name} ({count} segment{'s' if count > 1 else ''})",
        total * profiles * BUILD_SECONDS_PER_BYTE,
        _build_memory(largest, profiles),
        mapped_bytes=largest,
        disk_bytes=round(BUILD_DISK_FACTOR * total),
        remedy=remedy,
        caveat=UNMEASURED if target.flavour and target.flavour.timing_cache else "",
    )


def _build_conditioning(target: Target, nbytes: int) -> Stage:
    """Modulation is one product, and so one segment, of one profile."""
    return Stage(
        f"build {target.name} conditioning",
        nbytes * BUILD_SECONDS_PER_BYTE,
        _build_memory(nbytes, 1),
        mapped_bytes=nbytes,
        disk_bytes=round(BUILD_DISK_FACTOR * nbytes),
        remedy="drop --split-conditioning: each block's modulation is then built with the block",
        caveat=UNMEASURED if target.flavour and target.flavour.timing_cache else "",
    )


def _verifications(
    spec: ModelSpec,
    numel: int,
    targets: Sequence[Target],
    cases: Sequence[Case],
    memory: int,
    thorough: bool,
    fp8_attention: bool,
) -> list[Stage]:
    """Each ONNX Runtime target block by block, and for all TensorRT targets the standard graph.

    What runs on a GPU besides is not in it: there are no figures for that.
    """
    tokens = sum(case.batch * (case.img_tokens + case.txt_tokens) for case in cases)
    most = max(case.batch * (case.img_tokens + case.txt_tokens) for case in cases)
    # The standard Attention holds the scores of all pairs of tokens in fp32; com.microsoft's does so with a mask alone.
    scores = max(4 * case.batch * spec.num_heads * (case.img_tokens + case.txt_tokens) ** 2 for case in cases)
    streamed = (
        VERIFY_MEMORY
        + VERIFY_BLOCK_FACTOR * max(call_bytes(spec, PRECISIONS["fp32"]).values())
        + VERIFY_BYTES_PER_TOKEN_AND_CHANNEL * (tokens * spec.width + most * spec.mlp_width)
        + (FP8_SCORES * scores if fp8_attention else 0)
    )
    work = numel * tokens
    seconds = work * VERIFY_SECONDS_PER_VALUE_AND_TOKEN
    remedy = ("drop --thorough, or " if thorough else "") + "add --no-verify, and run mmdit-verify where there is more"
    stages = []
    for target in targets:
        if target.flavour is not None:
            continue
        held = streamed + (scores if spec.txt_mask else 0)
        stages.append(Stage(f"verify {target.name}", seconds, held, remedy=remedy))
        # Done where it fits, and left out elsewhere: never a reason to refuse.
        whole = round(ORT_CPU_MEMORY_FACTOR * 4 * numel)
        if target.name == "ort-cpu" and whole <= memory:
            stages.append(Stage("verify ort-cpu (whole engine)", work * WHOLE_SECONDS_PER_VALUE_AND_TOKEN, whole))
    if any(target.flavour is not None for target in targets):
        # In full, or beside an ONNX Runtime target once per kind of call.
        some = seconds / len(spec.block_names) if stages else seconds
        stages.append(Stage("verify model.onnx", some, streamed + scores, remedy=remedy))
    return stages
