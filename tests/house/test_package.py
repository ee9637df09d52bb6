"""What is shipped: the wheel, the recipes, the lock file, the sizes."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from wsss_core.config import Config, load_recipe

ROOT = Path(__file__).parents[2]
PACKAGES = ("deployments", "flows", "tasks", "wsss_core")
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
LARGEST_KB = 600


def test_wheel__four_packages_and_nothing_else(tmp_path):
    tree = tmp_path / "tree"
    for name in (*PACKAGES, "docker", "tests", "benchmarks", "docs", "recipes"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(tmp_path)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        (entry,) = [name for name in files if name.endswith("entry_points.txt")]
        assert "conta = flows.cli:main" in archive.read(entry).decode()
    code = {name for name in files if ".dist-info/" not in name}
    ours = {
        path.relative_to(tree).as_posix()
        for package in PACKAGES
        for path in (tree / package).rglob("*.py")
    }
    assert code == ours
    assert any(name.endswith("licenses/LICENSE") for name in files)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe__loads(recipe):
    config = load_recipe(recipe)
    assert isinstance(config, Config)
    assert config.name.replace("-", "_") == recipe.stem


def test_recipes__say_nothing_about_this_machine():
    for recipe in RECIPES:
        assert "runtime" not in yaml.safe_load(recipe.read_text())


def test_lock__names_no_host_and_has_hashes():
    lock = (ROOT / "requirements" / "lock.txt").read_text()
    assert "://" not in lock
    pins = re.findall(r"^[a-z0-9][\w.-]*==", lock, re.MULTILINE)
    assert len(pins) > 100
    assert lock.count("--hash=sha256:") >= len(pins)


def test_docker__is_no_package():
    assert not (ROOT / "docker" / "__init__.py").exists()  # it would shadow the package `docker`


def test_ci_run__is_executable():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def shipped_files():
    """Files that git tracks or would add; in a copy without git, none."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_files__are_small():
    large = [path for path in shipped_files() if path.stat().st_size > LARGEST_KB * 1024]
    assert not large, f"larger than {LARGEST_KB} kB: {large}"


def test_files__hold_no_weights_and_no_absolute_paths():
    homes = re.compile(rb"(?<![\w.])/(?:root|work|home|Users)/\w")
    for path in shipped_files():
        assert path.suffix not in {".safetensors", ".pth", ".pt", ".npz", ".db", ".pkl"}, path
        if path != Path(__file__) and path.suffix in {".py", ".md", ".yaml", ".toml", ".txt"}:
            assert not homes.search(path.read_bytes()), path


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("variable", "said"),
    [("PYTHON=", "needs Python 3.11"), ("FREE_GB=999999999", "GB are free here")],
)
def test_preflight__one_clear_line(variable, said):
    command = ["make", "--silent", "-C", str(ROOT), "preflight", variable]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert said in done.stdout
    assert done.stdout.count("\n") == 1
