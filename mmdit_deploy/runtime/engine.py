"""A bundle as a callable: named tensors in, named tensors out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mmdit_deploy.bundle import Bundle, open_bundle
from mmdit_deploy.errors import BundleError, ContractError, MachineError, UsageError
from mmdit_deploy.runtime.ort import DEVICES, PROVIDERS, import_onnxruntime, open_session, run_session


class Engine:
    """One engine of a bundle, ready to run. Create it with `Engine.load`."""

    def __init__(self, bundle: Bundle, target: str):
        graph = engine_graph(bundle, target)
        self.bundle = bundle
        self.target = target
        self.contract = bundle.contract
        self._session = open_session(graph, target)

    @staticmethod
    def load(path: str | Path, target: str = "auto", *, verify: bool = True) -> Engine:
        """Open a bundle's engine.

        Args:
            path: the bundle.
            target: e.g. ``ort-cpu``; ``auto`` takes the first that the bundle has and this machine can run.
            verify: check every file's SHA-256 first. An engine file is executable code.

        Raises:
            BundleError: the bundle is not whole, or has no engines.
            UsageError: there is no such target.
            MachineError: the bundle lacks the engine, or it cannot run here.
        """
        bundle = open_bundle(path, verify=verify)
        return Engine(bundle, runnable_target(bundle) if target == "auto" else target)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one step.

        Args:
            inputs: the contract's inputs by name, in its dtypes and shapes, all on the device that the target runs on.

        Returns:
            The contract's outputs by name.

        Raises:
            ContractError: an input breaks the contract; nothing was run.
        """
        sizes = self.contract.check(
            {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in inputs.items()}
        )
        self._check_devices(inputs)
        outputs = [(t.name, getattr(torch, t.dtype), t.shape(sizes)) for t in self.contract.outputs]
        return run_session(self._session, inputs, outputs)

    def _check_devices(self, inputs: Mapping[str, Tensor]) -> None:
        """The runtime takes an address for one of the device that it is told: a wrong one ends the process."""
        expected, first = DEVICES[self.target], next(iter(inputs))
        for name, tensor in inputs.items():
            if tensor.device.type != expected:
                raise ContractError(
                    f"{name} is on the device that {self.target} runs on: {expected}",
                    received=str(tensor.device),
                    fix=f'{name}.to("{expected}")',
                )
            if tensor.device != inputs[first].device:
                raise ContractError(
                    f"{name} is on the device of {first}: {inputs[first].device}",
                    received=str(tensor.device),
                    fix=f'{name}.to("{inputs[first].device}")',
                )


def engine_graph(bundle: Bundle, target: str) -> Path:
    """The graph file of a bundle's engine.

    Raises:
        BundleError: the bundle has no engines.
        UsageError: there is no such target.
        MachineError: the bundle lacks the target's engine.
    """
    engines = _engines(bundle)
    if target not in PROVIDERS:
        raise UsageError(f"an engine is one of {', '.join(engines)}", received=repr(target), fix="name one of them")
    if target not in engines:
        raise MachineError(
            f"the bundle {bundle.name} has engines for {', '.join(engines)}",
            received=target,
            fix=f"mmdit-export … --target {target}",
        )
    return bundle.file(engines[target]["graph"])


def runnable_target(bundle: Bundle) -> str:
    """The engine of the bundle that this machine can run, a GPU's before a CPU's.

    Raises:
        BundleError: the bundle has no engines.
        MissingPackageError: onnxruntime is not installed.
        MachineError: none of its engines runs here.
    """
    engines = _engines(bundle)
    providers = import_onnxruntime("ort-cpu" if "ort-cpu" in engines else "ort-cuda").get_available_providers()
    # ONNX Runtime lists the CUDA provider that it was built with, also where there is no GPU.
    preferred = ["ort-cuda", "ort-cpu"] if torch.cuda.is_available() else ["ort-cpu"]
    for target in preferred:
        if target in engines and PROVIDERS[target] in providers:
            return target
    raise MachineError(
        "a bundle needs an engine that this machine can run",
        received=f"{bundle.name} has {', '.join(engines)}; ONNX Runtime here has {', '.join(providers)}",
        fix="export it with --target ort-cpu",
    )


def _engines(bundle: Bundle) -> Mapping[str, Mapping[str, str]]:
    engines: Mapping[str, Mapping[str, str]] = bundle.manifest.fields["engines"]
    if not engines:
        raise BundleError(
            "only an engine can be run",
            received=f"{bundle.name}, a bundle of graphs alone (--graph-only)",
            fix="export it without --graph-only",
        )
    return engines
