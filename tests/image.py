"""Build the image and run the services of docker/compose.yaml where there is no Docker.

`python tests/image.py` makes a bare Debian with Python for the image that docker/Dockerfile starts
from, has buildah execute the file's lines in it, and asks the image, as its own user, for
`conta doctor` and the versions of Prefect and MLflow. Then it starts each service by the command,
the environment and the order of compose.yaml, in a network of its own where `postgres`, `prefect`
and `mlflow` are this machine; Postgres is Debian's. It deploys the pools as compose.yaml says,
has the worker compute the smallest recipe, and looks whether Prefect calls it Completed, MLflow
has its scores, the pages and their links are there, and both refuse who has no password.

Needs root, 25 GB and, from Debian, debootstrap, buildah, iproute2 and postgresql. What it cannot
show: Docker's own engine and networks, `postgres:17-alpine`, restarts.
"""

import argparse
import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
BASE = "docker.io/library/python:3.11-slim-bookworm"
PYTHON = ["python3.11", "python3.11-venv", "python3-distutils", "ca-certificates"]
# The base image has Python's headers, not Debian's package of them, which would bring a compiler.
HEADERS = (
    "apt-get update && cd /tmp && apt-get download libpython3.11-dev && dpkg-deb -x *.deb / && "
    "rm -r *.deb /var/lib/apt/lists/* && ln -s /usr/bin/python3.11 /usr/local/bin/python"
)
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"
SECRETS = {
    "POSTGRES_PASSWORD": "postgres0password",
    "PREFECT_AUTH_STRING": "conta:prefect0password",
    "MLFLOW_USER": "conta",
    "MLFLOW_PASSWORD": "mlflow0password",
    "MLFLOW_SECRET_KEY": "mlflow0secret",
}
WAIT_S = 600.0


def main() -> int:
    """Build, then serve; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scratch", type=Path, required=True, help="A folder for all of it.")
    parser.add_argument("--serve", action="store_true", help="The image is there; only serve.")
    options = parser.parse_args()
    scratch = options.scratch.absolute()
    if options.serve:
        return serve(Image(scratch))
    image = Image(scratch)
    image.make_base()
    image.build()
    for command in ("id", "conta --help", "conta doctor", "prefect version", "mlflow --version"):
        say(f"$ {command}\n{image.run('try', command)}")
    # All that is started from here on dies with this process, and nothing else hears of it.
    alone = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    again = [sys.executable, __file__, "--serve", "--scratch", str(scratch)]
    return subprocess.run([*alone, *again], check=False).returncode


class Image:
    """What buildah keeps in a folder."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        scratch.mkdir(parents=True, exist_ok=True)
        self._buildah = ["buildah", "--root", str(scratch / "images"), "--runroot"]
        self._buildah += [str(scratch / "run"), "--storage-driver", "overlay"]

    def buildah(self, *arguments: str) -> str:
        return ask_shell([*self._buildah, *arguments])

    def make_base(self) -> None:
        """A bare Debian that has Python by the name that the base image has it by."""
        base = self.scratch / "base"
        # debootstrap knows no virtual packages, which Debian's Python asks for; apt does
        bootstrap = ["debootstrap", "--variant=minbase", "--include=ca-certificates,netbase"]
        ask_shell([*bootstrap, "bookworm", str(base)])
        inside = ["chroot", str(base), "env", "DEBIAN_FRONTEND=noninteractive", "sh", "-ec"]
        install = "apt-get install --yes --no-install-recommends"
        ask_shell([*inside, f"apt-get update && {install} {' '.join(PYTHON)} && {HEADERS}"])
        # packages are had from where this machine has them
        shutil.copy(f"/{CERTIFICATES}", base / CERTIFICATES)
        (base / "etc/pip.conf").write_text(f"[global]\ncert = /{CERTIFICATES}\n")
        (base / "etc/uv").mkdir()
        (base / "etc/uv/uv.toml").write_text("system-certs = true\n")
        name = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", name, str(base), "/")
        self.buildah("config", "--env", "PATH=/usr/local/bin:/usr/sbin:/usr/bin", name)
        self.buildah("commit", "--quiet", name, BASE)
        self.buildah("rm", name)
        shutil.rmtree(base)

    def build(self) -> None:
        """Execute docker/Dockerfile."""
        local = ["--pull-never", "--network", "host", "--isolation", "chroot"]
        file = str(DOCKER / "Dockerfile")
        self.buildah("bud", *local, "--file", file, "--tag", "conta", str(ROOT))

    def command(self, name: str, command: str, service: dict | None = None) -> list[str]:
        """How to run something in a container that is called so, as the image's user."""
        service = service or {}
        hosts = [f"--add-host={host}:127.0.0.1" for host in ("postgres", "prefect", "mlflow")]
        if name not in self.buildah("containers", "--format", "{{.ContainerName}}").split():
            self.buildah("from", *hosts, "--cap-drop", "all", "--name", name, "conta")
        run = [*self._buildah, "run", "--isolation", "chroot", "--network", "host"]
        for key, value in service.get("environment", {}).items():
            run += ["--env", f"{key}={value}"]
        for volume in service.get("volumes", []):
            source, _, target = volume.partition(":")
            folder = self.scratch / "volumes" / Path(source).name
            if not folder.exists():
                folder.mkdir(parents=True)
                os.chown(folder, 1000, 1000)  # as a new volume takes after the image's folder
            run += ["--volume", f"{folder}:{target}"]
        if "working_dir" in service:
            run += ["--workingdir", service["working_dir"]]
        return [*run, name, "--", *shlex.split(command)]

    def run(self, name: str, command: str, service: dict | None = None) -> str:
        return ask_shell(self.command(name, command, service))


