"""Calibration on inputs that were captured from somebody's own pipeline: ``--calib FILE``.

A safetensors file. Each sample is one call of the transformer, in the terms of our contract (`mmdit_deploy.contract`):

    <sample>.<input>        0000.hidden_states [batch, img_tokens, C_in], 0000.timestep [batch], …; 0001.hidden_states …
    metadata                format = "mmdit-deploy captured inputs 1", family = "sd3"

Any number of samples, each with sizes of its own, and each with every input of the contract. Features are in 16 or 32
bits; timesteps (on the family's own scale), guidance and position ids are fp32; a mask is bool. `capture` writes such a
file from a diffusers pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmdit_deploy.calibration.observe import Observer, Progress
from mmdit_deploy.calibration.statistics import Statistics
from mmdit_deploy.checkpoint import SafetensorsFile
from mmdit_deploy.checkpoint.strict_json import quote
from mmdit_deploy.checkpoint.weights import WeightSource
from mmdit_deploy.contract import Contract, Range
from mmdit_deploy.eager.calls import Values
from mmdit_deploy.eager.program import Program
from mmdit_deploy.errors import ContractError, UsageError
from mmdit_deploy.families import family_of
from mmdit_deploy.runtime.memory import available_memory
from mmdit_deploy.spec import PRECISIONS, ModelSpec

FORMAT = "mmdit-deploy captured inputs 1"
_FEATURES = (torch.float16, torch.bfloat16, torch.float32)
_ANY = 2**31 - 1  # of an axis that has no limit
_AGAIN = "capture the inputs again, with mmdit_deploy.calibration.capture"
# What waits between two calls: both streams, what made one of them, and modulations.
_WAITING = 4


class Captured:
    """The samples of a file, checked against a model; each is read when it is asked for.

    Attributes:
        names: of the samples, in the order of the file.
    """

    def __init__(self, file: SafetensorsFile, names: Sequence[str], contract: Contract):
        self.names = tuple(names)
        self._file, self._contract = file, contract

    def sample(self, name: str) -> Values:
        """The contract's inputs by name: floats in fp32, a mask in bool."""
        tensors = ((t.name, self._file.read(f"{name}.{t.name}")) for t in self._contract.inputs)
        return {name: t.float() if t.is_floating_point() else t for name, t in tensors}


def read_captured(path: str | Path, spec: ModelSpec) -> Captured:
    """Open a file of captured inputs, and check all of it.

    Raises:
        CheckpointError: it is no safetensors file.
        UsageError: it is of another format or family, a sample lacks an input or has an unknown one, or a tensor's type
            or shape is not the contract's, or it holds NaN or Inf.
    """
    file = SafetensorsFile(path)
    _check_metadata(file, spec)
    contract = _contract(spec)
    samples = _samples(file)
    for name, inputs in samples.items():
        try:
            contract.check({i: _received(file, name, i, contract) for i in inputs})
        except ContractError as error:
            raise UsageError(
                f"sample {quote(name)} of {file.path}: {error.rule}", received=error.received, fix=_AGAIN
            ) from error
        for i in inputs:
            _check_finite(file, f"{name}.{i}")
    return Captured(file, tuple(samples), contract)


def calibrate_captured(
    spec: ModelSpec,
    source: WeightSource,
    captured: Captured,
    dtype: torch.dtype,
    *,
    keep: bool | None = None,
    programs: Mapping[str, Program] | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Evaluate the eager model in fp32 once on every sample, and take in what it computes.

    Args:
        dtype: the compute type that the graph will have.
        keep, programs, progress: as of `Observer`. Weights are read once for as many samples as memory holds.

    Raises:
        CheckpointError: the model computes NaN or Inf; it names the call and the value.
    """
    observer = Observer(spec, source, dtype, keep=keep, programs=programs, progress=progress)
    for group in _groups(captured, spec):
        observer.evaluate(group)
    return observer.statistics


def _contract(spec: ModelSpec) -> Contract:
    """The contract at any size; a compute type stands for features."""
    image = spec.max_img_tokens or _ANY
    ranges = {"batch": Range(1, 1, _ANY), "img_tokens": Range(1, 1, image), "txt_tokens": Range(1, 1, _ANY)}
    return Contract.of(spec, PRECISIONS["fp16"], ranges)


def _check_metadata(file: SafetensorsFile, spec: ModelSpec) -> None:
    form, family = file.metadata.get("format"), file.metadata.get("family")
    if form != FORMAT:
        raise UsageError(
            f"the metadata of captured inputs say format = {FORMAT!r}",
            received=f"{quote(form)} in {file.path}",
            fix=_AGAIN,
        )
    if family != spec.family:
        raise UsageError(
            f"{spec.name} is calibrated on inputs of {family_of(spec).title}: family = {spec.family!r}",
            received=f"{quote(family)} in {file.path}",
            fix="pass inputs that were captured from a pipeline of this family",
        )


def _samples(file: SafetensorsFile) -> dict[str, list[str]]:
    """Names of inputs by sample."""
    samples: dict[str, list[str]] = {}
    for key in file.tensors:
        name, dot, tensor = key.rpartition(".")
        if not dot or not name:
            raise UsageError(
                "keys of captured inputs are <sample>.<input>", received=f"{quote(key)} in {file.path}", fix=_AGAIN
            )
        samples.setdefault(name, []).append(tensor)
    if not samples:
        raise UsageError("captured inputs hold a sample or more", received=f"no tensors in {file.path}", fix=_AGAIN)
    return samples


def _received(file: SafetensorsFile, sample: str, name: str, contract: Contract) -> tuple[str, tuple[int, ...]]:
    """Type and shape as the contract's check wants them: features may be of any of three types."""
    info = file.tensors[f"{sample}.{name}"]
    dtype = str(info.dtype).removeprefix("torch.")
    features = any(t.name == name and t.dtype == "float16" for t in contract.inputs)
    return "float16" if features and info.dtype in _FEATURES else dtype, info.shape


def _check_finite(file: SafetensorsFile, key: str) -> None:
    values = file.read(key)
    if values.is_floating_point() and not bool(values.isfinite().all()):
        raise UsageError(
            "captured inputs are finite",
            received=f"{int(values.isnan().sum())} NaN and {int(values.isinf().sum())} Inf in {quote(key)} of "
            f"{file.path}",
            fix="check the pipeline: the text encoder overflows in fp16 where it is T5",
        )


def _groups(captured: Captured, spec: ModelSpec) -> Iterator[list[Values]]:
    """Samples that go through the model together: as many as a quarter of the memory that is left holds."""
    room, taken = available_memory() // 4, 0
    group: list[Values] = []
    for name in captured.names:
        sample = captured.sample(name)
        need = _bytes(sample, spec)
        if group and taken + need > room:
            yield group
            group, taken = [], 0
        group.append(sample)
        taken += need
    yield group


def _bytes(sample: Mapping[str, Tensor], spec: ModelSpec) -> int:
    batch, img_tokens, _ = sample["hidden_states"].shape
    tokens = img_tokens + sample["encoder_hidden_states"].shape[1]
    return sum(t.nbytes for t in sample.values()) + _WAITING * 4 * batch * tokens * spec.width
