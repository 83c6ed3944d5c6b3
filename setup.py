"""Builds the extensions with ninja. Everything else about the package is in pyproject.toml.

    siren._cpu        the CPU engine
    siren._emulator   the CUDA kernel, compiled for the host
    siren._cuda       the CUDA kernel, where nvcc is found; without it everything else still works

No torch header is included, so nothing of torch is needed to build: a C++17 compiler, pybind11 and ninja.

    CXX, CXXFLAGS     the compiler, and flags added after ours
    SIREN_SANITIZE    "address,undefined" or "thread": instrumented, for the tests, and without siren._cuda; "thread" is
                      for siren._cpu alone, as the emulator's threads are fibers
    SIREN_CUDA        0 skips siren._cuda; 1 makes its absence an error
    SIREN_CUDA_ARCHS  GPUs to compile for, "80,90a,100,120" unless set, less what nvcc does not know
    CUDA_HOME         where bin/nvcc is, if not on PATH
"""

from __future__ import annotations

import os
import platform
import re
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
ARCHS = "80,90a,100,120"
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
CUDA_RULES = """\
rule compile_cuda
  command = $nvcc $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $out
rule link_cuda
  command = $nvcc $flags $in -o $out
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


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME and no other if that is set, else of PATH, else of the usual folder."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def target_flags(nvcc: str) -> list[str]:
    """-gencode for each target; the newest also as PTX, which later GPUs compile for themselves."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    given = os.environ.get("SIREN_CUDA_ARCHS")
    targets = sorted(set((given or ARCHS).split(",")), key=lambda target: int(target.rstrip("af")))
    missing = [target for target in targets if target.rstrip("af") not in known]
    if given and missing:
        fail(f"{nvcc} does not know {missing[0]} of SIREN_CUDA_ARCHS: it knows {','.join(sorted(known, key=int))}")
    targets = [target for target in targets if target not in missing]
    flags = []
    for target in targets:
        ptx = target == targets[-1] and target.isdigit()
        code = f"[sm_{target},compute_{target}]" if ptx else f"sm_{target}"
        flags += ["-gencode", f"arch=compute_{target},code={code}"]
    return flags


def cuda_compiler() -> list[str] | None:
    """nvcc and the flags of its targets, for siren._cuda; None leaves that out."""
    wanted = os.environ.get("SIREN_CUDA", "")
    if wanted not in ("", "0", "1"):
        fail(f"SIREN_CUDA must be 0 or 1, not {wanted!r}")
    if wanted == "0":
        return None
    archs = os.environ.get("SIREN_CUDA_ARCHS") or ARCHS
    if not re.fullmatch(r"\d{2,3}[af]?(,\d{2,3}[af]?)*", archs):
        fail(f"SIREN_CUDA_ARCHS must be like '80,90a,120', not {archs!r}")
    nvcc = find_nvcc()
    if wanted == "1" and not nvcc:
        place = "in bin of CUDA_HOME" if os.environ.get("CUDA_HOME") else "on PATH"
        fail(f"SIREN_CUDA=1, but nvcc was not found {place}: install the CUDA toolkit, or unset SIREN_CUDA")
    return [nvcc, *target_flags(nvcc)] if nvcc else None


def escape(text: object) -> str:
    """A path or a word as ninja reads it."""
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quote(words: list[str]) -> str:
    """Words of a command, as ninja and then the shell read them."""
    return shlex.join(words).replace("$", "$$")


def statement(rule: str, target: Path, inputs: list[Path], flags: list[str]) -> str:
    return f"build {escape(target)}: {rule} {' '.join(map(escape, inputs))}\n  flags = {quote(flags)}\n"


