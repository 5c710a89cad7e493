"""Renames that replace nothing or swap two directories at once, and what comes close where neither exists."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
from pathlib import Path

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2  # linux/fs.h: RENAME_NOREPLACE, RENAME_EXCHANGE
# What kernels, C libraries and file systems (NFS, for one) answer that do not know the flag.
_UNKNOWN_FLAG = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def _renameat2(source: Path, target: Path, flags: int) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc 2.28, musl 1.2.6
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(source), None, str(target))
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    function.restype = ctypes.c_int
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(source), None, str(target))


def rename_new(source: Path, target: Path) -> None:
    """Renames a directory to a name that nothing has.

    Args:
        source: the directory.
        target: its new path, on the same file system.

    Raises:
        FileExistsError: the target exists, be it an empty directory.
        OSError: the rename is not possible.
    """
    try:
        _renameat2(source, target, _NOREPLACE)
        return
    except OSError as error:
        if error.errno not in _UNKNOWN_FLAG:
            raise
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    try:
        # What appears here in between is safe: rename(2) of a directory replaces at most an empty directory.
        os.rename(source, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error


def swap(new: Path, old: Path) -> None:
    """Exchanges two directories, so that `old` names a whole directory at every moment.

    Where that cannot be done at once, `old` is missing for a moment; a process killed just then leaves what
    it was as ``<old>.replaced-<random>``, where nothing deletes it.

    Args:
        new: the directory to be `old`.
        old: the directory to be `new`, on the same file system.

    Raises:
        FileNotFoundError: one of them does not exist.
        OSError: the exchange is not possible; both are where they were.
    """
    try:
        _renameat2(new, old, _EXCHANGE)
        return
    except OSError as error:
        if error.errno not in _UNKNOWN_FLAG:
            raise
    aside = old.with_name(f"{old.name[:50]}.replaced-{secrets.token_hex(4)}")
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except BaseException:
        with contextlib.suppress(FileExistsError):
            rename_new(aside, old)
        raise
    os.rename(aside, new)
