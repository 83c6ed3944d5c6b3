"""Put a trained siren-mini into the package: `package.py CHECKPOINT RECORDINGS [siren/models/siren-mini]`.

The weights and the codec, with the settings for sampling in the manifest; SOURCES.csv, which says where each recording
came from and under which licence; and the copyright files of the packages that held them. README.md and LICENSE of the
folder stay as they are.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

from siren.data.clips import read_clip_folder
from siren.manifest import read_manifest

# Chosen by benchmarks/retrieval.py on other seeds than those of its committed results.
GENERATION = {"seconds": 4.0, "temperature": 0.8, "top_k": 20, "guidance_scale": 3.0}


def package(checkpoint: Path, recordings: Path, target: Path) -> None:
    clips = read_clip_folder(recordings)
    shutil.copytree(checkpoint, target, dirs_exist_ok=True)
    manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8")) | {"generation": GENERATION}
    (target / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    read_manifest(target)
    shutil.copytree(recordings / "copyright", target / "copyright", dirs_exist_ok=True)
    with (target / "SOURCES.csv").open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["source", "licence"])
        lines.writerows(sorted((clip.source, clip.licence) for clip in clips))


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 4:
        raise SystemExit(__doc__)
    package(*map(Path, sys.argv[1:3]), Path(sys.argv[3] if sys.argv[3:] else "siren/models/siren-mini"))
