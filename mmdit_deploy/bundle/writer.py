"""`staged_bundle`: a bundle appears whole or not at all.

It is written beside its final path, synced to the disk, and renamed. A failed run removes what it wrote; what
a killed run (`kill -9`, a power cut) left is removed by the next run that writes to the same parent.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmdit_deploy.bundle.files import list_files
from mmdit_deploy.bundle.manifest import is_bundle
from mmdit_deploy.bundle.renames import rename_new, swap
from mmdit_deploy.bundle.staging import Staging, clear_abandoned, create_staging
from mmdit_deploy.errors import BundleError, MachineError, UsageError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_PUBLISH_TRIES = 10


@contextmanager
def staged_bundle(final: str | os.PathLike[str], *, force: bool) -> Iterator[Path]:
    """Gives a directory to write a bundle to; when the block ends, that directory is the bundle.

    Args:
        final: where the bundle shall be. Its parent is made if missing.
        force: replace a bundle (or an empty directory) that is there. It is exchanged whole, where the kernel
            can without a moment in which there is none, and then deleted with all that is in it.

    Yields:
        An empty directory ``.partial-<name>-<random>/bundle`` beside `final`, on the same file system.

    Raises:
        BundleError: `final` exists and may not be replaced; checked before any work, and again at the end.
        UsageError: `final` cannot be the path of a directory.
        MachineError: the parent cannot be written, or the disk is full.
    """
    target = _target(Path(final))
    _check_target(target, force, f"{target} exists")
    staging = _begin(target)
    try:
        yield staging.content
        _finish(staging.content, target, force)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _disk_full(staging, target, error) from error  # counts before the staging directory goes
    finally:
        staging.discard()


def check_destination(final: str | os.PathLike[str], *, force: bool) -> None:
    """Refuse a place for a bundle that `staged_bundle` would refuse. Nothing is changed.

    Raises:
        BundleError: `final` exists and may not be replaced.
        UsageError: `final` cannot be the path of a directory.
    """
    target = _target(Path(final))
    _check_target(target, force, f"{target} exists")


def _target(final: Path) -> Path:
    """The absolute path. Only the parent's links are resolved: one in the bundle's place must be seen."""
    try:
        if final.name in ("", ".."):  # as in `-o .`
            final = final.resolve()
        target = final.parent.resolve() / final.name
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise UsageError("-o must be the path of a directory", received=str(error), fix="choose another -o") from error
    if not target.name:
        raise UsageError("-o must have a name", received=str(final), fix="add one, e.g. -o dist/sd3-fp16")
    return target


def _check_target(target: Path, force: bool, received: str) -> None:
    """Refuses a target that is there, unless it may be replaced. Nothing is changed."""
    try:
        target.lstat()
    except FileNotFoundError:
        return
    except PermissionError as error:
        raise _no_writing(target, error) from error
    except OSError as error:  # a file in the place of a directory, a name that is too long
        raise UsageError(
            "-o must be the path of a directory",
            received=f"{target} ({error.strerror})",
            fix="choose another -o",
        ) from error
    replaceable, what = _replaceable(target)
    if not replaceable:
        rule = "--force replaces a bundle and nothing else" if force else "a bundle is written to a new path"
        raise BundleError(rule, received=f"{received} and is {what}", fix="choose another -o, or remove it yourself")
    if not force:
        raise BundleError(
            "an existing bundle is replaced on request only",
            received=f"{received} and is {what}",
            fix="pass --force, or choose another -o",
        )


def _replaceable(target: Path) -> tuple[bool, str]:
    """Whether --force may replace what is there, and what that is, in words."""
    if target.is_symlink():
        return False, "a symbolic link"
    if not target.is_dir():
        return False, "a file"
    if os.path.ismount(target):
        return False, "a mount point, which cannot be renamed"
    try:
        if is_bundle(target):
            return True, "a bundle"
        if not os.listdir(target):
            return True, "an empty directory"
    except PermissionError:
        return False, "a directory that cannot be read"
    return False, "a directory that is no bundle"


def _begin(target: Path) -> Staging:
    """Makes the parent and the staging directory, and clears what killed runs left beside it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_abandoned(target.parent)
        return create_staging(target.parent, target.name)
    except OSError as error:
        raise _no_writing(target, error) from error


def _finish(content: Path, target: Path, force: bool) -> None:
    """Syncs the content and gives it its name."""
    try:
        _sync_tree(content)
        _publish(content, target, force)
        _sync(target.parent)
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise MachineError(
            "a finished bundle is synced to the disk and renamed",
            received=f"{target} ({error.strerror})",
            fix="check the disk and the permissions of the parent directory, or choose another -o",
        ) from error


def _sync_tree(content: Path) -> None:
    listing = list_files(content)
    if listing.other:
        raise BundleError(
            "a bundle holds regular files only",
            received=", ".join(f"{name} ({kind})" for name, kind in listing.other.items()),
            fix="write a copy in its place",
        )
    for name in listing.regular:
        _sync(content / name)
    for folder, _, _ in os.walk(content, topdown=False):
        _sync(Path(folder))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _publish(content: Path, target: Path, force: bool) -> None:
    """Renames the content to the target; what was there, if force allows, is where the content was."""
    for _ in range(_PUBLISH_TRIES):
        try:
            rename_new(content, target)
            return
        except FileExistsError:
            _check_target(target, force, f"when the export was done, {target} existed")
        try:
            swap(content, target)
            return
        except FileNotFoundError:  # what was in the way is gone again: another run replaces it, or a user
            continue
    raise FileExistsError(errno.EEXIST, "something else comes and goes there", str(target))


def _no_writing(target: Path, error: OSError) -> MachineError | UsageError:
    if error.errno in _FULL:
        free = shutil.disk_usage(_existing(target)).free
        return MachineError(
            f"the disk of {target.parent} must have room for the bundle",
            received=f"{error.strerror}, {free} bytes free",
            fix="free space there, or write to another disk with -o",
        )
    if isinstance(error, FileExistsError | NotADirectoryError):
        return UsageError(
            "the parent of -o must be a directory",
            received=f"{target.parent} ({error.strerror})",
            fix="choose another -o",
        )
    return MachineError(
        "the parent directory of -o must be writable",
        received=f"{target.parent} ({error.strerror})",
        fix="change its permissions, or choose another -o",
    )


def _disk_full(staging: Staging, target: Path, error: OSError) -> MachineError:
    free = shutil.disk_usage(staging.container).free
    content = staging.content
    written = sum(list_files(content).regular.values()) if content.is_dir() else 0
    where = error.filename or target
    return MachineError(
        f"the disk of {target.parent} must have room for the bundle",
        received=f"{error.strerror} at {where}, after {written} bytes of the bundle, {free} bytes free",
        fix="free space there, or write to another disk with -o",
    )


def _existing(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.exists())
