"""Does the engine compute the model? Figures, tolerances, and a verdict."""

from mmdit_deploy.verify.cases import default_cases
from mmdit_deploy.verify.engine import verify_against_reference, verify_against_weights
from mmdit_deploy.verify.metrics import compare, within
from mmdit_deploy.verify.records import Case, Check, Errors, Verdict
from mmdit_deploy.verify.reference import Reference, ReferenceRecorder
from mmdit_deploy.verify.tolerances import TOLERANCES, Tolerance, Tolerances, load_tolerances
from mmdit_deploy.verify.under_test import EngineUnderTest

__all__ = [
    "TOLERANCES",
    "Case",
    "Check",
    "EngineUnderTest",
    "Errors",
    "Reference",
    "ReferenceRecorder",
    "Tolerance",
    "Tolerances",
    "Verdict",
    "compare",
    "default_cases",
    "load_tolerances",
    "verify_against_reference",
    "verify_against_weights",
    "within",
]
