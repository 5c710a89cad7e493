"""Exports killed at any moment leave no half of a bundle, and the next run clears what they left."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmdit_deploy.bundle import open_bundle

COMMAND = "import sys; from mmdit_deploy.cli.export import main; sys.exit(main(sys.argv[1:]))"
EXPORT = [sys.executable, "-c", COMMAND, "--depth", "3", "--fp16", "--no-verify", "--force", "-o"]


@pytest.mark.soak
def test_forty_killed_exports(tmp_path: Path) -> None:
    """`kill -9` at 40 moments from the start to past the end, over a bundle that is already there."""
    out = tmp_path / "bundle"
    start = time.perf_counter()
    subprocess.run([*EXPORT, out], check=True, capture_output=True)
    seconds = time.perf_counter() - start
    moments = random.Random(0)
    killed = 0
    for _ in range(40):
        process = subprocess.Popen([*EXPORT, out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(moments.uniform(0.0, 1.1 * seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
        open_bundle(out)  # whole, whichever of the two it is
    assert killed >= 20
    subprocess.run([*EXPORT, out], check=True, capture_output=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
