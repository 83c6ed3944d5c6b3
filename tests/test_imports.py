"""The layers of the package, checked by reading the sources: imports go down only, and nothing unpickles."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module of siren may import those of earlier lines only; modules on one line do not know each other. A package inside
# siren, such as data, is one name here; between its modules imports only may not go round in a circle.
LAYERS = [
    ["errors"],
    ["shard"],
    ["mel"],
    ["config"],
    ["manifest"],
    ["checkpoint"],
    ["sampling"],
    ["row_operations"],
    ["packed"],
    ["layers"],
    ["inputs"],
    ["expert"],
    ["reference"],
    ["engine"],
    ["device_session"],
    ["triton_weights"],
    ["triton_session"],
    ["triton_engine"],
    ["program_format"],
    ["program_layout"],
    ["program_accesses"],
    ["program_operations"],
    ["program"],
    ["program_check"],
    ["tape"],
    ["program_executor"],
    ["cuda_weights"],
    ["cuda_session"],
    ["cuda_engine"],
    ["weight_updates"],
    ["sampler"],
    ["picture", "pretrained", "conv_blocks"],
    ["descript", "spectral"],
    ["codec", "text", "audio"],
    ["aligner"],
    ["codec_error"],
    ["aisfx"],
    ["rerank", "critic"],
    ["prune"],
    ["results"],
    ["generate"],
    ["model"],
    ["env", "demo", "jsonl"],
    ["data"],
    ["train"],
    ["align"],
    ["evaluate", "studies"],
    ["codec_data", "dac_losses", "dac_discriminator", "dac_model"],
    ["aligner_data"],
    ["spectral_training", "dac_training", "aligner_training", "critic_training"],
    ["cli_data", "cli_train", "cli_align", "cli_critic", "cli_convert", "cli_evaluate", "cli_study"],
    ["cli"],
    ["__init__"],
]
RANK = {name: i for i, names in enumerate(LAYERS) for name in names}
MODULES = sorted((ROOT / "siren").rglob("*.py"))
PACKAGES = sorted(path.parent for path in (ROOT / "siren").glob("*/__init__.py"))
SOURCES = [*MODULES, *sorted((ROOT / "kernels").glob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]


def name_of(path: Path) -> str:
    """siren/data/tokens.py -> "siren.data.tokens"; a package's __init__.py keeps that name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path: Path) -> Iterator[str]:
    """Full name of every module that a file imports, at the top, in a function or for type checking."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = name_of(path).split(".")
            parent = "".join(f"{part}." for part in parents[: len(parents) - node.level]) if node.level else ""
            if node.module:
                yield parent + node.module
            else:
                yield from (parent + alias.name for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down_only(path: Path) -> None:
    """A module imports from the layers below it; one that is not listed gets its place in LAYERS first."""
    own = name_of(path).split(".")[1]
    assert own in RANK, f"give {own} a place in LAYERS"
    inside = path.parent in PACKAGES
    for name in imported(path):
        package, _, rest = name.partition(".")
        module = rest.partition(".")[0]
        if package != "siren" or module in ("kernels", "_cpu", "_cuda", "_emulator", "__version__"):
            continue
        if inside and module == own:
            continue  # the next test's
        assert module in RANK, f"{path.name} imports {name}; name the module, not the package"
        assert RANK[module] < RANK[own], f"{path.name} imports {name}, which is not below it"


@pytest.mark.parametrize("folder", PACKAGES, ids=name_of)
def test_no_import_goes_round_in_a_package(folder: Path) -> None:
    """Of the modules of a package that import one another, some order has each below those that import it."""
    names = {name_of(path): path for path in folder.glob("*.py")}
    waits = {
        name: {found for found in imported(path) if found in names and found != name}
        for name, path in names.items()
        if path.name != "__init__.py"
    }
    while waits:
        ready = [name for name, below in waits.items() if not below & waits.keys()]
        assert ready, f"these import one another: {', '.join(sorted(waits))}"
        for name in ready:
            del waits[name]


def test_kernels_know_nothing_of_siren() -> None:
    """Kernels import torch, triton, one another and the standard library."""
    for path in (ROOT / "kernels").glob("*.py"):
        packages = {name.partition(".")[0] for name in imported(path)} - sys.stdlib_module_names
        assert packages <= {"torch", "triton", "kernels"}, (path.name, packages)


def test_native_code_knows_no_torch() -> None:
    """No file of csrc includes a torch header, and cpu and cuda do not include each other."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert sources
    for path in sources:
        for header in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(encoding="utf-8"), re.MULTILINE):
            assert not re.match(r"(torch|ATen|c10|caffe2)/", header), (path.name, header)
            for own, other in (("cpu", "cuda"), ("cuda", "cpu")):
                if own in path.relative_to(ROOT / "csrc").parts:
                    assert other not in Path(header).parts, (path.name, header)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_nothing_unpickles(path: Path) -> None:
    """No pickle, no eval or exec, and torch.load and numpy.load only in the modes that cannot run code."""
    unsafe = {"cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    assert not unsafe & {name.partition(".")[0] for name in imported(path)}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.module != "pickle", f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            assert node.attr == "UnpicklingError", f"{path.name}:{node.lineno}"  # what torch.load raises
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        where = f"{path.name}:{node.lineno}: {called}"
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert called not in ("eval", "exec", "__import__"), where
        assert called not in ("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"), where
        assert called != "torch.load" or options.get("weights_only") == "True", where
        assert called not in ("np.load", "numpy.load") or options.get("allow_pickle", "False") == "False", where
