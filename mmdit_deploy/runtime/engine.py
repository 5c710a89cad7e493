"""A bundle as a callable: named tensors in, named tensors out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from mmdit_deploy.build import Target, parse_target
from mmdit_deploy.bundle import Bundle, open_bundle
from mmdit_deploy.runtime.checks import InputCheck, check_apart, check_place, check_stream, output_tensors
from mmdit_deploy.runtime.conditioning import (
    Conditioner,
    Conditioning,
    InOnePiece,
    StepConditioning,
    schedule_contract,
    with_conditioning,
)
from mmdit_deploy.runtime.engines import check_device, engine_files, engine_graph, runnable_target
from mmdit_deploy.runtime.fit import gpu
from mmdit_deploy.runtime.runner import Runner, open_runner
from mmdit_deploy.runtime.runtime_cache import runtime_cache_file
from mmdit_deploy.runtime.split import RESIDENT, InTwoParts, check_residence
from mmdit_deploy.runtime.tensors import Array, as_tensors, to_numpy


class Engine:
    """One engine of a bundle, ready to run. Create it with `Engine.load`; `close` it, or leave a ``with``.

    Args:
        bundle: that was opened and checked.
        target: e.g. ``rtx:sm89``.
        device, cuda_graphs, specialize, conditioning: as for `load`.
    """

    def __init__(
        self,
        bundle: Bundle,
        target: str,
        *,
        device: torch.device | str | None = None,
        cuda_graphs: bool = False,
        specialize: str = "lazy",
        conditioning: str = RESIDENT,
    ):
        check_residence(conditioning)
        parsed, place = parse_target(target), None if device is None else torch.device(device)
        check_device(parsed, place)
        self.bundle = bundle
        self.target = parsed.name
        self.contract = bundle.contract
        self._runner = _open(bundle, parsed, place, cuda_graphs, specialize)
        self.device = self._runner.device
        self._conditioner: Conditioner = InOnePiece(bundle.contract)
        if bundle.split is not None:
            load = partial(_open, bundle, parsed, self.device, False, specialize, conditioning=True)
            self._conditioner = InTwoParts(bundle.split, load, keep=conditioning == RESIDENT)
        self._key = object()  # says whose a table of conditioning is
        self._outputs = {spec.name: (spec, getattr(torch, spec.dtype)) for spec in self.contract.outputs}
        self._check = InputCheck(self.contract, self.device, self.target)
        step = self._conditioner.step
        self._check_step = self._check if step is self.contract else InputCheck(step, self.device, self.target)
        self._check_schedule = InputCheck(schedule_contract(self.contract), self.device, self.target)

    @staticmethod
    def load(
        path: str | Path,
        target: str = "auto",
        *,
        verify: bool = True,
        device: torch.device | str | None = None,
        cuda_graphs: bool = False,
        specialize: str = "lazy",
        conditioning: str = RESIDENT,
    ) -> Engine:
        """Open a bundle's engine.

        Args:
            path: the bundle.
            target: e.g. ``ort-cpu``; ``auto`` takes the first that the bundle has and this machine can run, on the
                device if one is given.
            verify: check every file's SHA-256 first. An engine file is executable code.
            device: the GPU, e.g. ``cuda:1``, or ``cpu``; by default the target's, and of GPUs torch's current one.
            cuda_graphs: of a TensorRT target: launch each shape as one CUDA graph, which costs memory per shape.
            specialize: of TensorRT-RTX: when kernels for a new shape are compiled: ``lazy`` in the background, with
                slower ones until then; ``eager`` before that shape's first run; ``none``.
            conditioning: of a bundle in two parts (``--split-conditioning``): whether the engine that makes the
                modulation stays loaded, ``resident``, or is loaded when it is needed and freed again, ``released``:
                less memory in the steps between. It is needed in `condition`, and in each call with all inputs.

        Raises:
            BundleError: the bundle is not whole, or has no engines.
            UsageError: there is no such target, or the arguments are not for it.
            MachineError: the bundle lacks the engine, or it cannot run here.
        """
        bundle = open_bundle(path, verify=verify)
        name = runnable_target(bundle, device) if target == "auto" else target
        return Engine(
            bundle, name, device=device, cuda_graphs=cuda_graphs, specialize=specialize, conditioning=conditioning
        )

    @overload
    def __call__(
        self,
        inputs: Mapping[str, Tensor],
        *,
        outputs: Mapping[str, Tensor] | None = None,
        conditioning: StepConditioning | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> dict[str, Tensor]: ...

    @overload
    def __call__(
        self,
        inputs: Mapping[str, Array],
        *,
        outputs: Mapping[str, Tensor | np.ndarray] | None = None,
        conditioning: StepConditioning | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> dict[str, Any]: ...

    def __call__(
        self,
        inputs: Mapping[str, Array],
        *,
        outputs: Mapping[str, Tensor | np.ndarray] | None = None,
        conditioning: StepConditioning | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> dict[str, Any]:
        """Run one step. On a GPU it is enqueued, in order with the stream; TensorRT returns before it is done.

        Several threads may call one engine at once: ONNX Runtime runs their calls side by side, TensorRT in turns.

        Args:
            inputs: the contract's inputs by name, in its dtypes and shapes, all on the engine's device: torch tensors,
                numpy arrays or others with ``__dlpack__``. They are read where they are, copied only where they are
                not contiguous, and never written to. What another library lends on a GPU must stay as it is until the
                stream is past the call: torch's own memory waits for it, the other's need not.
            outputs: contiguous torch tensors or numpy arrays to write to, by name; new ones for those that are missing.
            conditioning: a step of `condition`'s table, in the place of the inputs that it was made of.
            stream: of the engine's device; by default torch's current one.

        Returns:
            The contract's outputs by name: those that were given, and new ones: numpy arrays where all inputs are, else
            torch tensors.

        Raises:
            ContractError: a tensor breaks the contract, or no profile of the engine holds the sizes; nothing was
                written to.
            MachineError: the engine was closed.
        """
        with self._on(stream):
            named, in_numpy = as_tensors(inputs)
            tensors: Mapping[str, Tensor] = named
            if conditioning is None:
                sizes = self._check(tensors)
            else:
                tensors = with_conditioning(named, conditioning, self._key)
                sizes = self._check_step(tensors)
            results = self._given(outputs, sizes, inputs, tensors) if outputs else {}
            if stream is not None:
                _held_for(stream, (*tensors.values(), *results.values()))
            for name, (spec, dtype) in self._outputs.items():
                if name not in results:
                    results[name] = torch.empty(spec.shape(sizes), dtype=dtype, device=self.device)
            if conditioning is None:
                tensors = self._conditioner.complete(tensors, sizes)
            self._runner.run(tensors, results, sizes)
        made = {name: to_numpy(results[name]) if in_numpy else results[name] for name in self._outputs}
        return {**made, **outputs} if outputs else made

    def condition(self, inputs: Mapping[str, Array], *, stream: torch.cuda.Stream | None = None) -> Conditioning:
        """Make the conditioning of a whole schedule, for calls that then leave these inputs out.

            table = engine.condition({"timestep": [S, B], "pooled_projections": [B, P], "guidance": [B]})
            for step in range(S): engine({…}, conditioning=table[step])

        Args:
            inputs: ``timestep`` of each step and sample, [S, B]; where the model has them, ``pooled_projections`` and
                ``guidance`` as in a call. They may change afterwards.
            stream: that the steps are run on too; by default torch's current one.

        Raises:
            ContractError: a tensor breaks the contract.
        """
        with self._on(stream):
            tensors, _ = as_tensors(inputs)
            sizes = self._check_schedule(tensors)
            if stream is not None:
                _held_for(stream, tensors.values())
            return Conditioning(self._conditioner.tabulate(tensors, sizes), self._key)

    def close(self) -> None:
        """Free what the engine holds, after what still runs is done. It cannot be called again."""
        try:
            self._runner.close()
        finally:
            self._conditioner.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _on(self, stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
        if stream is None:
            return nullcontext()
        check_stream(stream, self.device, self.target)
        return torch.cuda.stream(stream)

    def _given(
        self,
        outputs: Mapping[str, Tensor | np.ndarray],
        sizes: Mapping[str, int],
        inputs: Mapping[str, Array],
        tensors: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The caller's outputs as tensors, checked."""
        specs = {name: spec for name, (spec, _) in self._outputs.items()}
        results = output_tensors(outputs, specs, sizes)
        for name, tensor in results.items():
            check_place(name, tensor, self.device, self.target)
        own = {name: array for name, array in inputs.items() if isinstance(array, np.ndarray)}  # tensors may be copies
        check_apart(outputs, {**tensors, **own})
        return results


def _held_for(stream: torch.cuda.Stream, tensors: Iterable[Tensor]) -> None:
    """Their memory is not given away before this stream is done with it."""
    for tensor in tensors:
        tensor.record_stream(stream)


def _open(
    bundle: Bundle,
    target: Target,
    device: torch.device | None,
    cuda_graphs: bool,
    specialize: str,
    *,
    conditioning: bool = False,
) -> Runner:
    if target.flavour is None:
        graph = engine_graph(bundle, target.name, conditioning=conditioning)
        return open_runner(target, [graph], device=device, cuda_graphs=cuda_graphs, in_turn=bundle.split is not None)
    record, files = engine_files(bundle, target.name, conditioning=conditioning)
    fields = bundle.manifest.fields
    built_from = [{**fields["spec"], "name": ""}, fields["precision"], fields["contract"]]
    keeps = target.flavour.runtime_cache and torch.cuda.is_available()  # without a GPU, loading says so
    cache = runtime_cache_file(record, built_from, gpu(device)) if keeps else None
    return open_runner(
        target, files, record, device=device, cuda_graphs=cuda_graphs, cache=cache, specialize=specialize
    )
