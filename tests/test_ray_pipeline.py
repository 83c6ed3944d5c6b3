"""The same shards from Ray Data as from one process."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from fake_data import FakeCodec, FakeEncoder, contents, plain_clips

from siren.data import tokenize
from siren.errors import MissingDependencyError, SirenError


def run(source: Path, out: Path, **changed: Any) -> None:
    values = {"seconds": 0.5, "pad_seconds": 0.0, "shard_clips": 3, "progress": False}
    tokenize(source, out, FakeCodec(), FakeEncoder(), **values | changed)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_same_shards_on_local_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two actors, three groups, a bad file: the bytes of a run in this process."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'siren[ray]'")
    pytest.importorskip("ray.data", reason="Ray Data is not installed: pip install 'siren[ray]'")
    source = plain_clips(tmp_path / "clips", 7)
    (source / "3.wav").write_bytes(b"no sound")
    run(source, tmp_path / "wanted", workers=1)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default: other tests beside would starve the actors
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        run(source, tmp_path / "tokens", ray=True, workers=2)
        assert ray.is_initialized()  # not ours to stop
    finally:
        ray.shutdown()
    assert contents(tmp_path / "tokens") == contents(tmp_path / "wanted")


def test_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that is not there is one clear error."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'siren[ray]'")
    pytest.importorskip("ray.data", reason="Ray Data is not installed: pip install 'siren[ray]'")

    def fail(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(SirenError, match=r"Ray failed .*not find any running Ray instance.*run the same command again"):
        run(plain_clips(tmp_path / "clips", 1), tmp_path / "tokens", ray=True)


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the extra."""
    imported = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"siren\[ray\]"):
        run(plain_clips(tmp_path / "clips", 1), tmp_path / "tokens", ray=True)
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]
