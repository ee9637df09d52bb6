"""Take the pictures in docs/img from the real pages, after asserting what stands on them.

`python tests/screenshots.py` makes two small runs in a fresh home, the first one stopped in its
last round and taken up again, serves the home, deploys the recipe, and looks at the run form, the
resumed run, a round's report, MLflow's charts and the page of `conta compare --html`. A picture is
only written when its page shows what it has to. Needs Chromium (Debian, Ubuntu: apt install
chromium); exit code 0 if all five are there.
"""

import argparse
import base64
import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image
from websockets.sync.client import connect

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "scenes_smoke.yaml"
CONTA = [sys.executable, "-m", "flows.cli"]
QUICK = ["--set", "runtime.threads=1"]
OTHER = ["--set", "causal.context=seg_mask"]
MAX_BYTES, COLOURS = 150_000, 256
WAIT_S = 600.0


def main() -> int:
    """Make the runs, look at the pages; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img")
    parser.add_argument(
        "--home", type=Path, help="Look at the two runs that are here, and make none."
    )
    options = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        sys.exit("no Chromium; install it (Debian, Ubuntu: apt install chromium)")
    scratch = Path(tempfile.mkdtemp(prefix="conta-screenshots-"))
    home = (options.home or scratch / "home").absolute()
    home.mkdir(parents=True, exist_ok=True)
    os.environ["CONTA_HOME"] = str(home)
    options.out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as children:
        children.enter_context(running([*CONTA, "ui"], scratch / "ui.log"))
        links = json.loads(wait_for("conta ui", (home / "ui.json").read_text))
        children.enter_context(running([*CONTA, "deploy", str(RECIPE)], scratch / "deploy.log"))
        if options.home is None:
            make_runs(home)
        first, second = read_runs(home)
        page = scratch / "compare.html"
        conta("compare", first["name"], second["name"], "--html", str(page))
        deployment = wait_for("conta deploy", lambda: find_deployment(links["prefect"]))
        eyes = children.enter_context(Browser(browser, scratch / "profile"))
        take_pictures(eyes, links, first, second, deployment, page, options.out)
    shutil.rmtree(scratch)
    return 0


def make_runs(home: Path) -> None:
    """A run that is stopped and taken up again, and one of other settings."""
    command = ["run", str(RECIPE), *QUICK]
    with running([*CONTA, *command], home / "stopped.log") as child:
        wait_for("round 1", lambda: reads_round(home, 1))
        child.send_signal(signal.SIGTERM)
        child.wait(WAIT_S)
    conta(*command)
    conta(*command, *OTHER)


def read_runs(home: Path) -> tuple[dict, dict]:
    """The records of the two, in the order in which they were started."""
    records = [json.loads(path.read_text()) for path in home.glob("runs/*/run.json")]
    first, second = sorted(records, key=lambda run: run["started_ms"])
    return first, second


def reads_round(home: Path, number: int) -> bool:
    """Whether the home's one run has come to the segmenter of a round."""
    (record,) = home.glob("runs/*/run.json")
    under_way = json.loads(record.read_text())["under_way"]
    return under_way["round"] == number and under_way["stage"] == "segmenter"


def take_pictures(eyes, links, first, second, deployment, page, out) -> None:
    """Look at each page and keep what it shows."""
    prefect = links["prefect"]
    names = [first["name"], second["name"]]
    eyes.open(f"{prefect}/deployments/deployment/{deployment}/run")
    eyes.expect("Rounds", "Supervision", "T: rounds after round 0", "Causal")
    eyes.keep(out / "run_form.png", 1200, 1000)

    eyes.open(f"{prefect}/runs/flow-run/{first['prefect_run']}")
    eyes.expect(first["name"], "Completed")
    eyes.click("Task Runs")
    # the newest come first: what was computed above, what was there below
    eyes.show("segmenter 1")
    eyes.expect("Cached", "Completed", "segmenter 1", "masks 1")
    eyes.keep(out / "resumed_run.png", 1200, 1000)

    eyes.open(f"{prefect}/artifacts/artifact/{find_report(prefect, second['prefect_run'])}")
    eyes.expect(f"{second['name']}, round 1", "pseudo-mask", "Charts in MLflow")
    eyes.keep(out / "round_report.png", 1200, 940)

    eyes.open(charts_url(links["mlflow"], first))
    eyes.expect(*names)
    # a chart is drawn, and its name written, when it comes into view
    eyes.type("Search metric charts", "^(cam|pseudo)/miou$")
    eyes.expect("cam/miou", "pseudo/miou")
    eyes.tidy("button[aria-label*=close i]", "modebar")
    eyes.keep(out / "mlflow_charts.png", 1300, 1120)

    eyes.open(page.as_uri())
    eyes.expect(*names, "Over the rounds", "By class", "pseudo-mask")
    eyes.keep(out / "compare_page.png", 1200, 1000)


def find_deployment(prefect: str) -> str:
    """Id of the smoke recipe's deployment."""
    return ask(f"{prefect}/api/deployments/name/conta/scenes-smoke")["id"]


def find_report(prefect: str, flow_run: str) -> str:
    """Id of the last report of a flow run."""
    query = {
        "artifacts": {"key": {"any_": ["round-report"]}, "flow_run_id": {"any_": [flow_run]}},
        "sort": "CREATED_DESC",
    }
    return ask(f"{prefect}/api/artifacts/filter", query)[0]["id"]


