"""From a spec and weights to a verified bundle. The command line only parses and prints."""

from mmdit_deploy.export.machine import default_targets
from mmdit_deploy.export.manifest import versions
from mmdit_deploy.export.pipeline import ExportResult, export, preflight
from mmdit_deploy.export.request import ExportRequest

__all__ = ["ExportRequest", "ExportResult", "default_targets", "export", "preflight", "versions"]
