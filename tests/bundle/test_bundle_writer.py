"""`staged_bundle` in one process: whole or not at all, and never over what it should not replace."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mmdit_deploy.bundle import open_bundle, renames, staged_bundle
from mmdit_deploy.errors import BundleError, MachineError, UsageError

Fill = Callable[..., None]


def _names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


@pytest.fixture(params=["renameat2", "plain rename"])
def any_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also as on file systems that know no flags of renameat2."""
    if request.param == "plain rename":

        def unknown(source: Path, target: Path, flags: int) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

        monkeypatch.setattr(renames, "_renameat2", unknown)


@pytest.mark.usefixtures("any_kernel")
def test_the_bundle_appears_when_the_block_ends(tmp_path: Path, fill: Fill) -> None:
    final = tmp_path / "not" / "yet" / "mini"
    with staged_bundle(final, force=False) as directory:
        assert directory.parent.parent == final.parent
        assert directory.parent.name.startswith(".partial-mini-")
        fill(directory)
        assert not final.exists()
    assert _names(final) == ["engines", "manifest.json", "model.onnx", "report.html", "weights.safetensors"]
    assert _names(final.parent) == ["mini"]
    assert open_bundle(final).name == "mini"


def test_the_bundle_has_ordinary_permissions(bundle: Path, tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.mkdir()
    assert bundle.stat().st_mode == ordinary.stat().st_mode


@pytest.mark.parametrize("failure", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), OSError(2, "x")])
@pytest.mark.usefixtures("any_kernel")
def test_a_failure_leaves_nothing(tmp_path: Path, fill: Fill, failure: BaseException) -> None:
    with pytest.raises(type(failure)) as caught, staged_bundle(tmp_path / "mini", force=False) as directory:
        fill(directory)
        raise failure
    assert caught.value is failure
    assert _names(tmp_path) == []


def test_a_failure_with_force_keeps_the_old_bundle(bundle: Path) -> None:
    with pytest.raises(ValueError, match="broken"), staged_bundle(bundle, force=True) as directory:
        (directory / "model.onnx").write_bytes(b"new")
        raise ValueError("broken")
    assert open_bundle(bundle).file("model.onnx").read_bytes() == b"graph"
    assert _names(bundle.parent) == ["mini"]


def test_an_existing_bundle_is_refused_before_any_work(bundle: Path) -> None:
    before = bundle.parent.stat().st_mtime_ns
    with pytest.raises(BundleError, match="on request only") as caught, staged_bundle(bundle, force=False):
        pytest.fail("the block must not run")
    assert caught.value.exit_status == 2
    assert str(bundle) in str(caught.value) and "--force" in str(caught.value) and "-o" in str(caught.value)
    assert bundle.parent.stat().st_mtime_ns == before


@pytest.mark.usefixtures("any_kernel")
def test_force_swaps_the_bundle_whole(bundle: Path, fill: Fill) -> None:
    (bundle / "old-only.txt").write_text("old")
    with staged_bundle(bundle, force=True) as directory:
        fill(directory, mark=b"2")
        assert open_bundle(bundle).file("model.onnx").read_bytes() == b"graph"
    assert open_bundle(bundle).file("model.onnx").read_bytes() == b"graph2"
    assert not (bundle / "old-only.txt").exists()
    assert _names(bundle.parent) == ["mini"]


@pytest.mark.usefixtures("any_kernel")
def test_force_replaces_an_empty_directory_and_a_broken_bundle(tmp_path: Path, bundle: Path, fill: Fill) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    text = (bundle / "manifest.json").read_bytes()
    (bundle / "manifest.json").write_bytes(b"[" + text[1:])
    for final in (empty, bundle):
        with staged_bundle(final, force=True) as directory:
            fill(directory)
        open_bundle(final)


@pytest.mark.usefixtures("any_kernel")
def test_force_works_where_nothing_is(tmp_path: Path, fill: Fill) -> None:
    with staged_bundle(tmp_path / "mini", force=True) as directory:
        fill(directory)
    open_bundle(tmp_path / "mini")


def test_there_is_a_bundle_at_every_moment_of_a_swap(bundle: Path, fill: Fill) -> None:
    probe = [bundle.parent / "a", bundle.parent / "b"]
    for path in probe:
        path.mkdir()
    try:
        renames._renameat2(probe[0], probe[1], renames._EXCHANGE)
    except OSError as error:
        pytest.skip(f"this file system cannot exchange directories: {error}")
    stop = threading.Event()
    missing = 0
    looked = 0

    def look() -> None:
        nonlocal missing, looked
        while not stop.is_set():
            missing += not (bundle / "manifest.json").exists()
            looked += 1

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for number in range(20):
            with staged_bundle(bundle, force=True) as directory:
                fill(directory, mark=b"%d" % number)
    finally:
        stop.set()
        watcher.join()
    assert looked > 20 and missing == 0


