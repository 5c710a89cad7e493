"""The library is found and left out as its README says, and the README's program compiles."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_back_end_whose_headers_are_missing_is_left_out_with_a_message(release: Path, tmp_path: Path) -> None:
    json = release.parent / "headers/share/cmake/nlohmann_json"
    absent = [f"-DCMAKE_DISABLE_FIND_PACKAGE_{package}=ON" for package in ("ONNXRuntime", "TensorRT")]
    command = ["cmake", "-S", ROOT / "engines/cpp", "-B", tmp_path, f"-Dnlohmann_json_DIR={json}", *absent]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for package in ("ONNXRuntime", "TensorRT"):
        assert f"{package} back end: left out, for its headers or library were not found" in done.stdout


def test_the_program_in_the_readme_compiles(release: Path, tmp_path: Path) -> None:
    text = (ROOT / "engines/cpp/README.md").read_text()
    (program,) = re.findall(r"```cpp\n(.*?)```", text, re.DOTALL)
    (tmp_path / "main.cpp").write_text(program)
    include = f"-I{ROOT / 'engines/cpp/include'}"
    library = [f"-L{release}", "-lmmdit_engine", f"-Wl,-rpath,{release}", f"-Wl,-rpath-link,{release / 'onnxruntime'}"]
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", include, tmp_path / "main.cpp", *library]
    done = subprocess.run([*command, "-o", tmp_path / "main"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ran = subprocess.run([tmp_path / "main"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and "a bundle is a directory with a manifest.json" in ran.stderr


def test_the_c_header_is_c(release: Path, tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text('#include "mmdit_engine.h"\nint main(void) { return MMDIT_OK; }\n')
    include = f"-I{ROOT / 'engines/cpp/include'}"
    command = [
        "cc",
        "-std=c99",
        "-pedantic",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsyntax-only",
        include,
        tmp_path / "main.c",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