def charts_url(mlflow: str, run: dict) -> str:
    """The charts of the experiment that a run is in."""
    experiment = run["mlflow_url"].partition("/experiments/")[2].partition("/")[0]
    return f"{mlflow}/#/experiments/{experiment}/runs?compareRunsMode=CHART"


class Browser:
    """A headless Chromium, driven by its own protocol."""

    def __init__(self, program: str, profile: Path) -> None:
        self._command = [
            program,
            "--headless=new",
            "--no-sandbox",  # it sees our own pages alone
            "--disable-gpu",
            "--hide-scrollbars",
            "--disable-background-networking",
            "--no-proxy-server",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        self._profile = profile
        self._ids = itertools.count(1)

    def __enter__(self) -> "Browser":
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(running(self._command, self._profile.with_suffix(".log")))
        try:
            port = wait_for("Chromium", self._read_port)
            tabs = wait_for("a tab", lambda: ask(f"http://127.0.0.1:{port}/json/list"))
            address = next(tab for tab in tabs if tab["type"] == "page")["webSocketDebuggerUrl"]
            self._socket = self._stack.enter_context(
                connect(address, max_size=None, proxy=None, open_timeout=WAIT_S)
            )
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self, url: str) -> None:
        """Go to a page, afresh."""
        self._say("Emulation.setDeviceMetricsOverride", **_size(1400, 1000))
        self._say("Page.navigate", url="about:blank")
        self._say("Page.navigate", url=url)

    def expect(self, *texts: str) -> None:
        """Wait until all of these are to be read on the page."""
        missing, seen, end = list(texts), "", time.monotonic() + WAIT_S
        while missing and time.monotonic() < end:
            time.sleep(0.5)
            seen = self._ask("document.body ? document.body.innerText : ''") or ""
            missing = [text for text in texts if text.lower() not in seen.lower()]
        if missing:
            sys.exit(f"not on {self._ask('location.href')}: {missing}; there is:\n{seen}")

    def click(self, text: str) -> None:
        """Click what is called so."""
        found = (
            "[...document.querySelectorAll('a, button, [role=tab], li, span')]"
            f".filter(e => e.innerText && e.innerText.trim().startsWith({json.dumps(text)}))"
        )
        self._ask(f"{found}.at(-1).click()")

    def type(self, field: str, text: str) -> None:
        """Write into the field with this placeholder."""
        found = f"document.querySelector('input[placeholder={json.dumps(field)}]')"
        wait_for(f"the field {field!r}", lambda: self._ask(f"Boolean({found})"))
        self._ask(f"{found}.focus()")
        self._say("Input.insertText", text=text)

    def tidy(self, closers: str, hidden: str) -> None:
        """Close what lies beside the page's subject, and hide a class that only a mouse needs."""
        self._ask(f"document.querySelectorAll({json.dumps(closers)}).forEach(e => e.click())")
        self._ask(
            "document.head.insertAdjacentHTML('beforeend', "
            f"'<style>.{hidden} {{ display: none }}</style>')"
        )

    def show(self, text: str) -> None:
        """Scroll the first place where this stands alone to the middle."""
        script = (
            "(e => { if (e) e.scrollIntoView({block: 'center'}); return Boolean(e) })("
            "[...document.querySelectorAll('span, div')]"
            f".find(e => e.innerText && e.innerText.trim() === {json.dumps(text)}))"
        )
        wait_for(f"{text!r} to scroll to", lambda: self._ask(script))

    def keep(self, file: Path, width: int, height: int) -> None:
        """Write a picture of the page, in few colours."""
        self._say("Emulation.setDeviceMetricsOverride", **_size(width, height))
        time.sleep(5)  # charts and pictures are drawn after their text
        shot = base64.b64decode(self._say("Page.captureScreenshot", format="png")["data"])
        with Image.open(io.BytesIO(shot)) as picture:
            # an octree keeps what is rare, such as the colours of a legend
            few = picture.convert("RGB").quantize(COLOURS, method=Image.Quantize.FASTOCTREE)
            few.save(file, optimize=True)
        if file.stat().st_size > MAX_BYTES:
            sys.exit(f"{file} has {file.stat().st_size} bytes; make it smaller")
        say(f"{file}, {file.stat().st_size // 1000} kB")

    def _ask(self, script: str) -> str:
        answer = self._say("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            sys.exit(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value", "")

    def _say(self, method: str, **parameters: object) -> dict:
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(timeout=WAIT_S))
            if answer.get("id") == number:
                if "error" in answer:
                    sys.exit(f"{method}: {answer['error']}")
                return answer["result"]

    def _read_port(self) -> str:
        return (self._profile / "DevToolsActivePort").read_text().split()[0]


def _size(width: int, height: int) -> dict[str, object]:
    return {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}


@contextlib.contextmanager
def running(command: list[str], log: Path):
    """A child in a process group of its own, which is gone afterwards."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def conta(*arguments: str) -> None:
    """A verb of `conta`, to its end."""
    done = subprocess.run(
        [*CONTA, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"conta {arguments[0]} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    say(f"conta {' '.join(arguments)}")


def wait_for(what: str, look):
    """What `look` returns once it neither fails nor returns nothing."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = look()
            if found:
                return found
        time.sleep(0.3)
    return sys.exit(f"{what} did not come in {WAIT_S:.0f} s")


def ask(url: str, body: object = None):
    """JSON from a server of ours."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(  # noqa: S310
        url, data, {"Content-Type": "application/json"}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=60) as answer:
        return json.load(answer)


def say(line: str) -> None:
    """Tell a person how far it is."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
