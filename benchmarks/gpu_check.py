"""Everything that can be said on a machine with a GPU, by one command: `make gpu-check`.

    python benchmarks/gpu_check.py [--out FILE] [--budget 520]
    python benchmarks/gpu_check.py --sanitize STEM           compute-sanitizer on one kernel's gates, small sizes
    python benchmarks/gpu_check.py --device cpu --small      Triton's interpreter: the harness itself, nothing timed

In this order, each within its share of the time that is left: build the package under build/gpu, with the CUDA engine
for this GPU; csrc/cuda/microbench.cu, what the GPU gives; a tiny model on the CUDA engine, alone and then under
compute-sanitizer, while each operation of that engine is compared with PyTorch and the tests of both GPU engines run;
every Triton kernel's gate; the decode benchmark; the CUDA engine's timeline; every Triton kernel's times; the training
step with and without the kernels, its gradients against float64 first; the decode benchmark's compiled arm, which takes
minutes to compile.
Each step runs in processes of its own, as a kernel that is wrong can hang or break a process, and is ended with all of
them when its time is up. One JSON file holds all results and is written as they come. compute-sanitizer is too slow for
the Triton kernels in that run: with --sanitize memcheck and then racecheck have all of the time, after the build.
Nothing is installed and the GPU's settings stay as they are. What was not done in time is red. Exit code 1 if anything
is red, 2 if torch sees no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.append(str(Path(__file__).parent / "kernels"))

import json_file
from case import STEMS

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
LIBRARY = ROOT / "build" / "gpu" / "lib"
# tests/test_<name>.py of what runs on a GPU, and of what is built for it.
TESTS = ["cuda_engine", "cuda_compile", *STEMS, "gumbel_noise", "checks", "triton_engine"]
DECODE_ARMS = "naive-bf16,graph-bf16,triton-bf16,triton-int8"
CUDA_ARMS = "cuda-bf16,cuda-int8"
COMPILE_ARMS = "compile-bf16,graph-bf16"
TRAIN_ARMS = "naive,siren-plain,siren"
SANITIZED = ("memcheck", "racecheck")
OPERATIONS = (
    "--weights bf16 --batch 2",
    "--weights int8 --batch 16 --guided",
    "--weights fp8 --batch 3",
    "--weights bf16 --batch 1 --preset siren-1.6b --blocks 1",
    "--weights int8 --batch 16 --preset siren-1.6b --blocks 1",
)
TINY_SANITIZED = ("memcheck", "racecheck", "synccheck")
TOOLKIT = Path("/usr/local/cuda/bin")  # where nvcc and compute-sanitizer are looked for after PATH
POLL_SECONDS = 2.0
SUMMARY = 160  # characters of a red line at the end
FIND_SECONDS = 120
KILL_SECONDS = 5.0  # a process that is stuck in the driver may not end even when it is killed
EMULATORS = ("SIREN_CUDA_EMULATE", "SIREN_CUDA_EMULATE_SMS", "SIREN_CUDA_EMULATE_SEED", "TRITON_INTERPRET")


class Check:
    """The results so far, the time that is left, and the commands that are run."""

    def __init__(self, out: Path, budget: float, folder: Path, stems: Sequence[str] = STEMS) -> None:
        self.out, self.folder, self.stems, self.stop = out, folder, stems, time.monotonic() + budget
        self.lock = threading.Lock()  # tests and gates run a few at once
        self.cuda = False  # whether the CUDA engine ran
        self.result: dict[str, Any] = {"about": {}, "seconds": {}, "parts": {}, "red": []}

    def put(self, part: str, name: str, value: Any) -> None:
        """A result, and all results into the file."""
        with self.lock:
            self.result["parts"].setdefault(part, {})[name] = value
            self.save()

    def save(self) -> None:
        json_file.write(self.out, self.result)

    def red(self, line: str) -> None:
        self.result["red"].append(line)
        print(f"RED: {line}", flush=True)

    def run(
        self, name: str, words: list[object], limit: float, heard: Callable[[], object] = lambda: None
    ) -> tuple[int | None, str]:
        """Run a program in environment(), for `limit` seconds and no longer than all may take: its exit code (None: out
        of time) and what it printed. heard() is called while it runs, to pick up what it has written.
        """
        log = self.folder / f"{name}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [str(word) for word in words],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=self.folder,  # in the checkout, `python -m` would find a siren without kernels
                env=environment(),
                start_new_session=True,  # so that its own processes end with it
            )
            stop = time.monotonic() + limit
            try:
                while process.poll() is None and (left := min(stop, self.stop) - time.monotonic()) > 0:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=min(POLL_SECONDS, left))
                    heard()
            finally:
                late = process.poll() is None
                with contextlib.suppress(ProcessLookupError):  # none is left
                    os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=KILL_SECONDS)
        heard()
        return None if late else process.returncode, log.read_text(errors="replace")


def environment() -> dict[str, str]:
    """This process's, with the package that is built here before any other, and without what would run a kernel on the
    CPU: its results would stand under the GPU's name."""
    path = os.pathsep.join(part for part in (str(LIBRARY), os.environ.get("PYTHONPATH")) if part)
    return {**{name: value for name, value in os.environ.items() if name not in EMULATORS}, "PYTHONPATH": path}


