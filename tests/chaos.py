"""Kill a run again and again, start the same command after each kill, and look at what is left.

`python tests/chaos.py --kills 10 --seed 7` sends kill -9 to the whole process group of a smoke run
at times drawn uniformly over the length of an undisturbed run. A run that ends before its time
comes counts no kill: its home is examined with the others, and the next victim starts in a fresh
one. The last victim is left to end. Prints one JSON line:

* `kills`: runs that were killed while alive.
* `digests_equal`: every run.json in the end names the same artifacts, digest by digest, as the
  undisturbed run's.
* `max_epochs_redone`: the most training epochs that one kill cost: those that the stage under way
  had begun (its kept ones and one more) less the one that the next start began with.
* `processes_left`: the most processes with a victim's home in their environment, five seconds after
  a kill or an end.
* `mlflow_parents`: the most parent runs that one home's MLflow holds for its one run.
* `points_per_round`: the most points that a metric of such a parent has at one step (round).

Exit code 0 if all is as it should be. Linux only: processes are found in /proc.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "scenes_smoke.yaml"
# Two threads on pictures this small only wait for each other; worker processes stay two.
COMMAND = [sys.executable, "-m", "flows.cli", "run", str(RECIPE), "--set", "runtime.threads=1"]
GRACE_S = 5.0
EPOCH = re.compile(r"(classifier|segmenter) epoch (\d+): ")
SOUND = {"digests_equal": True, "processes_left": 0, "mlflow_parents": 1, "points_per_round": 1}


def main() -> int:
    """Run the whole trial; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="conta-chaos-"))
    found = try_kills(scratch, options.kills, random.Random(options.seed))  # noqa: S311
    print(json.dumps(found))
    sound = all(found[name] == value for name, value in SOUND.items())
    if not sound or found["max_epochs_redone"] > 1:
        say(f"not as it should be; the homes are kept in {scratch}")
        return 1
    shutil.rmtree(scratch)
    return 0


def try_kills(scratch: Path, kills: int, dice: random.Random) -> dict[str, object]:
    """Kill runs `kills` times; returns what is printed."""
    calm = Victim(scratch / "calm")
    started = time.monotonic()
    calm.start_and_wait()
    length_s = time.monotonic() - started
    say(f"undisturbed: {length_s:.0f} s, {len(calm.epochs())} epochs")
    victims = [Victim(scratch / "victim-0")]
    done = 0
    while done < kills:
        victim, after_s = victims[-1], dice.uniform(0, length_s)
        if victim.start_and_kill(after_s):
            done += 1
            say(f"kill {done} after {after_s:.0f} s in {victim.home.name}: {victim.state()}")
        else:
            say(f"{victim.home.name} ended by itself before {after_s:.0f} s were over")
            victims.append(Victim(scratch / f"victim-{len(victims)}"))
    victims[-1].start_and_wait()
    parents = [victim.mlflow() for victim in victims]
    return {
        "kills": done,
        "digests_equal": all(victim.digests() == calm.digests() for victim in victims),
        "max_epochs_redone": max(victim.max_epochs_redone() for victim in victims),
        "processes_left": max(victim.processes_left for victim in [calm, *victims]),
        "mlflow_parents": max(count for count, _ in parents),
        "points_per_round": max(points for _, points in parents),
    }


