"""Checkpoints: what is saved is what is read, damage never loads silently, and a killed save loses nothing."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from siren.checkpoint import expected_shapes, iter_tensors, read_manifest, save_checkpoint
from siren.config import CONDITIONINGS, DECODER_STARTS, SirenConfig
from siren.errors import CheckpointError, ConfigError, InputError, SirenError

GOLDEN = Path(__file__).parent / "data" / "official-tiny"
SMALL = SirenConfig(
    dim=12, n_heads=2, n_kv_heads=1, spatial_layers=1, factorized_layers=1, prompt_dim=5,
    num_codebooks=4, num_experts=2, codebook_size=9, dac_code_dim=3, dac_feature_dim=7, ffn_multiple_of=8,
)  # fmt: skip


def states(config: SirenConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[int, dict]:
    generator = torch.Generator().manual_seed(seed)
    return {
        start: {name: torch.randn(s, generator=generator).to(dtype) for name, s in expected_shapes(config).items()}
        for start in range(0, config.num_codebooks, config.codes_per_expert)
    }


def load(folder: Path) -> tuple[SirenConfig, dict[int, dict]]:
    manifest = read_manifest(folder)
    return manifest.config, {e.start_codebook: dict(iter_tensors(e, manifest.config)) for e in manifest.experts}


def equal(a: dict[int, dict], b: dict[int, dict]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].keys() == b[k].keys() and all(torch.equal(a[k][n], b[k][n]) for n in a[k]) for k in a
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model", SMALL, states(SMALL).items())
    return tmp_path / "model"


def edit(folder: Path, change) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@st.composite
def configs(draw) -> SirenConfig:
    heads, experts = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
    layers = draw(st.integers(0, 2))
    return SirenConfig(
        dim=heads * draw(st.integers(1, 5)), n_heads=heads, n_kv_heads=draw(st.sampled_from([1, heads])),
        spatial_layers=draw(st.integers(1, 2)), factorized_layers=layers, prompt_dim=draw(st.integers(1, 5)),
        num_experts=experts, codebook_size=draw(st.integers(1, 9)), dac_code_dim=draw(st.integers(1, 3)),
        dac_feature_dim=draw(st.integers(1, 5)), ffn_multiple_of=draw(st.integers(1, 8)),
        ffn_multiplier=draw(st.sampled_from([None, 0.5, 2])),
        conditioning=draw(st.sampled_from(CONDITIONINGS)) if layers else "none",
        decoder_start=draw(st.sampled_from(DECODER_STARTS)),
    )  # fmt: skip


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs(), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
def test_round_trip(tmp_path: Path, config: SirenConfig, dtype: torch.dtype) -> None:
    """Any model the config allows, in any float type, reads back bit for bit; the second save replaces the first."""
    expected = states(config, dtype=dtype)
    save_checkpoint(tmp_path / "model", config, expected.items())
    assert load(tmp_path / "model")[0] == config
    assert equal(load(tmp_path / "model")[1], expected)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_official_checkpoint(tmp_path: Path) -> None:
    """The official files are read, fit the expected names and shapes, and are written again byte for byte."""
    config, experts = load(GOLDEN)
    assert config == SirenConfig.preset("tiny")
    save_checkpoint(tmp_path / "copy", config, experts.items())
    for name in ["config.json", *(f"expert_{i}.safetensors" for i in range(0, 12, 2))]:
        assert (tmp_path / "copy" / name).read_bytes() == (GOLDEN / name).read_bytes()
    assert read_manifest(GOLDEN / "manifest.json") == read_manifest(GOLDEN)


def test_tensors_are_private_and_in_file_order(saved: Path) -> None:
    """A yielded tensor shares no memory with the file, and strided or shared inputs are saved as their values."""
    entry = read_manifest(saved).experts[0]
    names = []
    for name, tensor in iter_tensors(entry):
        names.append(name)
        tensor.zero_()
    header = json.loads(entry.path.read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert names == sorted(header, key=lambda name: header[name]["data_offsets"])
    shared = torch.randn(36, 12)
    values = states(SMALL)
    for state in values.values():
        state["spatial_blocks.0.self_attention.qkv.weight"] = torch.randn(12, 24).T
        state["spatial_blocks.0.self_attention.output.weight"] = shared[:12]
        state["spatial_blocks.0.cross_attention.query.weight"] = torch.nn.Parameter(shared[:12])
    save_checkpoint(saved, SMALL, values.items())
    assert equal(load(saved)[1], values)


def test_codec_and_prompt_encoder(tmp_path: Path) -> None:
    """A codec folder travels with the checkpoint, also when it is saved over itself; encoders by name or by folder."""
    source = tmp_path / "dac"
    source.mkdir()
    (source / "weights.bin").write_bytes(b"123")
    source.chmod(0o555)
    target = tmp_path / "model"
    save_checkpoint(target, SMALL, states(SMALL).items(), codec_folder=source, prompt_encoder="hub/name-1.0")
    for encoder, expected in ((source, str(target / "prompt_encoder")), ("minilm", "minilm")):
        save_checkpoint(target, SMALL, states(SMALL).items(), target / "codec", encoder)
        manifest = read_manifest(target)
        assert manifest.codec == target / "codec"
        assert (target / "codec" / "weights.bin").read_bytes() == b"123"
        assert manifest.prompt_encoder == expected


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", 2, "format_version must be 1"),
        ("format_version", True, "format_version must be 1"),
        ("config", None, "config must be a relative path"),
        ("config", "../model/config.json", "inside the folder"),
        ("config", "other.json", "missing"),
        ("config", "\ud800.json", "missing"),
        ("config", "a\0.json", "missing"),
        ("config", "x" * 5000 + ".json", "missing"),
        ("config_sha256", "0" * 64, "config.json was altered"),
        ("codec", "/etc", "inside the folder"),
        ("codec", "config.json", "not a folder"),
        ("prompt_encoder", "../../home", "a name or a relative folder"),
        ("prompt_encoder", "https://host/x", "a name or a relative folder"),
        ("prompt_encoder", "x" * 5000, "a name or a relative folder"),
        ("experts", {}, "experts must be a list"),
        ("experts", [], r"no entry for start_codebook \[0, 2\]"),
        ("experts", [1], r"experts\[0\] must be an object"),
    ],
)
def test_bad_manifest_fields(saved: Path, field: str, value: object, message: str) -> None:
    """A wrong field is refused in one line that names it."""
    edit(saved, lambda values: values.update({field: value}))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_manifest(saved)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert field in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("start_codebook", 1, r"experts\[1\].start_codebook must be one of \[0, 2\]"),
        ("start_codebook", False, "must be one of"),
        ("start_codebook", 10**400, "must be one of"),
        ("start_codebook", 0, "appears twice"),
        ("sha256", None, "64 hexadecimal"),
        ("sha256", "g" * 64, "64 hexadecimal"),
        ("sha256", "0" * 64 + "\n", "64 hexadecimal"),
        ("weights", "/etc/passwd.safetensors", "inside the folder"),
        ("weights", "file://x.safetensors", "inside the folder"),
        ("weights", "a/../expert_0.safetensors", "inside the folder"),
        ("weights", "C:\\x.safetensors", "inside the folder"),
        ("weights", "config.json", "relative .safetensors path"),
        ("weights", "outside.safetensors", "leaves the folder"),
        ("weights", "loop.safetensors", "missing or unreadable"),
        ("weights", "dir.safetensors", "not a file"),
    ],
)
def test_bad_experts(saved: Path, field: str, value: object, message: str) -> None:
    """Expert entries cover the config exactly, carry a hash, and stay in the folder, through links too."""
    shutil.copy(saved / "expert_0.safetensors", saved.parent / "outside.safetensors")
    (saved / "outside.safetensors").symlink_to("../outside.safetensors")
    (saved / "loop.safetensors").symlink_to("loop.safetensors")
    (saved / "dir.safetensors").mkdir()
    edit(saved, lambda values: values["experts"][1].update({field: value}))
    with pytest.raises(CheckpointError, match=message):
        read_manifest(saved)


@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
@pytest.mark.parametrize(
    "text", [DEEP, "{" * 5, "[]", "", "\xff", " " * (5 << 20) + "{}", '{"a": ' + "9" * 10_000 + "}"]
)
def test_bad_json(saved: Path, name: str, text: str) -> None:
    """JSON that is deep, broken, huge or no object is an error, never a crash."""
    edit(saved, lambda values: values.pop("config_sha256"))
    (saved / name).write_bytes(text.encode("latin1"))
    with pytest.raises((CheckpointError, ConfigError), match=name):
        read_manifest(saved)


@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
def test_json_that_is_only_just_too_deep(saved: Path, name: str) -> None:
    """A value that can be parsed but not compared or shown is refused as well."""
    edit(saved, lambda values: values.pop("config_sha256"))
    for depth in range(850, 1000, 3):
        field = "conditioning" if name == "config.json" else "config"
        (saved / name).write_text(f'{{"format_version": 1, "{field}": {"[" * depth}{"]" * depth}}}')
        with pytest.raises((CheckpointError, ConfigError)):
            read_manifest(saved)


def test_missing_files(saved: Path) -> None:
    """A missing folder, manifest or weights file is named; so is a pipe in place of the manifest, without hanging."""
    entry = read_manifest(saved).experts[1]
    entry.path.unlink()
    with pytest.raises(CheckpointError, match=r"expert_2.safetensors.* is missing"):
        list(iter_tensors(entry))
    with pytest.raises(CheckpointError, match=r"weights: 'expert_2.safetensors' is missing"):
        read_manifest(saved)
    (saved / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*manifest.json: No such file"):
        read_manifest(saved)
    os.mkfifo(saved / "manifest.json")
    with pytest.raises(CheckpointError, match="not a file"):
        read_manifest(saved)
    for folder in (saved / "nothing", "\0", "x" * 5000, "~no-such-user/x"):
        with pytest.raises(CheckpointError):
            read_manifest(folder)


def rehash(folder: Path, name: str) -> None:
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    edit(folder, lambda values: [e.update(sha256=digest) for e in values["experts"] if e["weights"] == name])


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("sos", None, "lacks sos"),
        ("extra", torch.zeros(1), "has unknown extra"),
        ("sos", torch.zeros(1, 2, 12), r"sos has shape \[1, 2, 12\], its config.json asks \[1, 1, 12\]"),
        ("sos", torch.zeros(1, 1, 12, dtype=torch.int32), "sos has type 'I32'"),
        ("sos", torch.full((1, 1, 12), float("nan"), dtype=torch.bfloat16), "sos holds NaN"),
        ("heads.1.weight", torch.full((9, 12), float("-inf")), "holds NaN or infinity"),
    ],
)
def test_tensors_must_fit_the_config(saved: Path, name: str, tensor: torch.Tensor | None, message: str) -> None:
    """With a correct hash, wrong names, shapes, types and values are still refused; saving refuses them too."""
    path = saved / "expert_2.safetensors"
    state = load_file(path)
    state.pop(name, None)
    if tensor is not None:
        state[name] = tensor
    path.unlink()  # the loaded tensors may still map the old file
    save_file(state, path)
    rehash(saved, path.name)
    with pytest.raises(CheckpointError, match=message):
        load(saved)
    with pytest.raises(SirenError, match=message.replace("'I32'", "torch.int32").replace(r"\[", ".*")[:12]):
        save_checkpoint(saved.parent / "new", SMALL, [(0, states(SMALL)[0]), (2, state)])
    assert not (saved.parent / "new").exists()


def test_altered_experts_never_load(saved: Path) -> None:
    """Flipped bits, other bytes, truncation and added bytes always end in a CheckpointError."""
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    path = saved / "expert_2.safetensors"
    good = path.read_bytes()
    header = int.from_bytes(good[:8], "little") + 8
    for i in range(240):
        data = bytearray(good)
        if i % 4 == 0:
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        elif i % 4 == 1:
            data[rng.integers(header)] ^= int(rng.integers(1, 256))
        elif i % 4 == 2:
            del data[rng.integers(len(data)) :]
        else:
            data += rng.bytes(int(rng.integers(1, 9)))
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="expert_2"):
            load(saved)


def test_altered_json_never_loads_another_model(saved: Path) -> None:
    """Every flip or truncation of a JSON file is refused, or harmless: same config and same tensors."""
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    expected = states(SMALL)
    for name in ("manifest.json", "config.json"):
        good = (saved / name).read_bytes()
        for i in range(200):
            data = bytearray(good)
            if i % 2:
                data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
            else:
                del data[rng.integers(len(data) - 1) :]
            (saved / name).write_bytes(data)
            try:
                config, experts = load(saved)
            except (CheckpointError, ConfigError):
                continue
            # Damage to the key "config_sha256" itself switches that check off; the config is intact then.
            assert config == SMALL, bytes(data)
            assert equal(experts, expected), bytes(data)
        (saved / name).write_bytes(good)


def test_file_swapped_while_reading(saved: Path) -> None:
    """The hash covers the bytes handed out, not the file as it was a moment earlier."""
    entry = read_manifest(saved).experts[0]
    tensors = iter_tensors(entry, SMALL)
    next(tensors)
    shutil.copy(saved / "expert_2.safetensors", saved / "swap")
    (saved / "swap").replace(entry.path)
    with pytest.raises(CheckpointError, match="sha256"):
        list(tensors)


def test_reading_holds_one_tensor(tmp_path: Path) -> None:
    """Peak resident memory while reading an expert grows by far less than the file, mapped pages included."""
    script = """
