"""The rooms keep their distance, and the command starts at once."""

import importlib
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`((?:wsss_core|tasks|flows)(?:\.\w+)+)(?:\(\))?`")


def test_layers__contracts_are_kept():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_command__imports_nothing_heavy():
    check = (
        "import sys, flows.cli; "
        "print(sorted({'torch', 'prefect', 'mlflow', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_command__help_is_instant():
    command = [sys.executable, "-m", "flows.cli", "--help"]
    times = []
    for _ in range(3):
        started = time.monotonic()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        times.append(time.monotonic() - started)
    assert min(times) < 2.0  # 0.3 s on an idle machine; torch alone takes longer than this


def test_core__imports_without_orchestrator_and_tracker():
    check = (
        "import sys; sys.modules.update(prefect=None, mlflow=None)\n"
        "import pkgutil, importlib, wsss_core\n"
        "for module in pkgutil.walk_packages(wsss_core.__path__, 'wsss_core.'):\n"
        "    importlib.import_module(module.name)\n"
    )
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, capture_output=True)


def test_fastapi__still_lets_the_server_start():
    # With fastapi 0.155 and later this import dies, and with it every run.
    importlib.import_module("prefect.server.api.server")


@pytest.mark.parametrize("page", sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")]), ids=str)
def test_pages__name_code_that_exists(page):
    for name in NAMED.findall(page.read_text()):
        assert find(name) is not None, f"{page.name} names {name}"


def test_method_page__every_equation_names_its_code():
    page = ROOT / "docs" / "method.md"
    if not page.exists():
        pytest.skip("no page yet")
    rows = [row for row in page.read_text().splitlines() if re.match(r"\|\s*Eq\. ?\d", row)]
    assert rows
    for row in rows:
        assert NAMED.search(row), row


def find(name):
    """The object behind a dotted name; None if there is none."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found
    return None
