"""Break a copy of the code in known places, one at a time; the tests have to notice each.

Reads `mutants.toml`. Prints `killed N/N`, or names the survivors and exits with 1. `make mutants`.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".conta", "__pycache__", ".*_cache", ".hypothesis"
)


def main() -> int:
    """Try all mutants, or those that a word of the command line names; returns the exit code."""
    mutants = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["mutant"]
    words = sys.argv[1:]
    chosen = [m for m in mutants if not words or any(word in m["name"] for word in words)]
    with tempfile.TemporaryDirectory(prefix="conta-mutants-") as scratch:
        tree = Path(scratch) / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        require_sound(tree, sorted({mutant["tests"] for mutant in chosen}))
        survivors = [mutant["name"] for mutant in chosen if not is_killed(tree, mutant)]
    for name in survivors:
        print(f"survived: {name}")
    print(f"killed {len(chosen) - len(survivors)}/{len(chosen)}")
    return int(bool(survivors))


def is_killed(tree: Path, mutant: dict[str, str]) -> bool:
    """Put the mutation in, run its tests, take it out."""
    path = tree / mutant["file"]
    sound = path.read_text()
    if sound.count(mutant["old"]) != 1:
        sys.exit(
            f"{mutant['name']}: {mutant['file']} holds {mutant['old']!r} "
            f"{sound.count(mutant['old'])} times, expected once; bring mutants.toml up to date"
        )
    path.write_text(sound.replace(mutant["old"], mutant["new"]))
    try:
        killed = run_tests(tree, mutant["tests"]).returncode == 1  # 1: tests ran, one failed
    finally:
        path.write_text(sound)
    say(f"{'killed' if killed else 'SURVIVED':<9} {mutant['name']}")
    return killed


def require_sound(tree: Path, tests: list[str]) -> None:
    """The tests have to look at the copy, and to pass as long as it is whole."""
    where = [sys.executable, "-c", "import wsss_core; print(wsss_core.__file__)"]
    found = subprocess.run(where, cwd=tree, check=True, capture_output=True, text=True).stdout
    if not Path(found.strip()).is_relative_to(tree):
        sys.exit(f"the copy in {tree} imports {found.strip()}")
    done = run_tests(tree, " ".join(tests))
    if done.returncode:
        sys.exit(f"the tests fail without any mutation:\n{done.stdout[-3000:]}")
    say(f"sound: {done.stdout.strip().splitlines()[-1]}")


def run_tests(tree: Path, tests: str) -> subprocess.CompletedProcess[str]:
    """Run test files of the copy until the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *shlex.split(tests)],
        cwd=tree,
        # without it, equal size and second of change would let Python run the code from before
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
        capture_output=True,
        text=True,
    )


def say(line: str) -> None:
    """Tell a person how far it is."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
