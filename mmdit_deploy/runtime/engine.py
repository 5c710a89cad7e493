"""A bundle as a callable: named tensors in, named tensors out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mmdit_deploy.bundle import Bundle, open_bundle
from mmdit_deploy.errors import BundleError
from mmdit_deploy.runtime.ort import PROVIDERS, open_session, run_session


class Engine:
    """One engine of a bundle, ready to run. Create it with `Engine.load`."""

    def __init__(self, bundle: Bundle, target: str):
        engines = bundle.manifest.fields["engines"]
        if target not in engines:
            raise BundleError(
                f"the bundle {bundle.name} has engines for {', '.join(engines)}",
                received=target,
                fix=f"mmdit-export … --target {target}",
            )
        self.bundle = bundle
        self.target = target
        self.contract = bundle.contract
        self._session = open_session(bundle.file(engines[target]["graph"]), target)

    @staticmethod
    def load(path: str | Path, target: str = "auto", *, verify: bool = True) -> Engine:
        """Open a bundle's engine.

        Args:
            path: the bundle.
            target: e.g. ``ort-cpu``; ``auto`` takes the first that the bundle has and this machine can run.
            verify: check every file's SHA-256 first. An engine file is executable code.

        Raises:
            BundleError: the bundle is not whole, or has no such engine.
            MachineError: the engine cannot run here.
        """
        bundle = open_bundle(path, verify=verify)
        return Engine(bundle, runnable_target(bundle) if target == "auto" else target)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one step.

        Args:
            inputs: the contract's inputs by name, in its dtypes and shapes.

        Returns:
            The contract's outputs by name.

        Raises:
            ContractError: an input breaks the contract; nothing was run.
        """
        sizes = self.contract.check(
            {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in inputs.items()}
        )
        outputs = [(t.name, getattr(torch, t.dtype), t.shape(sizes)) for t in self.contract.outputs]
        return run_session(self._session, inputs, outputs)


def runnable_target(bundle: Bundle) -> str:
    """The first engine of the bundle that this machine can run, a GPU's before a CPU's.

    Raises:
        BundleError: there is none.
    """
    available = [t for t in bundle.manifest.fields["engines"] if t in PROVIDERS]
    preferred = ["ort-cuda", "ort-cpu"] if torch.cuda.is_available() else ["ort-cpu"]
    for target in preferred:
        if target in available:
            return target
    raise BundleError(
        "a bundle needs an engine that this machine can run",
        received=f"{bundle.name} has {', '.join(bundle.manifest.fields['engines']) or 'none'}",
        fix="export it with --target ort-cpu",
    )
