"""Train with and without the truth masks: no weight and no pseudo-mask may differ in a byte.

Prints one digest a run; exit code 1 if they differ. `make truth-free`.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "scenes_smoke.yaml"
TRAINED = (
    "classifier",
    "cams",
    "boundary_labels",
    "boundary",
    "masks",
    "segmenter",
    "predictions",
    "confounders",
)
TRUTH = ("SegmentationClass", "Roles", "scenes.json")


def main() -> int:
    """Run the recipe twice on the same photos; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="conta-truth-free-") as scratch:
        work = Path(scratch)
        conta(work, "data", "scenes", work / "with", "--photos", 20, "--size", 64)
        shutil.copytree(work / "with", work / "without", ignore=shutil.ignore_patterns(*TRUTH))
        digests = []
        for name in ("with", "without"):
            home = work / f"home-{name}"
            read_as_voc = ("--set", "data.source=voc", "--data", work / name, "--limit", 20)
            conta(home, "run", RECIPE, *read_as_voc, "--set", "runtime.threads=1")
            digest, files = digest_of(home / "store")
            truths = len(list((home / "store").glob("score_masks/*/report.json")))
            print(f"{digest}  {name} truth: {files} files, {truths} scores", flush=True)
            digests.append(digest)
            assert files > 0, "nothing was trained"
            assert bool(truths) == (name == "with"), "the truth folder was not what differed"
    return int(digests[0] != digests[1])


def conta(home: Path, *arguments: object) -> None:
    """Call the command; what it says is shown only if it fails."""
    command = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
    environment = os.environ | {"CONTA_HOME": str(home)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}\n{done.stdout}{done.stderr}")


def digest_of(store: Path) -> tuple[str, int]:
    """Hash over the bytes of all that was trained or drawn from it, and the number of files."""
    lines = [
        f"{stage} {path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for stage in TRAINED
        for path in (store / stage).glob("[!.]*/**/*")
        if path.is_file() and path.suffix in {".safetensors", ".png", ".npz"}
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:32], len(lines)


if __name__ == "__main__":
    sys.exit(main())
