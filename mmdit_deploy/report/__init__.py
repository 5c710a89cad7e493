"""Verdicts for people and machines: terminal text, JUnit XML, a self-contained HTML page with plots."""

from __future__ import annotations

from mmdit_deploy.report.html import verdict_html, write_html
from mmdit_deploy.report.junit import write_junit
from mmdit_deploy.report.terminal import verdict_text

__all__ = ["verdict_html", "verdict_text", "write_html", "write_junit"]