def build(check: Check, limit: float) -> None:
    """The package with its extensions, which the benchmarks import too; an older build would leave its files. Where the
    CUDA engine does not build, the rest of it does."""
    stop = time.monotonic() + limit
    shutil.rmtree(LIBRARY, ignore_errors=True)
    words = [sys.executable, ROOT / "setup.py", "-q", "build", "--build-base", LIBRARY.parent, "--build-lib", LIBRARY]
    for cuda in ("1", "0"):
        left = max(1.0, stop - time.monotonic())
        code, output = check.run(
            f"build-{cuda}", ["env", "-C", ROOT, f"SIREN_CUDA={cuda}", *words], 0.8 * left if cuda == "1" else left
        )
        check.result["parts"]["build"] = {"exit": code, "cuda": cuda == "1"}
        if code == 0:
            return
        check.red(f"build with SIREN_CUDA={cuda}: {_end(code, output)}")
        print(output[-4000:], flush=True)


def microbench(check: Check, limit: float) -> None:
    """What the GPU gives: csrc/cuda/microbench.cu, compiled for it."""
    stop = time.monotonic() + limit
    program, arch = check.folder / "microbench", os.environ.get("SIREN_CUDA_ARCHS", "")
    words: list[object] = ["nvcc", "-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", program]
    code, output = check.run("microbench-build", [*words, ROOT / "csrc" / "cuda" / "microbench.cu"], limit)
    if code == 0:
        code, output = check.run("microbench", [program], max(1.0, stop - time.monotonic()))
    try:
        found = json.loads(output)
    except ValueError:
        found = {"end": output[-4000:]}
    check.result["parts"]["microbench"] = {"exit": code, **found}
    for name in ("stream", "reread", "exchange"):
        for row in found.get(name, []):
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
    if code != 0 or "end" in found:
        faults = [
            row["fault"] for name in ("stream", "reread", "exchange") for row in found.get(name, []) if "fault" in row
        ]
        check.red(f"microbench: {'; '.join(faults) or _end(code, output)}")


def tiny(check: Check, limit: float) -> None:
    """A tiny model on the CUDA engine. Where that fails, what takes longer or runs beside others leaves it out."""
    code, output = check.run("tiny", [sys.executable, BENCHMARKS / "cuda_tiny.py"], limit)
    check.cuda = code == 0
    check.put("cuda", "tiny", {"exit": code, "end": output[-4000:]})
    print(output[-2000:], flush=True)
    if code != 0:
        check.red(f"cuda_tiny.py: {_end(code, output)}; sanitizers, decode and timeline are without the CUDA engine")


def operations(check: Check, limit: float) -> None:
    """Every operation of the CUDA engine against the executor, also where the tiny model failed: it says where."""
    if not check.result["parts"].get("build", {}).get("cuda"):
        return

    def one(options: str) -> None:
        name = f"operations{options.replace(' ', '')}"
        path = check.folder / f"{name}.json"
        words = ["env", "OMP_NUM_THREADS=2", sys.executable, BENCHMARKS / "cuda_operations.py", *options.split()]
        code, output = check.run(name, [*words, "--out", path], limit)
        check.put("operations", options, {"exit": code, **(json_file.read(path) or {"end": output[-4000:]})})
        print(output[-1000:], flush=True)
        if code != 0:
            check.red(f"cuda_operations.py {options}: {_end(code, output)}")

    with ThreadPoolExecutor(len(OPERATIONS)) as pool:
        list(pool.map(one, OPERATIONS))