def serve(image: Image) -> int:
    """Start what compose.yaml has, and use it; returns the exit code."""
    services = read_services()
    ask_shell(["ip", "link", "set", "lo", "up"])
    start_postgres(image.scratch, services["postgres"])
    for name in ("prefect", "mlflow", "worker"):
        start(image, name, services[name])
    worker = services["worker"]
    deploy = "prefect --no-prompt deploy --prefect-file deployments/prefect.yaml --all"
    say(image.run("deploy", deploy, worker))
    config = yaml.safe_load((ROOT / "recipes" / "scenes_smoke.yaml").read_text())
    config["runtime"] = {"threads": 1}
    run = "prefect --no-prompt deployment run conta/scenes-pool --watch --params "
    said = image.run("deploy", run + shlex.quote(json.dumps({"config": config})), worker)
    say("\n".join(said.splitlines()[-3:]))
    found = look()
    say(json.dumps(found))
    return 0 if found["sound"] else 1


def read_services() -> dict:
    """The services of compose.yaml with our secrets in their places."""
    text = (DOCKER / "compose.yaml").read_text()
    given = SECRETS | {"PHOTOS": "./photos", "TORCH_INDEX_URL": ""}
    text = re.sub(r"\$\{(\w+)[^}]*\}", lambda found: given[found[1]], text)
    return yaml.safe_load(text)["services"]


