"""Files appear whole or not at all, and several of them together."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmdit_deploy.atomic import write_synced, write_whole, written_together


def listing(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def test_one_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "1")
    write_whole(tmp_path / "a", b"2")
    assert listing(tmp_path) == {"a": "2"}


def test_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("old")
    paths = [tmp_path / name for name in "abc"]
    with written_together(paths) as partials:
        for partial in partials:
            write_synced(partial, "new")
        assert (tmp_path / "b").read_text() == "old"
    assert listing(tmp_path) == {"a": "new", "b": "new", "c": "new"}


def test_none_where_the_work_fails(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("old")
    with pytest.raises(KeyError), written_together([tmp_path / "a", tmp_path / "b"]) as partials:
        write_synced(partials[0], "new")
        raise KeyError
    assert listing(tmp_path) == {"b": "old"}


@pytest.mark.parametrize("linkable", [True, False])
def test_none_where_one_cannot_be_placed(linkable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not linkable:

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError("no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_text("old")
    (tmp_path / "c").mkdir()  # a file cannot be renamed to it
    with pytest.raises(OSError), written_together([tmp_path / name for name in "abc"]) as partials:
        for partial in partials:
            write_synced(partial, "new")
    (tmp_path / "c").rmdir()
    assert listing(tmp_path) == {"a": "old"}
