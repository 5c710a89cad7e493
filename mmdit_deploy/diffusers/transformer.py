"""`MMDiTEngineTransformer`: an engine that a diffusers pipeline takes for its transformer."""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mmdit_deploy.diffusers.adapter import Call
from mmdit_deploy.diffusers.adapters import ADAPTERS
from mmdit_deploy.diffusers.refusals import MISSING, Compiled, missing
from mmdit_deploy.diffusers.text_fit import TextFit
from mmdit_deploy.errors import MissingPackageError, UsageError
from mmdit_deploy.families import config_of, family_of
from mmdit_deploy.runtime import Engine
from mmdit_deploy.runtime.split import RESIDENT


def _no_diffusers(found: str) -> MissingPackageError:
    install = "pip install 'mmdit-deploy[diffusers]'"
    return MissingPackageError("diffusers", purpose="an engine in a pipeline", install=install, found=found)


try:
    import diffusers
    from diffusers.configuration_utils import FrozenDict
    from diffusers.models.modeling_utils import ModelMixin
except ImportError as error:
    raise _no_diffusers(str(error)) from None


def check_version(version: str) -> None:
    """Check that diffusers calls its transformers as the adapters know it; older ones differ in places.

    Args:
        version: of diffusers, e.g. ``0.42.1``.

    Raises:
        MissingPackageError: it is older than 0.42.
    """
    if tuple(int(part) for part in version.split(".")[:2]) < (0, 42):
        raise _no_diffusers(f"version {version}; 0.42 is the first that was tried")


check_version(diffusers.__version__)


