"""The I/O contract of an engine: tensor names, dtypes, symbolic axes and their ranges. Nothing restates it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmdit_deploy.contract.axes import (
    AXES,
    DEFAULT_RANGES,
    TOKENS,
    Profile,
    Range,
    axis_size,
    profile_from_json,
    profile_to_json,
    spanned,
    within,
)
from mmdit_deploy.errors import ContractError, UsageError
from mmdit_deploy.spec import ModelSpec, Precision

USUAL_STEPS = 28  # of a schedule: what diffusers' StableDiffusion3Pipeline and FluxPipeline take by default
MAX_STEPS = 64  # whose modulation is made in one call; longer schedules take several


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name, its axes (a name, a sum of names or a fixed size each), its dtype by torch."""

    name: str
    axes: tuple[str | int, ...]
    dtype: str

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for given sizes of the symbolic axes."""
        return tuple(axis_size(a, sizes) if isinstance(a, str) else a for a in self.axes)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "axes": list(self.axes), "dtype": self.dtype}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TensorSpec:
        """Read what `to_json` wrote."""
        return TensorSpec(data["name"], tuple(data["axes"]), data["dtype"])


@dataclass(frozen=True)
class Contract:
    """What goes into an engine, what comes out, and how large it may be.

    Args:
        ranges: by axis.
        profiles: within the ranges; each is a plan of its own in a TensorRT engine.
        max_side: rows and columns that an image may have at most, each: those of the model's position grid. None where
            positions have no bound.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ranges: Mapping[str, Range]
    profiles: tuple[Profile, ...] = ()
    max_side: int | None = None

    def __post_init__(self) -> None:
        if not self.profiles:
            object.__setattr__(self, "profiles", (self.ranges,))

    @staticmethod
    def of(
        spec: ModelSpec,
        precision: Precision,
        ranges: Mapping[str, Range] | None = None,
        *,
        outputs: Sequence[str] = (),
        profiles: Sequence[Profile] = (),
    ) -> Contract:
        """The contract of a model.

        Args:
            precision: the compute type, which is also that of the I/O tensors that carry features.
            ranges: by axis; `DEFAULT_RANGES` where not given, never beyond the positions that the model has.
            outputs: names of block outputs to return as well, e.g. ``blocks.12``.
            profiles: for TensorRT, by axis; axes that one leaves out have the range of all. An axis without a range of
                its own takes what the profiles span.

        Raises:
            UsageError: an unknown axis, a range that exceeds the model's position grid, or a profile outside a range.
        """
        given = {**spanned(profiles), **(ranges or {})}
        unknown = sorted(set(given) - set(AXES))
        if unknown:
            raise UsageError(f"the axes are {', '.join(AXES)}", received=str(unknown), fix="name one of them")
        default = DEFAULT_RANGES["img_tokens"]
        limit = spec.max_img_tokens or max(default.max, given.get("img_tokens", default).max)
        if given.get("img_tokens", Range(1, 1, 1)).max > limit:
            raise UsageError(
                f"{spec.name} has positions for {spec.pos_max_size} × {spec.pos_max_size} = {limit} image tokens",
                received=f"img_tokens up to {given['img_tokens'].max}",
                fix=f"--img-tokens with a maximum of {limit} or less",
            )
        fitted = Range(min(default.min, limit), min(default.opt, limit), min(default.max, limit))
        compute = precision.dtype
        return Contract(
            inputs=_inputs(spec, compute),
            outputs=(
                TensorSpec("sample", ("batch", "img_tokens", spec.out_dim), compute),
                *(TensorSpec(name, ("batch", _axis_of(name), spec.width), compute) for name in dict.fromkeys(outputs)),
            ),
            ranges=(all_ranges := {**DEFAULT_RANGES, "img_tokens": fitted, **given}),
            profiles=tuple(within(profile, all_ranges) for profile in profiles),
            max_side=spec.pos_max_size or None,
        )

    def split(self, conditions: Collection[str], table: TensorSpec) -> tuple[Contract, Contract]:
        """The contracts of a model that is cut in two: what makes the modulation table, and what reads it.

        The first takes a whole schedule in one call: its `batch` is steps × samples, from one step to `MAX_STEPS`. The
        second takes one step, at the ranges and profiles of the whole.

        Args:
            conditions: names of the inputs that the table is made of.
            table: what passes between the two, with `batch` as its only symbolic axis.
        """
        batch = self.ranges["batch"]
        rows = Range(batch.min, batch.opt * USUAL_STEPS, batch.max * MAX_STEPS)
        conditioning = Contract(tuple(t for t in self.inputs if t.name in conditions), (table,), {"batch": rows})
        others = (*(t for t in self.inputs if t.name not in conditions), table)
        return conditioning, replace(self, inputs=others)

    def check(self, received: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, int]:
        """Check named tensors against the contract, before any runtime sees them.

        Args:
            received: (dtype, shape) by input name; dtypes by torch's names.

        Returns:
            The size of each symbolic axis.

        Raises:
            ContractError: names the tensor or axis, the rule, what was received, and the fix.
        """
        expected = {t.name: t for t in self.inputs}
        if set(received) != set(expected):
            missing, extra = sorted(set(expected) - set(received)), sorted(set(received) - set(expected))
            raise ContractError(
                f"the inputs are {', '.join(expected)}",
                received=f"missing {missing}, unknown {extra}",
                fix="pass exactly these names",
            )
        sizes: dict[str, int] = {}
        seen_in: dict[str, str] = {}
        for tensor in self.inputs:
            dtype, shape = received[tensor.name]
            if dtype != tensor.dtype:
                raise ContractError(
                    f"{tensor.name} is {tensor.dtype}", received=dtype, fix=f"convert it to {tensor.dtype}"
                )
            if len(shape) != len(tensor.axes):
                raise ContractError(
                    f"{tensor.name} has the axes {_shown(tensor.axes)}",
                    received=f"shape {list(shape)}",
                    fix="reshape it",
                )
            for i, (axis, size) in enumerate(zip(tensor.axes, shape, strict=True)):
                if isinstance(axis, int):
                    if size != axis:
                        raise ContractError(
                            f"{tensor.name} has the axes {_shown(tensor.axes)}",
                            received=f"shape {list(shape)}",
                            fix=f"its axis {i} must be {axis}",
                        )
                elif sizes.setdefault(axis, size) != size:
                    raise ContractError(
                        f"{axis} is one size in all tensors",
                        received=f"{sizes[axis]} in {seen_in[axis]}, {size} in {tensor.name}",
                        fix="make them equal",
                    )
                else:
                    seen_in.setdefault(axis, tensor.name)
                    allowed = self.ranges[axis]
                    if not allowed.min <= size <= allowed.max:
                        wider = Range(min(allowed.min, size), allowed.opt, max(allowed.max, size))
                        raise ContractError(
                            f"{axis} must be {allowed.min} to {allowed.max} in this engine",
                            received=f"{size} ({tensor.name})",
                            fix=f"export with --{axis.replace('_', '-')} {wider}" if size else "pass at least one",
                        )
        return sizes

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": [t.to_json() for t in self.inputs],
            "outputs": [t.to_json() for t in self.outputs],
            "ranges": profile_to_json(self.ranges),
            "profiles": [profile_to_json(profile) for profile in self.profiles],
            "max_side": self.max_side,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Contract:
        """Read what `to_json` wrote."""
        return Contract(
            tuple(TensorSpec.from_json(t) for t in data["inputs"]),
            tuple(TensorSpec.from_json(t) for t in data["outputs"]),
            profile_from_json(data["ranges"]),
            tuple(profile_from_json(profile) for profile in data.get("profiles", ())),
            None if data.get("max_side") is None else int(data["max_side"]),
        )


