"""Where is a bundle wrong? What `mmdit-verify --bisect` does, in one call."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from mmdit_deploy.build import parse_target
from mmdit_deploy.bundle import Bundle, open_bundle
from mmdit_deploy.errors import BundleError, UsageError
from mmdit_deploy.model import calls
from mmdit_deploy.runtime import runnable_target
from mmdit_deploy.verification import engine_under_test, weights_of
from mmdit_deploy.verify import EngineUnderTest, Reference, default_cases, verify_against_reference, within
from mmdit_deploy.verify.as_planned import unlike
from mmdit_deploy.verify.bisect import bisect, graph_findings, graph_of
from mmdit_deploy.verify.findings import Bisection, Finding
from mmdit_deploy.verify.records import Check
from mmdit_deploy.verify.reference import FILE_NAME
from mmdit_deploy.verify.streaming import Progress

CUMULATIVE = (
    "this error is cumulative, of the engine's own chain: it began here, or grew from what is wrong a little before. "
    "--checkpoint PATH (or --full for random weights) compares every block on equal inputs, and names the node"
)


def bisect_bundle(
    path: str | Path,
    *,
    target: str = "auto",
    checkpoint: str | Path | None = None,
    loras: Sequence[str | Path] = (),
    full: bool = False,
    progress: Progress | None = None,
) -> Bisection:
    """Find the first block of a bundle's engine that is wrong, and the first node in it.

    The engine's graph is stepped through on ONNX Runtime, with one block's weights and values in memory. Without a
    checkpoint, what the export recorded tells only from which block on the engine's own chain is out of tolerance.

    Args:
        target: the engine, e.g. ``ort-cpu``; ``auto`` takes what this machine can run.
        checkpoint: what the bundle was made from.
        loras: files of LoRAs that it was made with, where they do not lie any more where they lay.
        full: the weights are random, and made again from the bundle's seed.

    Returns:
        What was found; nothing in a healthy bundle.

    Raises:
        BundleError: the bundle is not whole, or there is nothing to compare with.
        UsageError: the checkpoint is another model's, the options contradict each other, or there is no such target.
        MachineError: the bundle lacks the engine, or its graph cannot run here.
    """
    if full and checkpoint is not None:
        raise UsageError(
            "the weights come from a checkpoint, or are made again from the bundle's seed",
            received="--full and --checkpoint",
            fix="drop one of them",
        )
    bundle = open_bundle(path)
    chosen = parse_target(runnable_target(bundle) if target == "auto" else target)
    engine = engine_under_test(bundle, chosen, False, runs=False)
    if checkpoint is None and not full:
        return _by_digests(bundle, engine, progress)
    cases = unlike(default_cases(bundle.contract, bundle.precision))
    return bisect(engine, weights_of(bundle, checkpoint, loras), cases, progress=progress)


def _by_digests(bundle: Bundle, engine: EngineUnderTest, progress: Progress | None) -> Bisection:
    """The first block whose recorded elements the engine's own chain misses, where its final output is wrong."""
    start, chain = time.perf_counter(), calls(engine.spec, engine.outputs)
    if FILE_NAME not in bundle.manifest.files or engine.record is not None:
        raise BundleError(
            f"without a checkpoint, a bisection needs the bundle's {FILE_NAME}, and an ONNX Runtime engine",
            received="a TensorRT engine, which is run whole" if engine.record else "it was exported with --no-verify",
            fix="add --checkpoint PATH, or --full for random weights",
        )
    found = next(graph_findings(engine, chain), None)
    checks: tuple[Check, ...] = ()
    if found is None:
        origin = bundle.manifest.fields["weights"]["origin"]
        verdict = verify_against_reference(engine, origin, Reference(bundle.file(FILE_NAME)), progress=progress)
        checks = verdict.checks
        wrong = None if verdict.passed else _first(checks, engine)
        if wrong is not None:
            call = next((c for c in chain if c.path == wrong.name), chain[-1])
            note = "" if wrong.level == "local" else CUMULATIVE
            function = call.kind.function
            found = Finding(call.path, call.block, function, case=wrong.case, errors=wrong.errors, note=note)
    kept = [
        c.errors.rel_l2 / engine.bounds.step.max_rel_l2
        for c in checks
        if c.passed and within(c.errors, engine.bounds.step)
    ]
    return Bisection(
        bundle=engine.name,
        target=engine.target.name,
        precision=engine.precision.name,
        graph=graph_of(engine),
        weights=None,
        calls=len(chain),
        of_calls=len(chain),
        values=len(checks),
        worst=max(kept, default=0.0),
        tolerance=dataclasses.asdict(engine.bounds.step),
        found=found,
        seconds=time.perf_counter() - start,
    )


def _first(checks: Sequence[Check], engine: EngineUnderTest) -> Check | None:
    """The first one out of tolerance in the order of the model, whether or not it binds."""
    return next((c for c in checks if not within(c.errors, engine.bounds.step)), None) or next(
        (c for c in checks if not c.passed), None
    )
