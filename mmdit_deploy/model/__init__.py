"""The PyTorch reference model, and the same model as a chain of pure calls."""

from mmdit_deploy.model.calls import Call, calls, conditioning_calls
from mmdit_deploy.model.kinds import Kind
from mmdit_deploy.model.mmdit import MMDiT, grid_ids, nearest_square

__all__ = ["Call", "Kind", "MMDiT", "calls", "conditioning_calls", "grid_ids", "nearest_square"]
