"""Alpha and rank decide how strong a LoRA is, and each format keeps alpha elsewhere.

In a tensor ``<module>.alpha``, in PEFT's ``adapter_config.json``, or in the file's metadata, where diffusers puts that
config. What kohya's scripts say in ``ss_network_alpha`` is not taken: they always store the tensor too, and read a file
without it with alpha = rank, because their converter multiplies alpha into the factors and leaves the metadata as it
was (github.com/kohya-ss/sd-scripts, networks/convert_flux_lora.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from mmdit_deploy.checkpoint import SafetensorsFile
from mmdit_deploy.checkpoint.strict_json import parse_json_object, quote
from mmdit_deploy.errors import CheckpointError

_T = TypeVar("_T")
_METADATA = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY
_TRANSFORMER = "transformer."
_FIX = "merge it into the checkpoint with PEFT (merge_and_unload), and export that"

# Fields of peft.LoraConfig that, if set, make a layer something else than W + alpha/rank · B·A.
_VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
)
# Values of init_lora_weights that take the factors out of the base weights: B·A then belongs on what was left of them.
# PEFT's conversion (path_initial_model_for_weight_conversion) sets the field to true.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """What PEFT's config says about alpha.

    Args:
        where: it was read from, for messages.
        alpha, rank: of modules that no pattern names.
        alphas, ranks: of modules whose names a pattern matches.
        rslora: the factor is alpha / √rank (Kalajdzievski 2023, arXiv:2312.03732).
    """

    where: str
    alpha: float
    rank: int
    alphas: Mapping[re.Pattern[str], float]
    ranks: Mapping[re.Pattern[str], int]
    rslora: bool

    def of(self, module: str, rank: int) -> tuple[float, float]:
        """Alpha, and the factor of B·A.

        Args:
            module: its name in the model, without prefix.
            rank: of its factors.

        Raises:
            CheckpointError: the config gives it another rank.
        """
        expected = _by_pattern(self.ranks, module, self.rank)
        if expected != rank:
            raise CheckpointError(
                f"{self.where} must belong to these tensors",
                received=f"rank {expected} for {quote(module)}, whose factors have rank {rank}",
                fix="pass the config and the tensors that were saved together",
            )
        alpha = _by_pattern(self.alphas, module, self.alpha)
        return alpha, alpha / (math.sqrt(rank) if self.rslora else rank)


def read_config(config: Mapping[str, Any], where: str) -> AdapterConfig:
    """Read the fields of a `peft.LoraConfig`.

    Raises:
        CheckpointError: it describes something else than a plain LoRA, or a field is not what PEFT writes.
    """
    kind, init = config.get("peft_type", "LORA"), config.get("init_lora_weights")
    if kind != "LORA":
        raise CheckpointError(f"{where} must be that of a LoRA", received=f"peft_type {quote(kind)}", fix=_FIX)
    for field in _VARIANTS:
        if config.get(field):
            raise CheckpointError(
                f"{where} must be that of a plain LoRA: W + scale · alpha/rank · B·A",
                received=f"{field} {quote(config[field])}",
                fix=_FIX,
            )
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{where} must be that of a LoRA on the weights of the checkpoint as it is",
            received=f"init_lora_weights {quote(init)}, which also changes the weights that it is added to",
            fix="save it with PEFT's path_initial_model_for_weight_conversion, or merge it there (merge_and_unload)",
        )
    alphas, ranks = config.get("alpha_pattern") or {}, config.get("rank_pattern") or {}
    if not isinstance(alphas, dict) or not isinstance(ranks, dict):
        raise CheckpointError(
            f"the patterns of {where} are tables", received=quote(alphas or ranks), fix="save the LoRA again"
        )
    return AdapterConfig(
        where,
        alpha_of(config.get("lora_alpha"), f"lora_alpha of {where}"),
        _rank_of(config.get("r"), f"r of {where}"),
        {_pattern(p, where): alpha_of(value, f"alpha_pattern of {where}") for p, value in alphas.items()},
        {_pattern(p, where): _rank_of(value, f"rank_pattern of {where}") for p, value in ranks.items()},
        config.get("use_rslora") is True,
    )


def config_in_metadata(file: SafetensorsFile) -> AdapterConfig | None:
    """The config that diffusers saved in a file's metadata; None where there is none for the transformer.

    Raises:
        CheckpointError: it is not what diffusers writes, or describes something else than a plain LoRA.
    """
    if _METADATA not in file.metadata:
        return None
    where = f"{_METADATA} of {file.path}"
    fields = parse_json_object(file.metadata[_METADATA].encode(), where, "save the LoRA again")
    # Pipelines write "transformer.r", "text_encoder.r", …; models write "r".
    if any("." in name for name in fields):
        found = {n.removeprefix(_TRANSFORMER): v for n, v in fields.items() if n.startswith(_TRANSFORMER)}
    else:
        found = fields
    return read_config(found, where) if found else None


def alpha_of(value: object, which: str) -> float:
    """Check an alpha.

    Raises:
        CheckpointError: it is no finite number, or 0, which some programs read as the rank and others as it is.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or value == 0 or not abs(value) < 1e30:
        raise CheckpointError(f"{which} must be a finite number, not 0", received=quote(value), fix="save it again")
    return float(value)


def _rank_of(value: object, which: str) -> int:
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{which} must be a whole number, at least 1", received=quote(value), fix="save it again")
    return value


def _pattern(text: str, where: str) -> re.Pattern[str]:
    """A name or regular expression that ends a module's name, at its start or after a dot.

    As in peft.utils.other.get_pattern_key, but checked first: a regular expression from a stranger can take forever.
    """
    problem = "more than 200 characters, more than three repetitions, or a repeated group"
    if len(text) <= 200 and len(re.findall(r"[*+?{]", text)) <= 3 and not re.search(r"\)[*+?{]", text):
        try:
            return re.compile(rf"(.*\.)?({text})$")
        except (re.error, OverflowError) as error:
            problem = str(error)
    raise CheckpointError(
        f"a pattern of {where} is a module's name, or a simple regular expression for it",
        received=f"{quote(text)}: {problem}",
        fix="write the modules' names out",
    )


def _by_pattern(patterns: Mapping[re.Pattern[str], _T], module: str, default: _T) -> _T:
    return next((value for pattern, value in patterns.items() if pattern.match(module)), default)
