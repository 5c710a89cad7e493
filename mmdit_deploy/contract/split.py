"""A model in two parts: `conditioning` makes the modulation of a whole schedule, `trunk` runs one step with it.

    timestep, pooled_projections, guidance ─ conditioning ─ modulation [steps × batch, total]
                                                                 │ rows of one step: [batch, total]
    hidden_states, encoder_hidden_states, … ───────────────── trunk ─ sample

Rows are by step, and within a step by sample: row s · batch + b. So a step's rows lie next to each other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mmdit_deploy.contract.contract import Contract, TensorSpec

TABLE = "modulation"  # the tensor that passes between the two
CONDITIONING = ("timestep", "pooled_projections", "guidance")  # inputs, of which a model has some


@dataclass(frozen=True)
class SplitContract:
    """The contracts of the two parts, as `Contract.split` makes them of the whole model's."""

    conditioning: Contract
    trunk: Contract

    @staticmethod
    def of(contract: Contract, conditions: Collection[str], width: int, dtype: str) -> SplitContract:
        """The parts of a model.

        Args:
            contract: of the whole.
            conditions: names of the inputs that modulation is made of.
            width: of a row of the table.
            dtype: of the table, by torch's name.
        """
        return SplitContract(*contract.split(conditions, TensorSpec(TABLE, ("batch", width), dtype)))

    @property
    def table(self) -> TensorSpec:
        """What passes between the parts."""
        (table,) = self.conditioning.outputs
        return table

    def to_json(self) -> dict[str, Any]:
        return {"conditioning": self.conditioning.to_json(), "trunk": self.trunk.to_json()}

    @staticmethod
    def from_json(data: Mapping[str, Any], whole: Contract) -> SplitContract:
        """Read what `to_json` wrote.

        Args:
            whole: the model's contract.

        Raises:
            ValueError: the parts are not those of that model.
        """
        read = SplitContract(Contract.from_json(data["conditioning"]), Contract.from_json(data["trunk"]))
        names = [tensor.name for tensor in read.conditioning.inputs]
        if not names or not set(CONDITIONING).issuperset(names):
            raise ValueError(f"the conditioning reads {', '.join(names) or 'nothing'}")
        if [(t.name, t.axes[:1], len(t.axes)) for t in read.conditioning.outputs] != [(TABLE, ("batch",), 2)]:
            raise ValueError(f"the conditioning does not make {TABLE} [batch, …]")
        rows, samples = read.conditioning.ranges["batch"], whole.ranges["batch"]
        if rows.min > samples.min or rows.max < samples.max:
            raise ValueError(f"the conditioning takes {rows} rows, the model {samples} samples")
        conditioning, trunk = whole.split(names, read.table)
        if (conditioning.inputs, trunk) != (read.conditioning.inputs, read.trunk):
            raise ValueError("the conditioning and the trunk are not parts of the contract")
        return read
