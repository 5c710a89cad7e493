"""A bundle as a callable: named tensors in, named tensors out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from mmdit_deploy.build import Target, parse_target
from mmdit_deploy.bundle import Bundle, open_bundle
from mmdit_deploy.errors import ContractError
from mmdit_deploy.runtime.engines import check_device, engine_files, engine_graph, runnable_target
from mmdit_deploy.runtime.fit import gpu
from mmdit_deploy.runtime.runner import Runner, open_runner
from mmdit_deploy.runtime.runtime_cache import runtime_cache_file


class Engine:
    """One engine of a bundle, ready to run. Create it with `Engine.load`; `close` it, or leave a ``with``.

    Args:
        bundle: that was opened and checked.
        target: e.g. ``rtx:sm89``.
        device, cuda_graphs, specialize: as for `load`.
    """

    def __init__(
        self,
        bundle: Bundle,
        target: str,
        *,
        device: torch.device | str | None = None,
        cuda_graphs: bool = False,
        specialize: str = "lazy",
    ):
        parsed, place = parse_target(target), None if device is None else torch.device(device)
        check_device(parsed, place)
        self.bundle = bundle
        self.target = parsed.name
        self.contract = bundle.contract
        self._runner = _open(bundle, parsed, place, cuda_graphs, specialize)
        self.device = self._runner.device

    @staticmethod
    def load(
        path: str | Path,
        target: str = "auto",
        *,
        verify: bool = True,
        device: torch.device | str | None = None,
        cuda_graphs: bool = False,
        specialize: str = "lazy",
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

        Raises:
            BundleError: the bundle is not whole, or has no engines.
            UsageError: there is no such target, or the arguments are not for it.
            MachineError: the bundle lacks the engine, or it cannot run here.
        """
        bundle = open_bundle(path, verify=verify)
        name = runnable_target(bundle, device) if target == "auto" else target
        return Engine(bundle, name, device=device, cuda_graphs=cuda_graphs, specialize=specialize)

    def __call__(
        self,
        inputs: Mapping[str, Tensor],
        *,
        outputs: Mapping[str, Tensor] | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> dict[str, Tensor]:
        """Run one step. On a GPU it is enqueued, in order with the stream; TensorRT returns before it is done.

        Args:
            inputs: the contract's inputs by name, in its dtypes and shapes, all on the engine's device. They are never
                written to.
            outputs: contiguous tensors to write to, by name; new ones for those that are missing.
            stream: of the engine's device; by default torch's current one.

        Returns:
            The contract's outputs by name.

        Raises:
            ContractError: a tensor breaks the contract, or no profile of the engine holds the sizes; nothing was run.
        """
        sizes = self.contract.check({name: (_dtype(t), tuple(t.shape)) for name, t in inputs.items()})
        given = dict(outputs or {})
        self._check_outputs(given, sizes)
        self._check_devices({**inputs, **given}, stream)
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            if stream is not None:
                for tensor in (*inputs.values(), *given.values()):
                    tensor.record_stream(stream)  # its memory is not given away before this stream is done with it
            for spec in self.contract.outputs:
                if spec.name not in given:
                    dtype = getattr(torch, spec.dtype)
                    given[spec.name] = torch.empty(spec.shape(sizes), dtype=dtype, device=self.device)
            self._runner.run(inputs, given, sizes)
        return {spec.name: given[spec.name] for spec in self.contract.outputs}

    def close(self) -> None:
        """Free what the engine holds, after what still runs is done. It cannot be called again."""
        self._runner.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_outputs(self, outputs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
        specs = {spec.name: spec for spec in self.contract.outputs}
        for name, tensor in outputs.items():
            if name not in specs:
                raise ContractError(f"the outputs are {', '.join(specs)}", received=name, fix="pass one of them")
            expected = f"{specs[name].dtype} {list(specs[name].shape(sizes))}"
            received = f"{_dtype(tensor)} {list(tensor.shape)}"
            if not tensor.is_contiguous():
                received += ", not contiguous"
            if received != expected:
                raise ContractError(
                    f"the output {name} is contiguous, and {expected} for these inputs",
                    received=received,
                    fix="pass a tensor like that, or none to get a new one",
                )

    def _check_devices(self, tensors: Mapping[str, Tensor], stream: torch.cuda.Stream | None) -> None:
        """The runtime takes an address for one of its device: a wrong one ends the process."""
        for name, tensor in tensors.items():
            if tensor.device != self.device:
                raise ContractError(
                    f"{name} is on the device that this {self.target} engine runs on: {self.device}",
                    received=str(tensor.device),
                    fix=f'{name}.to("{self.device}")',
                )
        if stream is not None and stream.device != self.device:
            raise ContractError(
                f"the stream is one of the device that this {self.target} engine runs on: {self.device}",
                received=f"one of {stream.device}",
                fix="pass none, or torch.cuda.Stream(engine.device) on a GPU",
            )


def _open(bundle: Bundle, target: Target, device: torch.device | None, cuda_graphs: bool, specialize: str) -> Runner:
    if target.flavour is None:
        return open_runner(target, [engine_graph(bundle, target.name)], device=device, cuda_graphs=cuda_graphs)
    record, files = engine_files(bundle, target.name)
    fields = bundle.manifest.fields
    built_from = [{**fields["spec"], "name": ""}, fields["precision"], fields["contract"]]
    keeps = target.flavour.runtime_cache and torch.cuda.is_available()  # without a GPU, loading says so
    cache = runtime_cache_file(record, built_from, gpu(device)) if keeps else None
    return open_runner(
        target, files, record, device=device, cuda_graphs=cuda_graphs, cache=cache, specialize=specialize
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