def untimed(check: Check, limit: float) -> None:
    """What checks and is not timed, sharing the GPU."""
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda step: step(check, limit), (tests, sanitize_tiny, operations)))


def tests(check: Check, limit: float) -> None:
    """Every test file in a process of its own, a few at once: compiling takes most of the time. A file that is not
    done in time has no counts."""
    stop = time.monotonic() + limit
    words: list[object] = ["env", "TORCHINDUCTOR_COMPILE_THREADS=2", sys.executable, "-m", "pytest", "-v"]
    words += ["-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml"]
    if importlib.util.find_spec("xdist"):
        words += ["-n", "2", "--dist", "worksteal"]

    def one(name: str) -> None:
        path, report = ROOT / "tests" / f"test_{name}.py", check.folder / f"test-{name}.xml"
        left = max(1.0, stop - time.monotonic())
        code, output = check.run(f"test-{name}", [*words, f"--junitxml={report}", path], left)
        row = {"exit": code, **counts(report), "end": output[-4000:] if code != 0 else ""}
        check.put("tests", name, row)
        print(f"test_{name}.py: {row['passed']} passed, {len(row['failed'])} failed, {row['skipped']} skipped")
        if code != 0 or not row["passed"]:
            check.red(f"test_{name}.py: {_end(code, output)}")

    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2))) as pool:
        list(pool.map(one, TESTS))


def counts(report: Path) -> dict[str, Any]:
    """Of a file that pytest --junitxml writes when it ends; nothing where there is none."""
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []  # noqa: S314, our own
    results = [(case.get("name"), {found.tag for found in case}) for case in cases]
    failed = [name for name, tags in results if tags & {"failure", "error"}]
    skipped = sum("skipped" in tags for _, tags in results)
    return {"passed": len(results) - len(failed) - skipped, "failed": failed, "skipped": skipped}


def kernels(check: Check, limit: float, part: str, options: list[str], at_once: int = 1) -> None:
    """kernel_times.py for every kernel. One after another each has its share of the time left, else all of it."""
    stop = time.monotonic() + limit
    waiting = list(check.stems)

    def one(stem: str) -> None:
        share = (stop - time.monotonic()) / (len(waiting) if at_once == 1 else 1)
        waiting.remove(stem)
        path = check.folder / f"{part}-{stem}.json"

        check.put(part, stem, {"rows": []})

        def heard() -> None:
            if (found := json_file.read(path)) is not None:
                check.put(part, stem, found)

        words = [sys.executable, BENCHMARKS / "kernel_times.py", "--stem", stem, "--json", path, *options]
        code, output = check.run(f"{part}-{stem}", [*words, "--budget", max(1, 0.7 * share)], max(5.0, share), heard)
        found = check.result["parts"][part][stem]
        print("\n".join(line for line in output.splitlines() if line.startswith("| ")), flush=True)
        for line in found.get("not_run", []):
            check.red(f"{part}: no time for {line}")
        if code != 0 or not found["rows"]:
            check.red(f"{part}, {stem}: {_end(code, output)}")

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, check.stems))


def decode(check: Check, limit: float) -> None:
    """The decode benchmark at 1.6B. The persistent arm can hang, so only after its own gate was green, and the CUDA
    engine's only after the tiny model; should they have broken the process before it timed anything, it runs again
    without them."""
    stop = time.monotonic() + limit
    gates = check.result["parts"].get("gates", {}).get("residual_frame", {"rows": []})
    names = DECODE_ARMS
    if gates["rows"] and not gates.get("not_run") and all(row["gate"] == "green" for row in gates["rows"]):
        names += ",persistent-bf16"
    else:
        check.red("decode: without the persistent arm, as the gate of residual_frame is not green")
    with_cuda = f"{names},{CUDA_ARMS}" if check.cuda else names
    decode_of(check, limit, "decode", with_cuda, "1,8,16", "--rounds", "3")
    if with_cuda != names and not check.result["parts"]["decode"]["rows"]:
        check.put("cuda", "decode", check.result["parts"]["decode"])
        decode_of(check, max(1.0, stop - time.monotonic()), "decode", names, "1,8,16", "--rounds", "3")


def timeline(check: Check, limit: float) -> None:
    """Which SM of the CUDA engine does what when, at 1.6B; the picture is beside the results."""
    if not check.cuda:
        return
    path = check.folder / "timeline.json"
    picture = check.out.with_name(f"{check.out.stem}-timeline.png")
    words = [sys.executable, BENCHMARKS / "cuda_timeline.py", "--batch", "1,16", "--out", path, "--picture", picture]
    code, output = check.run("timeline", words, limit)
    check.result["parts"]["timeline"] = json_file.read(path) or {"end": output[-4000:]}
    print(output[-6000:], flush=True)
    if code != 0:
        check.red(f"timeline: {_end(code, output)}")


