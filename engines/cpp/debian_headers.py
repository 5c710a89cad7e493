"""Headers for the C++ runtime's tests, from Debian: a package each, checked by SHA-256, unpacked without root.

    .deb  =  ar archive  ⊃  data.tar.xz  ⊃  ./usr/include/…

Only the standard library is needed. A machine with Debian's own packages, or others, needs none of this: CMake finds
them.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import lzma
import sys
import tarfile
import urllib.request
from pathlib import Path

# The file's path on a mirror, and its SHA-256 (trixie's Packages). ONNX Runtime's headers serve every later library.
PACKAGES = {
    "pool/main/o/onnxruntime/libonnxruntime-dev_1.21.0+dfsg-1_amd64.deb": (
        "14f7d959d5deacbcf1504830d4189f91fc67382b399ed9ae9d3aa9c4050ced08"
    ),
    "pool/main/n/nlohmann-json3/nlohmann-json3-dev_3.11.3-2.1_all.deb": (
        "741a6a32f61a14eaf9560ba1814b27da8e78fa3b9bed9e8867ab46316ddf3793"
    ),
}
NOT_DOWNLOADED = 3  # the exit status
WANTED = ("./usr/include/", "./usr/share/cmake/")


def member(archive: bytes, name: str) -> bytes:
    """A member of an ar archive: each has a header of 60 bytes, with its size in bytes 48 to 58, and an even place."""
    at = 8  # "!<arch>\n"
    while at + 60 <= len(archive):
        size = int(archive[at + 48 : at + 58])
        if archive[at : at + 16].decode().strip().rstrip("/") == name:
            return archive[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise KeyError(name)


def unpack(package: bytes, folder: Path) -> None:
    """Write a package's headers and CMake files below a folder."""
    content = lzma.decompress(member(package, "data.tar.xz"))
    with tarfile.open(fileobj=io.BytesIO(content)) as files:
        for entry in files:
            if entry.isfile() and entry.name.startswith(WANTED) and ".." not in entry.name:
                path = folder / entry.name.removeprefix("./usr/")
                path.parent.mkdir(parents=True, exist_ok=True)
                extracted = files.extractfile(entry)
                assert extracted is not None  # a file
                path.write_bytes(extracted.read())


def main(mirror: str, folder: Path) -> int:
    """Download, check and unpack all packages; nothing where that was done before."""
    wanted = "\n".join(f"{sha256}  {path}" for path, sha256 in PACKAGES.items())
    done = folder / "SHA256SUMS"
    if done.exists() and done.read_text() == wanted:
        return 0
    for path, sha256 in PACKAGES.items():
        try:
            with urllib.request.urlopen(f"{mirror}/{path}", timeout=60) as response:
                package = response.read()
        except (OSError, http.client.HTTPException) as error:
            print(
                "the C++ runtime's headers are downloaded from Debian before its first build\n"
                f"  received: {mirror}/{path}: {error}\n"
                "  fix:      run it with network access once; or make DEBIAN=… for another mirror",
                file=sys.stderr,
            )
            return NOT_DOWNLOADED
        received = hashlib.sha256(package).hexdigest()
        if received != sha256:
            print(f"{mirror}/{path} must have the SHA-256 {sha256}; received {received}", file=sys.stderr)
            return 1
        unpack(package, folder)
    done.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