import sys, torch
from pathlib import Path
from siren.checkpoint import ExpertEntry, iter_tensors
from safetensors.torch import save_file
import hashlib
path = Path(sys.argv[1])
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) >> 10
if sys.argv[2] == "write":
    save_file({f"t{i}": torch.ones(1 << 20) for i in range(40)}, path)
    print(hashlib.sha256(path.read_bytes()).hexdigest())
else:
    before = peak()
    count = sum(t.numel() for _, t in iter_tensors(ExpertEntry(0, path, sys.argv[2])))
    print(count >> 18, peak() - before)
"""

    def run(*arguments: str) -> list[str]:
        command = [sys.executable, "-c", script, str(tmp_path / "big.safetensors"), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    megabytes, growth = run(*run("write"))
    assert megabytes == "160"
    assert int(growth) < 80, f"{growth} MiB for a file of {megabytes} MiB"


def test_saving_refuses_what_it_must_not_replace(saved: Path) -> None:
    """Folders with other content, checkpoints with extra files, files, and incomplete experts are refused untouched."""
    values = states(SMALL)
    home = saved.parent / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("text")
    for target, message in ((home, "not a checkpoint"), (home / "thesis.txt", "not a checkpoint")):
        with pytest.raises(CheckpointError, match=message):
            save_checkpoint(target, SMALL, values.items())
    (saved / "notes.txt").write_text("text")
    with pytest.raises(CheckpointError, match=r"also holds 'notes.txt'"):
        save_checkpoint(saved, SMALL, values.items())
    (saved / "notes.txt").unlink()
    for experts in ([], [(0, values[0])], [(0, values[0]), (0, values[0])], [(0, values[0]), (1, values[2])]):
        with pytest.raises(InputError, match="each start_codebook"):
            save_checkpoint(saved, SMALL, experts)
    with pytest.raises(CheckpointError, match="could not save"):
        save_checkpoint(saved, SMALL, values.items(), codec_folder=saved / "nothing")
    with pytest.raises(CheckpointError, match="prompt_encoder must be a name"):
        save_checkpoint(saved, SMALL, values.items(), prompt_encoder="../x")
    with pytest.raises(CheckpointError, match="could not save"):
        save_checkpoint("~no-such-user/x", SMALL, values.items())
    assert equal(load(saved)[1], values)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["home", "model"]


def test_full_disk(saved: Path) -> None:
    """When a file cannot be written the old checkpoint stays and nothing new is left."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="could not save"):
            save_checkpoint(saved, SMALL, states(SMALL, seed=1).items())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
    assert equal(load(saved)[1], states(SMALL))