def decode_of(check: Check, limit: float, part: str, names: str, batches: str, *options: str) -> None:
    words = ["--device", "cuda", "--batch", batches, "--arms", names, *options]
    rows_of(check, limit, part, [BENCHMARKS / "decode.py", *words])


def training(check: Check, limit: float) -> None:
    """One expert of 1.6B in bfloat16: losses and gradients of every arm against float64, and then their steps."""
    words = ["--device", "cuda", "--arms", TRAIN_ARMS, "--rounds", "3", "--no-memory"]
    rows_of(check, limit, "train", [BENCHMARKS / "train.py", *words])


def rows_of(check: Check, limit: float, part: str, words: Sequence[object]) -> None:
    """A benchmark that writes rows to --out as it comes by them; none is red."""
    path = check.folder / f"{part}.json"
    check.result["parts"][part] = {"rows": []}

    def heard() -> None:
        if (found := json_file.read(path)) is not None:
            check.result["parts"][part] = found
            check.save()

    code, output = check.run(part, [sys.executable, *words, "--out", path], limit, heard)
    print(output[-6000:], flush=True)
    if code != 0 or not check.result["parts"][part]["rows"]:
        check.red(f"{part}: {_end(code, output)}")


def sanitize(check: Check, limit: float, stem: str) -> None:
    """A kernel's gates at small sizes under one tool of compute-sanitizer after another."""
    stop = time.monotonic() + limit
    for kind in SANITIZED:
        left = max(1.0, stop - time.monotonic())
        words = [BENCHMARKS / "kernel_times.py", "--small", "--gates", "--stem", stem]
        sanitized(check, kind, stem, [*words, "--budget", left], left)  # killed before it would leave a case out


def sanitize_tiny(check: Check, limit: float) -> None:
    """The tiny model on the CUDA engine under the tools of compute-sanitizer, all at once."""
    if not check.cuda:
        return
    with ThreadPoolExecutor(len(TINY_SANITIZED)) as pool:
        words = [BENCHMARKS / "cuda_tiny.py", "--short"]
        list(pool.map(lambda kind: sanitized(check, kind, "cuda_tiny", words, limit), TINY_SANITIZED))


def sanitized(check: Check, kind: str, name: str, words: list[object], limit: float) -> None:
    """A Python program under a tool of compute-sanitizer, without PyTorch's memory pool, which hides overruns."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        check.red(f"{kind}, {name}: compute-sanitizer is not on PATH")
        return
    command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--tool", kind, "--error-exitcode", "9", sys.executable]
    code, output = check.run(f"{kind}-{name}", [*command, *words], limit)
    check.put("sanitizers", f"{kind} {name}", {"exit": code, "end": output[-4000:] if code != 0 else ""})
    print(f"{kind} {name}: {'clean' if code == 0 else _end(code, output)}", flush=True)
    if code != 0:
        check.red(f"{kind}, {name}: {_end(code, output)}")


def _end(code: int | None, output: str) -> str:
    """How a command ended, in one line: the last line that names an error, or the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    line = next((line for line in reversed(lines) if "rror" in line), lines[-1])[:300]
    return f"{'not done in time' if code is None else f'exit code {code}'}: {line}"


def describe(check: Check, device: str) -> None:
    """The machine, as benchmarks/machine.py describes it."""
    found = {"device": "cpu, Triton's interpreter: nothing is timed"}
    if device == "cuda":
        code, output = check.run("machine", [sys.executable, BENCHMARKS / "machine.py"], 30)
        if code != 0:
            check.red(f"machine.py: {_end(code, output)}")
        found = json.loads(output.splitlines()[-1]) if code == 0 else {"error": _end(code, output)}
    check.result["about"] = found
    print("\n".join(f"{key}: {value}" for key, value in found.items()), flush=True)