def _file(path: Path) -> None:
    path.write_text("mine")


def _directory(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("mine")


def _web_application(path: Path) -> None:
    _directory(path)
    (path / "manifest.json").write_text('{"name": "app", "icons": []}')


def _link(path: Path) -> None:
    path.with_name("elsewhere").mkdir()
    path.symlink_to("elsewhere")


def _broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("make", [_file, _directory, _web_application, _link, _broken_link])
def test_what_is_no_bundle_is_never_replaced(tmp_path: Path, make: Callable[[Path], None], force: bool) -> None:
    final = tmp_path / "mini"
    make(final)
    before = _names(tmp_path)
    with pytest.raises(BundleError, match="choose another -o") as caught, staged_bundle(final, force=force):
        pytest.fail("the block must not run")
    assert "pass --force" not in str(caught.value)
    assert _names(tmp_path) == before


@pytest.mark.usefixtures("any_kernel")
@pytest.mark.parametrize("make", [_file, _directory, Path.mkdir])
def test_what_appeared_meanwhile_is_not_replaced(tmp_path: Path, fill: Fill, make: Callable[[Path], None]) -> None:
    final = tmp_path / "mini"
    with pytest.raises(BundleError, match="when the export was done"):
        with staged_bundle(final, force=False) as directory:
            fill(directory)
            make(final)
            before = final.stat()
    assert final.stat().st_ino == before.st_ino
    assert _names(tmp_path) == ["mini"]


@pytest.mark.usefixtures("any_kernel")
def test_force_does_not_replace_what_appeared_and_is_no_bundle(tmp_path: Path, fill: Fill) -> None:
    final = tmp_path / "mini"
    with pytest.raises(BundleError, match="nothing else"), staged_bundle(final, force=True) as directory:
        fill(directory)
        _directory(final)
    assert (final / "thesis.txt").read_text() == "mine"


@pytest.mark.usefixtures("any_kernel")
def test_the_second_of_two_writers_loses_and_the_first_keeps_all(tmp_path: Path, fill: Fill) -> None:
    final = tmp_path / "mini"
    with pytest.raises(BundleError):
        with staged_bundle(final, force=False) as slow:
            fill(slow, mark=b"slow")
            with staged_bundle(final, force=False) as fast:
                fill(fast, mark=b"fast")
            assert slow.is_dir()  # the other run did not take it for an abandoned one
    assert open_bundle(final).file("model.onnx").read_bytes() == b"graphfast"
    assert _names(tmp_path) == ["mini"]


@pytest.mark.usefixtures("any_kernel")
def test_of_two_writers_with_force_the_last_wins(tmp_path: Path, fill: Fill) -> None:
    final = tmp_path / "mini"
    with staged_bundle(final, force=True) as slow:
        fill(slow, mark=b"slow")
        with staged_bundle(final, force=True) as fast:
            fill(fast, mark=b"fast")
    assert open_bundle(final).file("model.onnx").read_bytes() == b"graphslow"
    assert _names(tmp_path) == ["mini"]


def test_a_link_in_the_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"model\.onnx \(a symbolic link\)"):
        with staged_bundle(tmp_path / "mini", force=False) as directory:
            (directory / "model.onnx").symlink_to("/etc/hostname")
    assert _names(tmp_path) == []


def test_a_swap_that_fails_halfway_puts_the_old_one_back(
    bundle: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(source: Path, target: Path, flags: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if "partial" in str(source) and Path(target) == bundle:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(renames, "_renameat2", unknown)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(MachineError, match="Input/output error"):
        with staged_bundle(bundle, force=True) as directory:
            fill(directory, mark=b"new")
    assert open_bundle(bundle).file("model.onnx").read_bytes() == b"graph"
    assert _names(bundle.parent) == ["mini"]


@pytest.mark.parametrize("inside", ["mini", "deeper/mini"])
def test_a_file_as_parent_is_refused(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="must be"), staged_bundle(tmp_path / "file" / inside, force=True):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("name", ["/", "x" * 300])
def test_an_impossible_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError), staged_bundle(tmp_path / name, force=False):
        pytest.fail("the block must not run")


def test_the_longest_name_works(tmp_path: Path, fill: Fill) -> None:
    final = tmp_path / ("é" * 127)
    for force in (False, True):
        with staged_bundle(final, force=force) as directory:
            fill(directory)
    open_bundle(final)


def test_relative_paths_work(tmp_path: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with staged_bundle("mini", force=False) as directory:
        fill(directory)
        monkeypatch.chdir("/")
    open_bundle(tmp_path / "mini")
    monkeypatch.chdir(tmp_path / "mini")
    with pytest.raises(BundleError), staged_bundle(".", force=False):
        pytest.fail("the block must not run")
