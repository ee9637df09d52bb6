"""The rooms keep their distance, and the command starts at once."""

import ast
import importlib
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`((?:wsss_core|tasks|flows)(?:\.\w+)+)(?:\(\))?`")


def test_layers__contracts_are_kept():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("flows.cli", {"torch", "prefect", "mlflow", "numpy", "pydantic"}),
        # what is slow to import is imported while the server comes up
        ("flows.launch", {"torch", "prefect", "mlflow", "numpy"}),
    ],
)
def test_command__imports_nothing_heavy(module, heavy):
    check = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_command__help_is_instant():
    command = [sys.executable, "-m", "flows.cli", "--help"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent_s < 1.5  # 0.25 s; `import torch` alone takes several


def test_fastapi__still_lets_the_server_start():
    # With fastapi 0.155 and later this import dies, and with it every run.
    importlib.import_module("prefect.server.api.server")


@pytest.mark.parametrize("page", sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")]), ids=str)
def test_pages__name_code_that_exists(page):
    for name in NAMED.findall(page.read_text()):
        assert is_defined(name), f"{page.name} names {name}"


def test_method_page__every_equation_names_its_code():
    page = (ROOT / "docs" / "method.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| ")]
    rows = [row for row in table if not row.startswith(("| step ", "|---"))]
    assert len(rows) >= 10
    for row in rows:
        assert NAMED.search(row), row


def is_defined(name):
    """Whether a dotted name is a module, or something a module defines; read, not imported."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:cut])
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if source.is_file():
            return defines(ast.parse(source.read_text()), parts[cut:])
    return False


def defines(tree, parts):
    """Whether a module or class body defines the first part, and that the rest."""
    if not parts:
        return True
    for node in tree.body:
        targets = getattr(node, "targets", [getattr(node, "target", node)])
        names = {getattr(target, "id", getattr(target, "name", None)) for target in targets}
        if parts[0] in names:
            return len(parts) == 1 or (hasattr(node, "body") and defines(node, parts[1:]))
    return False


def test_is_defined__tells_apart():
    assert is_defined("wsss_core.store.Store.publish")
    assert is_defined("wsss_core.store.FORMAT")
    assert not is_defined("wsss_core.store.Store.vanish")
    assert not is_defined("wsss_core.nowhere.thing")