class Victim:
    """A home and what happened to the runs in it.

    Attributes:
        home: Its CONTA_HOME.
        processes_left: The most processes that were alive after a run was over.
        grace_s: How long they have to end.
    """

    grace_s = GRACE_S

    def __init__(self, home: Path, command: list[str] = COMMAND) -> None:
        self.home = home
        self._command = command
        self.processes_left = 0
        self._began_s = 0.0
        self._kills: list[tuple[str, int, int]] = []  # stage under way, epochs begun, epochs logged

    def start_and_wait(self, **environment: str | None) -> None:
        """Let the command end by itself."""
        with self.start(**environment) as child:
            self._end(child)

    def start_and_kill(self, after_s: float) -> bool:
        """Kill the command's whole process group after some time; False if it ended before."""
        with self.start() as child:
            try:
                child.wait(after_s)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                self.count_left()
                self._note_kill()
                return True
            self._end(child)
            return False

    def state(self) -> str:
        """What the last kill hit, for people."""
        stage, begun, _ = self._kills[-1]
        return f"epoch {begun} of the {stage}" if stage else "no training"

    def epochs(self) -> list[tuple[str, int]]:
        """(stage, 0-based number) of every finished epoch, as run.log names them in order."""
        logs = self.home.glob("runs/*/run.log")
        return [
            (match[1], int(match[2])) for log in logs for match in EPOCH.finditer(log.read_text())
        ]

    def max_epochs_redone(self) -> int:
        """The most epochs that one kill cost."""
        epochs = self.epochs()
        costs = [0]
        for stage, begun, logged in self._kills:
            later = [number for name, number in epochs[logged:] if name == stage]
            if stage and later:
                costs.append(begun - later[0])
        return max(costs)

    def digests(self, name: str = "*") -> dict[str, str]:
        """Content digest of every artifact of the run of this name, by round and stage."""
        (record,) = self.home.glob(f"runs/{name}/run.json")
        rounds = json.loads(record.read_text())["rounds"]
        return {
            f"{entry['round']} {label}": manifest["digest"]
            for entry in rounds
            for label, manifest in entry["manifests"].items()
        }

    def mlflow(self) -> tuple[int, int]:
        """Number of parent runs, and the most points that a metric of one has at a step."""
        parents = (
            "select run_uuid from tags where key = 'conta.run' and run_uuid not in "
            "(select run_uuid from tags where key = 'mlflow.parentRunId')"
        )
        points = (
            f"select count(*) from metrics where run_uuid in ({parents}) "  # noqa: S608
            "group by run_uuid, key, step"
        )
        with closing(sqlite3.connect(self.home / "mlflow.db")) as base:
            count = len(base.execute(parents).fetchall())
            return count, max((row[0] for row in base.execute(points)), default=0)

    def start(self, *settings: str, **environment: str | None) -> subprocess.Popen[bytes]:
        """Start the command in a group of its own.

        Args:
            settings: More texts for `--set`.
            environment: Variables that differ from this process's; None removes one.
        """
        self.home.mkdir(exist_ok=True)
        changed = os.environ | {"CONTA_HOME": str(self.home)} | environment
        self._began_s = time.time()
        with (self.home / "output.txt").open("ab") as output:
            return subprocess.Popen(
                [*self._command, *(word for text in settings for word in ("--set", text))],
                cwd=ROOT,
                env={name: value for name, value in changed.items() if value is not None},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        if child.wait() != 0:
            output = (self.home / "output.txt").read_text()
            sys.exit(f"the run ended with {child.returncode}:\n{output[-3000:]}")
        self.count_left()

    def count_left(self) -> None:
        """Note how many processes are alive, once they had their time to end."""
        deadline = time.monotonic() + self.grace_s
        while (left := count_processes(self.home)) and time.monotonic() < deadline:
            time.sleep(0.1)
        self.processes_left = max(self.processes_left, left)

    def _note_kill(self) -> None:
        stage, begun = "", 0
        for unfinished in self.home.glob("store/*/.tmp-*"):
            name, key = (
                unfinished.parent.name,
                unfinished.name.removeprefix(".tmp-").partition("@")[0],
            )
            now = unfinished.stat().st_mtime >= self._began_s  # else it is of an earlier kill
            if name in ("classifier", "segmenter") and now:
                stage, begun = name, self._kept_epochs(name, key) + 1
        self._kills.append((stage, begun, len(self.epochs())))

    def _kept_epochs(self, stage: str, key: str) -> int:
        try:
            state = json.loads(
                (self.home / "scratch" / stage / key / "checkpoint.json").read_text()
            )
        except FileNotFoundError:
            return 0
        return len(state["history"])


def count_processes(home: Path) -> int:
    """Processes that were started with this CONTA_HOME and are alive, this one aside."""
    mark = f"CONTA_HOME={home}\0".encode()
    alive = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            running = (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            alive += running and mark in (folder / "environ").read_bytes()
        except OSError:  # it ended, or is another user's
            continue
    return alive


def say(line: str) -> None:
    """Tell a person how far it is; the answer alone goes to stdout."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