class MMDiTEngineTransformer(Compiled, ModelMixin):  # type: ignore[misc]  # diffusers publishes no types
    """A bundle's engine with the interface of diffusers' transformer of its family.

    It is an ``nn.Module`` without weights: ``state_dict()`` is empty, ``eval()`` and ``requires_grad_()`` find nothing
    to change. ``from_pretrained`` of a pipeline takes only `ModelMixin`s, which is why it is one.

    Args:
        engine: loaded. It belongs to this module from now on.
        load: loads it again, after `to` a CPU freed it; without, an engine on a GPU stays there.
    """

    _supports_group_offloading = False

    def __init__(self, engine: Engine, load: Callable[[], Engine] | None = None):
        super().__init__()
        self._engine: Engine | None = engine
        self._load = load
        self._target, self._device = engine.target, engine.device
        self._spec, self._contract = engine.bundle.spec, engine.contract
        self._dtype = getattr(torch, next(t.dtype for t in engine.contract.inputs if t.name == "hidden_states"))
        self._adapter = ADAPTERS[family_of(self._spec).name]
        self._config = FrozenDict(config_of(self._spec))
        self._residence = threading.RLock()  # threads load and free one engine, once
        self._text_fit = TextFit(self._dtype)

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        target: str = "auto",
        *,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> MMDiTEngineTransformer:
        """Load a bundle's engine for a pipeline of its family.

        Args:
            path: the bundle.
            target: e.g. ``rtx:sm89``; by default the best that this machine can run.
            device: e.g. ``cuda:1``.
            options: others of `Engine.load`.

        Raises:
            BundleError, UsageError, MachineError: as `Engine.load`; the conditioning of a split engine is needed in
                every step of a pipeline, and cannot be released.
        """
        if options.get("conditioning", RESIDENT) != RESIDENT:
            raise UsageError(
                "a pipeline gives one timestep at a time: both parts of a split engine stay loaded",
                received=f"conditioning={options['conditioning']!r}",
                fix="leave it out",
            )
        engine = Engine.load(path, target, device=device, **options)
        again = {**options, "verify": False}  # its files were checked
        return cls(
            engine, functools.partial(Engine.load, engine.bundle.path, engine.target, device=engine.device, **again)
        )

    @property
    def config(self) -> Any:
        """The config of diffusers' class for this architecture, as a `FrozenDict`: derived from the bundle's spec."""
        return self._config

    @property
    def dtype(self) -> torch.dtype:
        """The engine's type of features."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the engine is: on its device, or, while it is freed, on the CPU."""
        return torch.device("cpu") if self._engine is None else self._device

    @property
    def inner_dim(self) -> int:
        """Width of both streams."""
        return self._spec.width

    @property
    def engine(self) -> Engine | None:
        """The engine; None while it is freed."""
        return self._engine

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """One, without a value: accelerate's hooks ask a model's first parameter where the model is."""
        yield nn.Parameter(torch.empty(0, dtype=self._dtype, device=self.device), requires_grad=False)

    @property
    def attn_processors(self) -> NoReturn:
        """Refused, by `hasattr` too: IP-Adapters and perturbed attention look for attention's layers here."""
        raise UsageError(  # no `AttributeError`: within pipelines' properties that would become another
            "an engine has no attn_processors: attention is compiled in",
            received="transformer.attn_processors",
            fix="run the pipeline without an IP-Adapter and perturbed attention, or with diffusers' transformer",
        )

    def unload_lora(self) -> None:
        """Nothing is loaded besides what was merged at export, so that pipelines may clean up between requests."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        return_dict: bool = True,
        **arguments: Any,
    ) -> Any:
        """One step, as diffusers' class of the family is called: see `mmdit_deploy.diffusers.adapters`.

        Tensors of other float types than the engine's are converted, and the sample to that of ``hidden_states``.

        Args:
            hidden_states: a latent [B, C, H, W] for SD3, tokens [B, N, C] else.
            encoder_hidden_states: text tokens [B, N, C].
            return_dict: False for a tuple.
            arguments: the others of diffusers' class.

        Returns:
            The velocity as ``sample`` of the class that diffusers' returns, or in a tuple.

        Raises:
            UsageError: an argument is not known, or asks for what an engine cannot do.
            ContractError: a tensor is out of the engine's ranges, on another device, or text beyond its type.
        """
        given = {"encoder_hidden_states": encoder_hidden_states, **arguments}
        call = Call(self._spec, self._contract, hidden_states, {name: v for name, v in given.items() if v is not None})
        self._text_fit.check(call.arguments)
        inputs = self._adapter.inputs(call)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs.values()):
            raise UsageError(
                "an engine has no gradients",
                received="inputs that require them",
                fix="call it within torch.no_grad(), as pipelines do, or train diffusers' transformer",
            )
        sample = self._loaded(hidden_states.device)(inputs)["sample"]
        sample = self._adapter.restore(call, sample).to(hidden_states.dtype)
        if not return_dict:
            return (sample,)
        module, name = self._adapter.output
        return getattr(importlib.import_module(module), name)(sample=sample)

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """What pipelines say about a call to diffusers' caches, of which an engine has none."""
        yield

    def to(self, *args: Any, **kwargs: Any) -> MMDiTEngineTransformer:
        """Where the engine is: on the device that it was loaded for, or, of a GPU's engine, freed by ``to("cpu")``.

        ``pipe.enable_model_cpu_offload()`` frees and loads it so. It is loaded again by ``to`` its device, or by the
        next call there: from the bundle, whose files were checked when it was loaded first.

        Raises:
            UsageError: it is another device, or another type than the engine's.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)  # as nn.Module.to reads its arguments
        if dtype not in (None, self._dtype):
            ours = str(self._dtype)
            raise UsageError(
                f"this engine computes in {ours}: its type was chosen when it was exported",
                received=f"to({dtype})",
                fix=f"name no type, or that one: dtype={ours} to the pipeline's from_pretrained and from_pipe (which "
                f"may have cast what the first pipeline shares: pipe.to({ours}) sets it right); export the checkpoint "
                "again for another",
            )
        if device is None or self._is_here(device):
            if device is not None:
                self._loaded(self._device)
        elif device.type == "cpu" and self._load is not None:
            self._free()
        else:
            raise UsageError(
                f"this {self._target} engine runs on {self._device}, where it was loaded",
                received=f"to({device})",
                fix=f'pipe.to("{self._device}"), or from_bundle(path, device=…) with an engine for {device.type}',
            )
        return self

    def cuda(self, device: int | torch.device | str | None = None) -> MMDiTEngineTransformer:
        """`to` a GPU."""
        return self.to(torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda"))

    def cpu(self) -> MMDiTEngineTransformer:
        """`to` the CPU."""
        return self.to(torch.device("cpu"))

    def half(self) -> MMDiTEngineTransformer:
        """`to` fp16."""
        return self.to(torch.float16)

    def float(self) -> MMDiTEngineTransformer:
        """`to` fp32."""
        return self.to(torch.float32)

    def bfloat16(self) -> MMDiTEngineTransformer:
        """`to` bf16."""
        return self.to(torch.bfloat16)

    def double(self) -> MMDiTEngineTransformer:
        """`to` fp64."""
        return self.to(torch.float64)

    def type(self, dst_type: torch.dtype | str) -> MMDiTEngineTransformer:
        """`to` a type."""
        return self.to(dst_type if isinstance(dst_type, torch.dtype) else torch.empty(0).type(dst_type).dtype)

    def extra_repr(self) -> str:
        """What it is, in a line."""
        return f"{self._spec.name}, {self._target}, {self._dtype} on {self._device}"

    def __getattr__(self, name: str) -> Any:
        if name in MISSING:
            raise missing(name)
        return super().__getattr__(name)

    def _is_here(self, device: torch.device) -> bool:
        """Whether that is the engine's device; ``cuda`` alone is any GPU, and there is one CPU."""
        same = device.index in (None, self._device.index) or device.type == "cpu"
        return device.type == self._device.type and same

    def _free(self) -> None:
        with self._residence:
            if self._engine is not None:
                self._engine.close()
                self._engine = None

    def _loaded(self, device: torch.device) -> Engine:
        """The engine, loaded again where it was freed and is called on its device."""
        with self._residence:
            if self._engine is None:
                if self._load is None or not self._is_here(device):
                    raise UsageError(
                        f"this {self._target} engine runs on {self._device}",
                        received=f'inputs on {device}, after to("cpu") freed the engine',
                        fix=f'pipe.to("{self._device}"), or from_bundle(path, target="ort-cpu") of a bundle that has '
                        "one",
                    )
                self._engine = self._load()
            return self._engine