def find_gpu() -> tuple[str, str]:
    """The GPU that torch sees, and the architecture that nvcc compiles for it, such as "90a". Ends the program, with
    one line, where there is none."""
    script = (
        "import torch as t; c = t.cuda; has = c.is_available(); "
        "print(t.__version__, c.get_device_name() if has else '', *(c.get_device_capability() if has else ()), sep='|')"
    )
    try:
        made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=FIND_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"error: torch did not say within {FIND_SECONDS} s whether it sees a GPU", file=sys.stderr)
        raise SystemExit(2) from None
    version, name, *capability = [*made.stdout.strip().split("|"), ""][:4]
    if not name:
        found = (
            f"torch {version} of {sys.executable} sees no CUDA device" if version else f"{sys.executable} has no torch"
        )
        print(f"error: {found}: set PYTHON to one that has a GPU", file=sys.stderr)
        raise SystemExit(2)
    arch = "".join(capability)
    return name, "90a" if arch == "90" else arch


def main() -> None:
    parser = argparse.ArgumentParser(description="Test, gate and time the GPU kernels on this machine.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: Triton's interpreter")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--stem", nargs="+", default=STEMS, choices=STEMS, help="kernels to check and time; all")
    parser.add_argument("--sanitize", metavar="STEM", choices=STEMS, help="this kernel under compute-sanitizer, alone")
    parser.add_argument("--budget", type=float, default=520.0, help="seconds for everything")
    parser.add_argument(
        "--out", type=Path, help="JSON file to write; benchmarks/results/gpu-<name>.json or ...-sanitize-<stem>.json"
    )
    options = parser.parse_args()
    begin = time.monotonic()
    if options.device == "cpu" and not options.small:
        parser.error("Triton's interpreter is slow: --device cpu needs --small")
    if options.device == "cpu" and options.sanitize:
        parser.error("compute-sanitizer is for a GPU: --sanitize excludes --device cpu")
    name = "interpreter"
    if options.device == "cuda":
        name, arch = find_gpu()
        os.environ["SIREN_CUDA_ARCHS"] = arch  # of what is built here, and so of what the tests expect in it
        os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), str(TOOLKIT)))
    sizes = ["--device", options.device, *(["--small"] if options.small else [])]
    steps: list[tuple[str, float, Callable[[Check, float], None]]] = [  # with a weight for its share of the time
        ("build", 12, build),
        ("microbench", 3, microbench),
        ("tiny", 4, tiny),
        ("tests", 10, untimed),
        ("gates", 3, lambda check, limit: kernels(check, limit, "gates", [*sizes, "--gates"], at_once=len(STEMS))),
        ("decode", 11, decode),
        ("timeline", 3, timeline),
        ("times", 3, lambda check, limit: kernels(check, limit, "times", sizes)),
        ("train", 5, training),
        ("decode-compile", 3, lambda check, limit: decode_of(check, limit, "decode-compile", COMPILE_ARMS, "1")),
    ]
    if options.sanitize:
        steps = [("build", 1, build), ("sanitize", 4, lambda check, limit: sanitize(check, limit, options.sanitize))]
    if options.device == "cpu":
        steps = [("gates and arms", 1, lambda check, limit: kernels(check, limit, "gates and arms", sizes))]
    words = [*name.lower().split(), *(["sanitize", options.sanitize] if options.sanitize else [])]
    out = options.out or BENCHMARKS / "results" / f"gpu-{'-'.join(words)}.json"
    with tempfile.TemporaryDirectory(prefix="siren-gpu-check-") as folder:
        left = options.budget - (time.monotonic() - begin)
        check = Check(out.resolve(), left, Path(folder), options.stem)

        def end(number: int, _: object) -> None:
            check.stop = 0.0  # so that what other threads run is ended too
            sys.exit(128 + number)

        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        for i, (title, weight, step) in enumerate(steps):
            start = time.monotonic()
            limit = max(1.0, (check.stop - start) * weight / sum(left for _, left, _ in steps[i:]))
            print(f"\n== {title}: at most {limit:.0f} s", flush=True)
            try:
                step(check, limit)
            except Exception as error:
                check.red(f"{title}: {type(error).__name__}: {error}")
            if not check.result["about"]:
                describe(check, options.device)
            check.result["seconds"][title] = round(time.monotonic() - start, 1)
            check.save()
    red = check.result["red"]
    print(f"\nwrote {check.out}")
    print("\n".join([f"{len(red)} red", *(f"RED: {line[:SUMMARY]}" for line in red)]) if red else "everything is green")
    if options.device == "cpu":
        print("Triton's interpreter on the CPU: nothing was timed, nothing ran on a GPU")
    raise SystemExit(1 if red else 0)


if __name__ == "__main__":
    main()
