"""What an export will need, known before anything heavy: memory, disk and rough time of each stage, or a refusal."""

from mmdit_deploy.preflight.estimates import make_plan
from mmdit_deploy.preflight.plan import Plan, Stage, check_plan, rough_time

__all__ = ["Plan", "Stage", "check_plan", "make_plan", "rough_time"]
