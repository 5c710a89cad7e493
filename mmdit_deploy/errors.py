"""Every error that the package raises on purpose, and the exit status that each one means.

A message states the rule, what was received, and the fix. `exit_status` follows the command line's contract:
1 parity out of tolerance, 2 what the arguments and files alone decide, 3 what this machine or builder cannot do.
"""

from __future__ import annotations


class MMDiTError(Exception):
    """Base of all errors raised on purpose. `str(error)` is one sentence each for rule, received and fix."""

    exit_status = 2

    def __init__(self, rule: str, *, received: str | None = None, fix: str | None = None):
        self.rule, self.received, self.fix = rule, received, fix
        lines = [rule]
        if received is not None:
            lines.append(f"  received: {received}")
        if fix is not None:
            lines.append(f"  fix:      {fix}")
        super().__init__("\n".join(lines))


class SpecError(MMDiTError):
    """The architecture asked for breaks a rule of the model (depth, heads, ranges, unknown config field)."""


class UsageError(MMDiTError):
    """The arguments contradict each other or name something that does not exist."""


class EnginePartError(UsageError, AttributeError):
    """An engine does not have what a model of layers would: `hasattr` says no, and asking says what to do instead."""


class CheckpointError(MMDiTError):
    """A checkpoint file or folder is missing, broken, of an unknown kind, or does not fit the spec."""


class ContractError(MMDiTError):
    """A tensor handed to an engine breaks the I/O contract: name, dtype, rank, or an axis out of its range."""


class BundleError(MMDiTError):
    """A bundle is not whole, not what its manifest says, or already exists."""


class GraphError(MMDiTError):
    """The graph is not what the spec implies: a fusion that should fire did not, or a count is off."""

    exit_status = 3


class MachineError(MMDiTError):
    """This machine cannot do it: memory, disk, a missing package, an engine that cannot run here."""

    exit_status = 3


class ParityError(MMDiTError):
    """What was built does not compute the model within tolerance."""

    exit_status = 1


class MissingPackageError(MachineError):
    """An optional dependency is not installed.

    Args:
        package: what cannot be imported, e.g. ``onnxruntime``.
        purpose: what needs it, e.g. ``the target ort-cpu``.
        install: the command that installs it.
        found: what importing it said, where it is installed but broken.
    """

    def __init__(self, package: str, *, purpose: str, install: str, found: str | None = None):
        super().__init__(
            f"{purpose} needs the package {package!r}", received=found or "it is not installed", fix=install
        )