def test_interrupted_between_the_renames(saved: Path) -> None:
    """With NAME gone and `.NAME.previous` there, reading finds the previous version and saving starts from it."""
    saved.rename(saved.parent / ".model.previous")
    with pytest.warns(UserWarning, match="interrupted save"):
        assert equal(load(saved)[1], states(SMALL))
    save_checkpoint(saved, SMALL, states(SMALL, seed=1).items())
    assert equal(load(saved)[1], states(SMALL, seed=1))
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


KILLED = """
import os, random, signal, sys, time, warnings
import torch
torch.set_num_threads(1)  # no thread pool, so that forking is safe
sys.path.insert(0, sys.argv[1])
from test_checkpoint import SMALL, equal, load, states
from siren.checkpoint import save_checkpoint
from pathlib import Path

warnings.simplefilter("ignore")
target, rng = Path(sys.argv[2]), random.Random(int(sys.argv[3]))
versions = [states(SMALL, seed=seed) for seed in range(2)]
save_checkpoint(target, SMALL, versions[0].items())
seen, point = [0, 0], 0

def hook(event, arguments):
    global left
    if event.startswith(("os.", "shutil.")) or event == "open":
        left -= 1
        if left == -1:  # os.kill is such an event too
            os.kill(os.getpid(), signal.SIGKILL)

while True:
    child = os.fork()
    if child == 0:
        left = point if point < 1000 else 1 << 30
        sys.addaudithook(hook)
        save_checkpoint(target, SMALL, versions[1].items())
        os._exit(0)
    if point >= 1000:
        time.sleep(rng.uniform(0, 0.08))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    found = load(target)[1]
    new = equal(found, versions[1])
    assert new or equal(found, versions[0]), point
    assert status == signal.SIGKILL or (status == 0 and new), (point, status)
    seen[new] += 1
    if new:
        save_checkpoint(target, SMALL, versions[0].items())
    point += 1
    if status == 0 and point < 1000:
        print("file operations", point - 1)
        point = 1000
    if point == 1020:
        break
assert min(seen) > 0, seen
print("old, new:", seen)
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    """Killed before each file operation in turn, then at random moments: the folder reads as all old or all new."""
    seed = secrets.randbits(32)
    print("seed", seed)
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path / "model"), str(seed)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    print(result.stdout)


@pytest.mark.parametrize(
    "generation", [[], "loud", {"volume": 1}, {"seconds": "6"}, {"top_k": 1.5}, {"top_p": True}, {"seconds": 1e999}]
)
def test_bad_generation_settings_are_refused(tmp_path: Path, generation: object) -> None:
    """Only known names with finite numbers may stand in a manifest's `generation`."""
    target = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN, target)
    path = target / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"generation": generation}))
    with pytest.raises(CheckpointError, match="generation"):
        read_manifest(target)
