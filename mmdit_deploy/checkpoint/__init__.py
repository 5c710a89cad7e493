"""Checkpoints in and out: strict readers, dtype conversion, random weights, and a streaming writer."""

from __future__ import annotations

from mmdit_deploy.checkpoint.convert import convert
from mmdit_deploy.checkpoint.folder import Checkpoint, open_checkpoint
from mmdit_deploy.checkpoint.random_source import random_tensor, weight_statistics
from mmdit_deploy.checkpoint.safetensors_file import SafetensorsFile
from mmdit_deploy.checkpoint.safetensors_header import TensorInfo
from mmdit_deploy.checkpoint.stored_model import StoredModel, open_model
from mmdit_deploy.checkpoint.writer import Layout, plan_layout, write_safetensors

__all__ = [
    "Checkpoint",
    "Layout",
    "SafetensorsFile",
    "StoredModel",
    "TensorInfo",
    "convert",
    "open_checkpoint",
    "open_model",
    "plan_layout",
    "random_tensor",
    "weight_statistics",
    "write_safetensors",
]
