"""Whether a checkpoint is of the architecture that it is meant to be."""

from __future__ import annotations

from collections.abc import Collection

from mmdit_deploy.errors import UsageError
from mmdit_deploy.families import family_of
from mmdit_deploy.spec import ModelSpec


def check_same(spec: ModelSpec, expected: ModelSpec, rule: str, *, fix: str, besides: Collection[str] = ()) -> None:
    """Check that a checkpoint's architecture is the expected one, but for what is the export's own.

    Args:
        spec: the checkpoint's.
        expected: of a preset or a bundle.
        rule: that another one breaks.
        fix: what to do then.
        besides: fields that may differ too.

    Raises:
        UsageError: it is another; of another family, the families are named, else the fields.
    """
    differing = spec.differences(expected, besides=besides)
    if not differing:
        return
    if "family" in differing:
        received = f"a {family_of(spec).title} model; {expected.name} is of {family_of(expected).title}"
    else:
        received = ", ".join(f"{key} {ours}, expected {theirs}" for key, (ours, theirs) in differing.items())
    raise UsageError(rule, received=received, fix=fix)
