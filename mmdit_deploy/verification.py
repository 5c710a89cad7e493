"""Verify a bundle on the disk: what `mmdit-verify` does, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir

from mmdit_deploy.build import Target, parse_target, stepped_dialect_of
from mmdit_deploy.bundle import Bundle, open_bundle
from mmdit_deploy.calibration.bundle_plan import bundle_plan
from mmdit_deploy.checkpoint.same import check_same
from mmdit_deploy.checkpoint.weights import RandomWeights, WeightSource, open_weights
from mmdit_deploy.errors import BundleError, MachineError, MMDiTError, UsageError
from mmdit_deploy.graph.lower import lower
from mmdit_deploy.lora import LoraWeights, open_recorded
from mmdit_deploy.runtime import (
    check_runnable,
    check_runs_here,
    engine_files,
    engine_graph,
    engine_parts,
    runnable_target,
    stepped_graph,
)
from mmdit_deploy.verify import (
    EngineUnderTest,
    Reference,
    Verdict,
    default_cases,
    verify_against_reference,
    verify_against_weights,
)
from mmdit_deploy.verify.image import load_decoder
from mmdit_deploy.verify.noise_floor import FloorRequest
from mmdit_deploy.verify.reference import FILE_NAME
from mmdit_deploy.verify.sampling import Sampler
from mmdit_deploy.verify.streaming import Progress
from mmdit_deploy.verify.tolerances import DEFAULTS, load_tolerances
from mmdit_deploy.verify.trajectory import with_trajectories


def verify_bundle(
    path: str | Path,
    *,
    target: str = "auto",
    checkpoint: str | Path | None = None,
    loras: Sequence[str | Path] = (),
    full: bool = False,
    thorough: bool = False,
    whole: bool = True,
    noise_floor: FloorRequest | None = None,
    tolerances: str | Path | None = None,
    sampler: Sampler | None = None,
    decode: str | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Compare a bundle's engine with the eager fp32 model.

    Args:
        target: the engine, e.g. ``ort-cpu``; ``auto`` takes what this machine can run.
        checkpoint: what the bundle was made from: every block is compared on equal inputs.
        loras: files of LoRAs that it was made with, where they do not lie any more where they lay.
        full: the same for a bundle with random weights, which are made again from its seed.
        thorough: more and larger shapes, with `checkpoint` or `full`.
        whole: also run the whole engine in one session, where memory allows; without, one block is in memory.
        noise_floor: what errors are compared with, with `checkpoint` or `full`: see
            `mmdit_deploy.verify.noise_floor.floor_ways`; by default ``auto``.
        tolerances: a file of the user's own bounds, see `mmdit_deploy.verify.tolerances.load_tolerances`.
        sampler: also sample with both from the same noise, and compare each step and the image at the end, with
            `checkpoint` or `full`.
        decode: what makes images of its latents, as ``module:function``.

    Returns:
        The verdict; without a checkpoint, against what was recorded at export.

    Raises:
        BundleError: the bundle is not whole, or has no engines or nothing to compare with.
        UsageError: the checkpoint is another model's, the options contradict each other, or there is no such target.
        MachineError: the bundle lacks the engine, or it cannot run here.
    """
    _check_options(target, checkpoint, loras, full, thorough, whole)
    if checkpoint is None and not full:
        floor_asked = None if noise_floor == "none" else noise_floor
        _check_needs_weights({"a noise floor": floor_asked, "a trajectory": sampler})
    if decode is not None and sampler is None:
        raise UsageError(
            "--decode makes images of a trajectory's latents", received="--decode alone", fix="--trajectory 20"
        )
    decoder = None if decode is None else load_decoder(decode)
    bounds = DEFAULTS if tolerances is None else load_tolerances(tolerances)
    bundle = open_bundle(path)
    engine = replace(engine_under_test(bundle, _target(bundle, target, whole), whole), tolerances=bounds)
    if checkpoint is not None or full:
        source = weights_of(bundle, checkpoint, loras)
        cases = default_cases(bundle.contract, bundle.precision, thorough=thorough)
        floor = noise_floor or "auto"
        (verdict,) = verify_against_weights(engine, source, cases, noise_floor=floor, progress=progress)
        if sampler is None:
            return verdict
        return with_trajectories(
            verdict, engine, source, sampler, decode=decoder, noise_floor=floor != "none", progress=progress
        )
    if FILE_NAME not in bundle.manifest.files:
        raise BundleError(
            f"without a checkpoint, verification needs the bundle's {FILE_NAME}",
            received="it was exported with --no-verify, or no case was small enough to be recorded",
            fix="add --checkpoint PATH (or --full for random weights), or export it again",
        )
    origin = bundle.manifest.fields["weights"]["origin"]
    return verify_against_reference(engine, origin, Reference(bundle.file(FILE_NAME)), progress=progress)


