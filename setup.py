"""Builds the C++ extension with ninja. Everything else about the package is in pyproject.toml.

No torch header is included, so nothing of torch is needed to build: a C++17 compiler, pybind11 and ninja.

    CXX, CXXFLAGS     the compiler, and flags added after ours
    SIREN_SANITIZE    "address,undefined" or "thread": an instrumented build, for the tests
    SIREN_CUDA        0 skips CUDA; 1 makes its absence an error
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")

# csrc/cpu/kernels.cpp is compiled once for each instruction path; the engine picks one at run time by CPUID. Every
# file sees SIREN_HAVE_<PATH> for the paths that were built.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"]
PATHS = {"portable": []}
if X86:
    PATHS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    PATHS["avx512"] = AVX512
    PATHS["avx512bf16"] = [*AVX512, "-mavx512bf16", "-mavx512vnni", "-DSIREN_BF16_DOT=1"]

COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-pthread", "-Wall", "-Wextra"]
OPTIMISED = ["-O3"]
SANITIZED = ["-O1", "-g", "-fno-omit-frame-pointer", "-DSIREN_POISON=1"]

RULES = """\
ninja_required_version = 1.5
rule compile
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $out
rule link
  command = $cxx $flags $in -o $out
  description = $out
"""


def fail(message: str) -> None:
    raise SystemExit(f"error: {message}")


def find_compiler() -> list[str]:
    """The words of CXX, or the first usual compiler on PATH."""
    words = shlex.split(os.environ.get("CXX", ""))
    if not words:
        words = [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not words or not shutil.which(words[0]):
        wanted = f"CXX={words[0]} was not found" if words else "no C++ compiler was found"
        fail(f"{wanted}: install g++ or clang++ (C++17), or set CXX to one")
    return words


def find_ninja() -> str:
    """The binary of the `ninja` package, which build isolation installs, or one on PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        found = shutil.which("ninja")
    else:
        found = shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")
    if not found:
        fail("ninja was not found: pip install ninja")
    return str(found)


def sanitizer_flags() -> list[str]:
    kind = os.environ.get("SIREN_SANITIZE", "")
    if kind not in ("", "address,undefined", "thread"):
        fail(f"SIREN_SANITIZE must be 'address,undefined' or 'thread', not {kind!r}")
    return [f"-fsanitize={kind}", "-fno-sanitize-recover=all"] if kind else []


def accepted_paths(cxx: list[str]) -> dict[str, list[str]]:
    """The instruction paths whose flags this compiler knows; gcc learned -mavx512bf16 in version 10."""
    accepted = {}
    for name, flags in PATHS.items():
        probe = subprocess.run([*cxx, *flags, "-fsyntax-only", "-x", "c++", os.devnull], capture_output=True)
        if probe.returncode == 0:
            accepted[name] = flags
        else:
            print(f"siren: the compiler does not know the flags of the {name} path, which is left out", file=sys.stderr)
    return accepted


def check_cuda() -> None:
    wanted = os.environ.get("SIREN_CUDA", "")
    if wanted not in ("", "0", "1"):
        fail(f"SIREN_CUDA must be 0 or 1, not {wanted!r}")
    if wanted == "1":
        if not shutil.which("nvcc"):
            fail("SIREN_CUDA=1, but nvcc was not found on PATH: install the CUDA toolkit, or unset SIREN_CUDA")
        fail("SIREN_CUDA=1, but this version has no CUDA engine yet: unset SIREN_CUDA")


def escape(text: object) -> str:
    """A path or a word as ninja reads it."""
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(build: Path, output: Path) -> str:
    """The text of build.ninja: one object per file, kernels.cpp one per instruction path, one shared library."""
    import pybind11

    cxx = find_compiler()
    paths = accepted_paths(cxx)
    sanitizer = sanitizer_flags()
    includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    common = [*COMMON, *(SANITIZED if sanitizer else OPTIMISED), *sanitizer, *(f"-I{path}" for path in includes)]
    common += ["-DSIREN_X86=1"] * X86 + [f"-DSIREN_HAVE_{name.upper()}=1" for name in paths]
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))

    def statement(rule: str, target: Path, inputs: list[Path], flags: list[str]) -> str:
        words = shlex.join(flags).replace("$", "$$")
        return f"build {escape(target)}: {rule} {' '.join(map(escape, inputs))}\n  flags = {words}\n"

    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    text = [RULES, f"cxx = {shlex.join(cxx).replace('$', '$$')}\n"]
    objects = []
    for source in sources:
        if source.name == "kernels.cpp":
            variants = {f"kernels_{name}.o": [f"-DSIREN_ISA={name}", *flags] for name, flags in paths.items()}
        else:
            variants = {f"{source.stem}.o": []}
        for name, flags in variants.items():
            objects.append(build / name)
            text.append(statement("compile", build / name, [source], [*common, *flags, *extra]))
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    ldflags = shlex.split(os.environ.get("LDFLAGS", ""))
    text.append(statement("link", output, objects, [*shared, "-pthread", *sanitizer, *extra, *ldflags]))
    return "".join(text)


class NinjaBuild(build_ext):
    """setuptools passes one set of flags to all files of an extension; this needs flags per file, and all cores."""

    def build_extension(self, ext: Extension) -> None:
        check_cuda()
        build = Path(self.build_temp).resolve() / ext.name
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(build, output), encoding="utf-8")
        if subprocess.run([find_ninja(), "-C", str(build)]).returncode:
            fail("the C++ extension did not build; the compiler's messages are above")


setup(
    package_dir={"siren": "siren", "siren.kernels": "kernels"},
    packages=["siren", "siren.kernels"],
    ext_modules=[Extension("siren._cpu", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