def _inputs(spec: ModelSpec, compute: str) -> tuple[TensorSpec, ...]:
    """What a model reads, in the order of diffusers' ``forward``."""
    possible = (
        (True, TensorSpec("hidden_states", ("batch", "img_tokens", spec.img_dim), compute)),
        (True, TensorSpec("encoder_hidden_states", ("batch", "txt_tokens", spec.txt_dim), compute)),
        (spec.txt_mask, TensorSpec("encoder_hidden_states_mask", ("batch", "txt_tokens"), "bool")),
        (True, TensorSpec("timestep", ("batch",), "float32")),
        (bool(spec.pooled_dim), TensorSpec("pooled_projections", ("batch", spec.pooled_dim), compute)),
        (spec.guidance, TensorSpec("guidance", ("batch",), "float32")),
        (True, TensorSpec("img_ids", ("img_tokens", spec.id_axes), "float32")),
        (bool(spec.rope_axes), TensorSpec("txt_ids", ("txt_tokens", spec.id_axes), "float32")),
        (
            bool(spec.residuals),
            TensorSpec("block_controlnet_hidden_states", (spec.residuals, "batch", "img_tokens", spec.width), compute),
        ),
    )
    return tuple(tensor for present, tensor in possible if present)


def _axis_of(block: str) -> str:
    """The token axis of what a block makes: a joint block's image tokens, all tokens of a single block."""
    return TOKENS if block.startswith("single_blocks.") else "img_tokens"


def _shown(axes: tuple[str | int, ...]) -> str:
    return "[" + ", ".join(str(a) for a in axes) + "]"
