"""The user's cache folder: where it is, and that nothing about it is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmdit_deploy.cache_folder import cache_folder, read_cached, write_cached


def test_it_is_where_the_variable_says_or_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mmdit-deploy"
    for value in ("relative", ""):  # the specification has relative paths ignored
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == Path("/home/somebody/.cache/mmdit-deploy")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/somebody/.cache/mmdit-deploy")


def test_without_a_home_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder() is None


def test_what_was_written_is_read(tmp_path: Path) -> None:
    file, noted = tmp_path / "a" / "b" / "file", list[str]()
    assert read_cached(file, noted.append) == b""  # none yet: no news
    assert write_cached(file, b"1", noted.append) and write_cached(file, b"2", noted.append)
    assert read_cached(file, noted.append) == b"2" and noted == []
    assert file.parent.stat().st_mode & 0o077 == 0 and [path.name for path in file.parent.iterdir()] == ["file"]


def test_a_place_that_cannot_be_used_is_noted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "file" / "x", tmp_path / "folder"):
        noted: list[str] = []
        assert read_cached(place, noted.append) == b"" and not write_cached(place, b"1", noted.append)
        assert [line.split(":")[0] for line in noted] == ["the cache is not read", "the cache is not kept"]
        assert all(str(tmp_path) in line for line in noted)
        assert read_cached(place) == b"" and not write_cached(place, b"1")  # and need not be
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