def start_postgres(scratch: Path, service: dict) -> None:
    """Do with Debian's Postgres what the image of Postgres does with its environment."""
    binaries = max(Path("/usr/lib/postgresql").glob("*/bin"))
    folder = scratch / "postgres"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.chown(folder, "postgres")
    given = service["environment"]
    user, database = given["POSTGRES_USER"], given["POSTGRES_DB"]
    (folder / "password").write_text(given["POSTGRES_PASSWORD"])
    (folder / "password").chmod(0o644)
    settings = f"-k {folder} -c listen_addresses=127.0.0.1"
    initdb = [f"--username={user}", "--auth=scram-sha-256", f"--pwfile={folder}/password"]
    as_postgres = ["runuser", "-u", "postgres", "--"]
    ask_shell([*as_postgres, str(binaries / "initdb"), f"{folder}/data", *initdb])
    log = ["-w", "-l", f"{folder}/log"]
    pg_ctl = [str(binaries / "pg_ctl"), "-D", f"{folder}/data", "-o", settings, *log, "start"]
    ask_shell([*as_postgres, *pg_ctl])
    os.environ |= {"PGHOST": str(folder), "PGPASSWORD": given["POSTGRES_PASSWORD"]}
    ask_shell(["psql", "-U", user, "-d", "postgres", "-c", f"CREATE DATABASE {database}"])
    ask_shell(["psql", "-U", user, "-d", database, "-f", str(DOCKER / "databases.sql")])
    _, test = service["healthcheck"]["test"]
    say(f"postgres: {ask_shell(['sh', '-c', test])}")


def start(image: Image, name: str, service: dict) -> None:
    """Start a service and wait until it is healthy."""
    begun = time.monotonic()
    log = image.scratch / f"{name}.log"
    with log.open("ab") as output:
        command = image.command(name, service["command"], service)
        child = subprocess.Popen(command, stdout=output, stderr=output)
    test = service.get("healthcheck", {}).get("test")
    while test and child.poll() is None and time.monotonic() - begun < WAIT_S:
        command = image.command(name, shlex.join(test[1:]))
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            say(f"{name}: healthy after {time.monotonic() - begun:.0f} s")
            return
        time.sleep(2)
    if test:
        sys.exit(f"{name} is not healthy:\n{log.read_text()[-3000:]}")


def look() -> dict:
    """What the servers say with a password and without."""
    prefect, mlflow = "http://127.0.0.1:4200/api", "http://127.0.0.1:5000/api/2.0/mlflow"
    login = SECRETS["PREFECT_AUTH_STRING"]
    user = f"{SECRETS['MLFLOW_USER']}:{SECRETS['MLFLOW_PASSWORD']}"
    flow_runs = [ask(f"{prefect}/flow_runs/filter", {}, who) for who in (None, f"{login}x", login)]
    experiments = [
        ask(f"{mlflow}/experiments/search", {"max_results": 9}, who)
        for who in (None, f"{user}x", user)
    ]
    states = [run["state_name"] for run in flow_runs[-1][1]]
    wanted = {"experiment_ids": [one["experiment_id"] for one in experiments[-1][1]["experiments"]]}
    runs = ask(f"{mlflow}/runs/search", wanted | {"max_results": 99}, user)[1]["runs"]
    metrics = [metric for run in runs for metric in run["data"].get("metrics", [])]
    scores = {one["key"]: one["value"] for one in metrics if one["key"].endswith("/miou")}
    with urllib.request.urlopen("http://127.0.0.1:4200/", timeout=60) as page:
        title = "<title>Prefect" in page.read().decode()
    report = {"artifacts": {"key": {"any_": ["round-report"]}}}
    reports = ask(f"{prefect}/artifacts/filter", report, login)[1]
    found = {
        "prefect": [status for status, _ in flow_runs],
        "mlflow": [status for status, _ in experiments],
        "states": states,
        "runs": len(runs),
        "scores": scores,
        "page": title,
        "links": sum("(http://127.0.0.1:5000/#/" in report["data"] for report in reports),
    }
    guarded = found["prefect"] == found["mlflow"] == [401, 401, 200]
    used = states == ["Completed"] and "pseudo/miou" in scores
    return found | {"sound": guarded and used and title and found["links"] == len(reports) == 2}


def ask(url: str, body: dict, login: str | None) -> tuple[int, object]:
    """Status and answer of a server of ours."""
    headers = {"Content-Type": "application/json"}
    if login is not None:
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, None


def ask_shell(command: list[str]) -> str:
    """What a command says."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        say(f"{shlex.join(command)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
        done.check_returncode()
    return done.stdout.strip()


def say(line: str) -> None:
    """Tell a person how far it is."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
