"""Bundles: written whole or not at all, described by a manifest, checked before anything in them is used."""

from __future__ import annotations

from mmdit_deploy.bundle.files import FileRecord, graph_file
from mmdit_deploy.bundle.manifest import Manifest, read_manifest, write_manifest
from mmdit_deploy.bundle.opening import Bundle, open_bundle
from mmdit_deploy.bundle.writer import check_destination, staged_bundle

__all__ = [
    "Bundle",
    "FileRecord",
    "Manifest",
    "check_destination",
    "graph_file",
    "open_bundle",
    "read_manifest",
    "staged_bundle",
    "write_manifest",
]