def _check_options(
    target: str,
    checkpoint: str | Path | None,
    loras: Sequence[str | Path],
    full: bool,
    thorough: bool,
    whole: bool,
) -> None:
    """What the options alone decide, before the bundle or the machine is looked at."""
    if full and checkpoint is not None:
        raise UsageError(
            "the weights come from a checkpoint, or are made again from the bundle's seed",
            received="--full and --checkpoint",
            fix="drop one of them: both compare every block",
        )
    if loras and checkpoint is None and not full:
        raise UsageError(
            "--lora names what was merged into the weights: without these, nothing is compared with it",
            received=f"--lora {loras[0]} alone",
            fix="add --checkpoint PATH, or --full for random weights",
        )
    if thorough and checkpoint is None and not full:
        raise UsageError(
            "--thorough needs the weights: reference.safetensors holds the shapes of the export only",
            received="--thorough alone",
            fix="add --checkpoint PATH, or --full for random weights",
        )
    if target != "auto" and parse_target(target).flavour is not None and not whole:
        raise _cannot_be_stepped(target)


def _check_needs_weights(asked: Mapping[str, object]) -> None:
    for what, value in asked.items():
        if value is not None:
            raise UsageError(
                f"{what} needs the weights: reference.safetensors holds outputs of the export's shapes only",
                received="neither --checkpoint nor --full",
                fix="add --checkpoint PATH, or --full for random weights",
            )


def _cannot_be_stepped(engines: str) -> UsageError:
    return UsageError(
        f"{engines} is run whole: a TensorRT engine cannot be stepped through",
        received="--blocks-only",
        fix="drop it, or verify an ONNX Runtime engine (--engine ort-cpu)",
    )


def _target(bundle: Bundle, name: str, whole: bool) -> Target:
    """The engine to verify; ``auto`` takes one that runs here, and can be stepped through where no whole one is run."""
    if name != "auto":
        return parse_target(name)
    engines = bundle.manifest.fields["engines"]
    if whole or not engines:
        return parse_target(runnable_target(bundle))
    refusal: MMDiTError = _cannot_be_stepped(", ".join(engines))
    for target in ("ort-cuda", "ort-cpu"):  # the faster one first
        if target in engines:
            try:
                check_runnable(bundle, target)
            except MachineError as error:
                refusal = error
            else:
                return parse_target(target)
    raise refusal


def engine_under_test(bundle: Bundle, target: Target, whole: bool, *, runs: bool = True) -> EngineUnderTest:
    """An engine of a bundle, to be verified.

    Args:
        whole: it is also run in one go, where this machine can.
        runs: a TensorRT engine must run here; without, stepping through its graph is enough.

    Raises:
        BundleError: the bundle lacks what it needs.
        MachineError: it cannot run here.
    """
    plan = bundle_plan(bundle)
    if target.flavour is None:
        record, files = None, [engine_graph(bundle, target.name)]
        graph = onnx.load(stepped_graph(bundle, target.name), load_external_data=False)
    else:
        record, files = engine_files(bundle, target.name)
        if runs:
            check_runs_here(record, target)
        graph = onnx.load(bundle.file("model.onnx"), load_external_data=False)
        dialect = stepped_dialect_of(target, bundle.precision, bf16_attentions=bool(plan.bf16_attentions))
        if dialect != "standard":
            graph = ir.to_proto(lower(ir.from_proto(graph), dialect)[0])
    return EngineUnderTest(
        name=bundle.name,
        target=target,
        spec=bundle.spec,
        contract=bundle.contract,
        precision=bundle.precision,
        graph=graph,
        folder=bundle.path,
        files=tuple(files),
        record=record,
        outputs=tuple(bundle.manifest.fields["outputs"]),
        whole=whole,
        plan=plan,
        parts=engine_parts(bundle, target.name),
    )


def weights_of(bundle: Bundle, checkpoint: str | Path | None, loras: Sequence[str | Path]) -> WeightSource:
    """What a bundle was made from: the checkpoint, or its seed again; with its LoRAs.

    Raises:
        UsageError: the weights are not random, or the checkpoint is another model's.
    """
    weights = bundle.manifest.fields["weights"]
    if checkpoint is None:
        if not weights["random"]:
            raise UsageError(
                "--full makes random weights again from the bundle's seed",
                received=f"weights from {weights['origin']}",
                fix="--checkpoint PATH",
            )
        return _merged(RandomWeights(weights["seed"]), bundle, loras)
    spec, source = open_weights(checkpoint, bundle.spec)
    check_same(
        spec, bundle.spec, "the checkpoint must be the one that the bundle was made from", fix="pass that checkpoint"
    )
    return _merged(source, bundle, loras)


def _merged(source: WeightSource, bundle: Bundle, files: Sequence[str | Path]) -> WeightSource:
    """A source with the LoRAs that the bundle was made with."""
    records = bundle.manifest.fields["weights"].get("loras", [])  # none in bundles of earlier versions
    loras = open_recorded(records, bundle.spec, files)
    return LoraWeights(source, loras) if loras else source