def ninja_file(name: str, nvcc: list[str] | None, build: Path, output: Path) -> str:
    """The text of build.ninja: one object per file, kernels.cpp one per instruction path, one shared library."""
    import pybind11

    cxx = find_compiler()
    sanitizer = sanitizer_flags()
    includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    common = [*COMMON, *(SANITIZED if sanitizer else OPTIMISED), *sanitizer, *(f"-I{path}" for path in includes)]
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    folder = ROOT / "csrc" / ("cpu" if name == "_cpu" else "cuda")

    objects: dict[str, tuple[Path, list[str]]] = {}  # name: source and flags
    if name == "_cpu":
        paths = accepted_paths(cxx)
        common += ["-DSIREN_X86=1"] * X86 + [f"-DSIREN_HAVE_{path.upper()}=1" for path in paths]
        for path, flags in paths.items():
            objects[f"kernels_{path}.o"] = folder / "kernels.cpp", [f"-DSIREN_ISA={path}", *flags]
        for source in sorted(folder.glob("*.cpp")):
            if source.name != "kernels.cpp":
                objects[f"{source.stem}.o"] = source, []
    elif name == "_emulator":
        for stem in ("context", "fibers", "emulate", "bind_emulator"):
            objects[f"{stem}.o"] = folder / f"{stem}.cpp", ["-Wno-unknown-pragmas"]  # nvcc's, in the kernel
    else:
        objects["bind_cuda.o"] = folder / "bind_cuda.cpp", []

    text = [RULES, f"cxx = {quote(cxx)}\n"]
    text += [
        statement("compile", build / object_name, [source], [*common, *flags, *extra])
        for object_name, (source, flags) in objects.items()
    ]
    inputs = [build / object_name for object_name in objects]
    ldflags = shlex.split(os.environ.get("LDFLAGS", ""))
    if name == "_cuda":
        assert nvcc is not None
        host = ["-ccbin", *cxx] if len(cxx) == 1 else []
        flags = ["-std=c++17", "-O3", *nvcc[1:], "--threads", "0", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        text += [CUDA_RULES, f"nvcc = {quote(nvcc[:1])}\n"]
        text.append(
            statement("compile_cuda", build / "launch.o", [folder / "launch.cu"], [*host, *flags, f"-I{includes[0]}"])
        )
        # The runtime inside, and hidden: torch brings another one.
        shared = ["-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL", "-Xcompiler", "-pthread"]
        words = [word for flag in ldflags for word in ("-Xcompiler", flag)]
        text.append(statement("link_cuda", output, [*inputs, build / "launch.o"], [*host, *shared, *words]))
    else:
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        text.append(statement("link", output, inputs, [*shared, "-pthread", *sanitizer, *extra, *ldflags]))
    return "".join(text)


class NinjaBuild(build_ext):
    """setuptools passes one set of flags to all files of an extension; this needs flags per file, and all cores."""

    def build_extensions(self) -> None:
        nvcc = cuda_compiler()
        left_out = set() if nvcc else {"siren._cuda"}
        if sanitizer_flags():
            left_out = {"siren._cuda"}
        if os.environ.get("SIREN_SANITIZE") == "thread":
            left_out.add("siren._emulator")
        built = []
        for ext in self.extensions:
            output = Path(self.get_ext_fullpath(ext.name)).resolve()
            if ext.name in left_out or not self.ninja(ext.name.rpartition(".")[2], nvcc, output):
                output.unlink(missing_ok=True)  # of an earlier build
            else:
                built.append(ext)
        self.extensions = built

    def ninja(self, name: str, nvcc: list[str] | None, output: Path) -> bool:
        """Whether the extension was built; False is for siren._cuda only, unless that is asked for."""
        build = Path(self.build_temp).resolve() / f"siren.{name}"
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(name, nvcc, build, output), encoding="utf-8")
        if subprocess.run([find_ninja(), "-C", str(build)]).returncode == 0:
            return True
        if name != "_cuda" or os.environ.get("SIREN_CUDA") == "1":
            fail(f"siren.{name} did not build; the compiler's messages are above")
        print("siren: siren._cuda did not build and is left out; SIREN_CUDA=1 makes that an error", file=sys.stderr)
        return False


setup(
    package_dir={"siren": "siren", "siren.kernels": "kernels"},
    packages=["siren", "siren.align", "siren.data", "siren.evaluate", "siren.kernels", "siren.studies", "siren.train"],
    ext_modules=[Extension(f"siren.{name}", sources=[]) for name in ("_cpu", "_emulator", "_cuda")],
    cmdclass={"build_ext": NinjaBuild},
)
