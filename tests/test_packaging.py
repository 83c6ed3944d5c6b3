"""The package builds without torch, is complete, and runs from a wheel in another folder."""

from __future__ import annotations

import email.message
import email.parser
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TORCH = (b"libtorch", b"libc10", b"_ZN2at", b"_ZN3c10")  # names of its libraries and of its C++


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the source folder, without the folders that this process imports from."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=ROOT, env=inherited | environment
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source archive, and the wheel that is built from it and nothing else."""
    pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("dist")
    info = tmp_path_factory.mktemp("info")
    made = run(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", info, "sdist", "--dist-dir", folder)
    assert made.returncode == 0, made.stderr
    source = next(folder.glob("siren-*.tar.gz"))
    words = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source)
    made = run(*words, SIREN_CUDA="0")
    assert made.returncode == 0, made.stdout + made.stderr
    return source, next(folder.glob("siren-*.whl"))


@pytest.mark.slow
def test_the_archive_and_the_wheel_are_complete(built: tuple[Path, Path]) -> None:
    """Every source is in the archive; every module, the kernels, the extensions and the types are in the wheel."""
    source, wheel = built
    with tarfile.open(source) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    for pattern in (
        "siren/**/*.py",
        "siren/models/**/*.*",
        "examples/**/*.*",
        "docs/*.*",
        "kernels/*.py",
        "csrc/**/*.h",
        "csrc/**/*.c*",
        "tests/*.*",
        "LICENSE",
        "README.md",
    ):
        wanted = {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)}
        assert wanted
        assert wanted <= packed, pattern
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "siren").rglob("*.py")}
    model = {str(path.relative_to(ROOT)) for path in (ROOT / "siren" / "models").rglob("*") if path.is_file()}
    modules |= {f"siren/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    types = {f"siren/{path.name}" for path in (ROOT / "siren").glob("*.pyi")}
    assert modules | types | model | {"siren/py.typed", "siren/data/recordings.csv"} <= names
    for extension, count in (("_cpu", 1), ("_emulator", 1), ("_cuda", 0)):  # SIREN_CUDA=0
        assert len([name for name in names if re.fullmatch(rf"siren/{extension}\..*\.(so|pyd)", name)]) == count
    assert not [name for name in names if name.startswith(("tests", "csrc", "benchmarks", "siren/tests"))]


@pytest.mark.slow
def test_metadata(built: tuple[Path, Path]) -> None:
    """Floors and no pins, the documented extras, the console script, and one version everywhere."""
    with zipfile.ZipFile(built[1]) as archive:
        folder = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA")).rpartition("/")[0]
        about: email.message.Message = email.parser.Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
        scripts = archive.read(f"{folder}/entry_points.txt").decode()
        for licence in ("LICENSE", "siren/models/siren-mini/LICENSE"):
            assert f"{folder}/licenses/{licence}" in archive.namelist()
    assert "siren = siren.cli:main" in scripts
    assert about["License-Expression"] == "Apache-2.0 AND GPL-3.0-or-later"
    assert about["Requires-Python"] == ">=3.10"
    requirements = about.get_all("Requires-Dist", [])
    assert not [line for line in requirements if re.search(r"==[^']|<|~=", line.partition(";")[0])]
    base = {re.split(r"[<>=;\s]", line)[0] for line in requirements if "extra ==" not in line}
    assert base == {"torch", "numpy", "safetensors", "soundfile", "soxr", "typer", "tqdm"}
    assert {"text", "dac", "pictures", "triton", "data", "ray", "train", "dev"} <= set(
        about.get_all("Provides-Extra", [])
    )

    import siren

    assert about["Version"] == siren.__version__


@pytest.mark.slow
def test_the_wheel_runs_elsewhere(built: tuple[Path, Path], tmp_path: Path) -> None:
    """Installed into an empty folder, with the source out of sight, it imports and the C++ engine decodes."""
    made = run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "site", built[1])
    assert made.returncode == 0, made.stderr
    script = (
        "import torch, siren, siren.kernels\n"
        "model = siren.Siren(siren.SirenConfig.preset('tiny'))\n"
        "sampler = siren.Sampler(model, backend='cpu', weights='fp32', threads=1)\n"
        "print(sampler.sample(torch.zeros(1, 3, 32), frames=2).codes.shape, siren.__file__)\n"
    )
    (tmp_path / "script.py").write_text(script)
    made = run(sys.executable, tmp_path / "script.py", PYTHONPATH=str(tmp_path / "site"))
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith(f"torch.Size([1, 12, 2]) {tmp_path}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["_cpu", "_emulator"])
def test_the_extensions_link_no_torch(built: tuple[Path, Path], name: str) -> None:
    """Nothing of torch is named in an extension, so no version of torch can break it."""
    with zipfile.ZipFile(built[1]) as archive:
        content = archive.read(next(path for path in archive.namelist() if path.startswith(f"siren/{name}.")))
    assert f"PyInit_{name}".encode() in content
    for word in TORCH:
        assert word not in content


def test_the_cuda_extension_links_neither_torch_nor_a_cuda_runtime() -> None:
    """CUDA's runtime is inside, so the one that torch brings does not matter; errors are CUDA's own words."""
    extension = pytest.importorskip("siren._cuda", reason="nvcc was not there when siren was built")
    content = Path(extension.__file__).read_bytes()
    for word in (*TORCH, b"libcudart.so"):
        assert word not in content
    with pytest.raises(RuntimeError, match=r"CUDA driver|invalid device|no CUDA-capable"):
        extension.properties(999)


def test_building_needs_no_torch() -> None:
    """torch is not among the build requirements, and setup.py does not import it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    requires = re.search(r"\[build-system\].*?requires = (\[.*?\])", text, re.DOTALL)
    assert requires is not None
    assert "torch" not in requires[1]
    assert not re.search(r"(import|from) torch", (ROOT / "setup.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "no-such-compiler"}, "CXX=no-such-compiler was not found"),
        ({"SIREN_CUDA": "1", "CUDA_HOME": "/no/such"}, "SIREN_CUDA=1, but nvcc was not found in bin of CUDA_HOME"),
        ({"SIREN_CUDA": "maybe"}, "SIREN_CUDA must be 0 or 1"),
        ({"SIREN_CUDA_ARCHS": "sm_90"}, "SIREN_CUDA_ARCHS must be like '80,90a,120', not 'sm_90'"),
        ({"SIREN_SANITIZE": "everything"}, "SIREN_SANITIZE must be"),
    ],
)
def test_a_build_that_cannot_be_says_why_in_one_line(tmp_path: Path, environment: dict[str, str], message: str) -> None:
    pytest.importorskip("pybind11")
    assert message in error_of_build(tmp_path, environment)


def test_a_target_that_nvcc_does_not_know(tmp_path: Path) -> None:
    """What was asked for is built or refused, with what could be had; targets of the default list are left out."""
    pytest.importorskip("pybind11")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho compute_80\necho compute_90\n")
    nvcc.chmod(0o755)
    environment = {"CUDA_HOME": str(tmp_path), "SIREN_CUDA_ARCHS": "90a,120"}
    assert "does not know 120 of SIREN_CUDA_ARCHS: it knows 80,90" in error_of_build(tmp_path, environment)


def error_of_build(folder: Path, environment: dict[str, str]) -> str:
    made = run(
        sys.executable, "setup.py", "-q", "build", "--build-base", folder, "--build-lib", folder / "lib", **environment
    )
    assert made.returncode != 0
    lines = [line for line in made.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in made.stderr
    return lines[0]
