"""What can be known of the image and its services without an engine to run them."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from wsss_core.config import load_recipe, parse_config

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
POOLS = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
OFFICIAL = re.compile(r"[a-z0-9]+(:[\w.-]+)?")  # no host and no owner: the library of the hub
VARIABLE = re.compile(r"\$\{(\w+)")


def test_compose__services_are_whole():
    assert set(SERVICES) == {"postgres", "prefect", "mlflow", "worker"}
    for name, service in SERVICES.items():
        assert OFFICIAL.fullmatch(service["image"]), name
        assert service["restart"] == "unless-stopped", name
        for port in service.get("ports", []):
            assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), (name, port)
        for other, wish in service.get("depends_on", {}).items():
            assert wish == {"condition": "service_healthy"}
            assert "test" in SERVICES[other]["healthcheck"], other
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            bound = source.startswith(("./", "${"))
            assert bound or source in COMPOSE["volumes"], (name, volume)
    assert (DOCKER / "databases.sql").is_file()


def test_compose__each_part_asks_for_a_password():
    said = {name: str(service) for name, service in SERVICES.items()}
    assert "PREFECT_SERVER_API_AUTH_STRING" in said["prefect"]
    assert "--app-name basic-auth" in said["mlflow"]
    for name in ("postgres", "prefect", "mlflow"):
        assert ":?set it in docker/secrets.env}" in said[name], name
    for name, service in SERVICES.items():
        for key, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|AUTH_STRING|CONNECTION_URL", key):
                assert VARIABLE.search(value), f"{name}: {key} is written down"


def test_compose__prefect_writes_its_pages_where_the_user_of_the_image_may():
    folder = SERVICES["prefect"]["environment"]["PREFECT_UI_STATIC_DIRECTORY"]
    assert folder.startswith("/tmp/")  # noqa: S108


def test_compose__secrets_are_named_empty_and_never_committed():
    lines = (DOCKER / "secrets.example.env").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    used = set(VARIABLE.findall((DOCKER / "compose.yaml").read_text())) - {"TORCH_INDEX_URL"}
    assert set(given) == used
    assert not any(
        value for name, value in given.items() if re.search("PASSWORD|SECRET|AUTH", name)
    )
    assert "docker/secrets.env" in (ROOT / ".gitignore").read_text().splitlines()
    listed = subprocess.run(
        ["git", "ls-files", "docker/*.env"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert listed.stdout.split() in ([], ["docker/secrets.example.env"])


@pytest.mark.parametrize("name", ["compose.yaml", "Dockerfile", "databases.sql"])
def test_docker__names_no_other_host(name):
    text = (DOCKER / name).read_text()
    hosts = set(re.findall(r"://(?:[^\s/@]*@)?([\w.-]+)", text))
    assert hosts <= {"127.0.0.1", "postgres", "prefect", "mlflow"}


def test_dockerfile__two_stages_no_root_and_the_lock():
    stages = re.findall(r"^FROM (\S+)(?: AS (\w+))?$", DOCKERFILE, re.MULTILINE)
    assert [name for _, name in stages] == ["build", ""]
    assert all(OFFICIAL.fullmatch(image) for image, _ in stages)
    assert re.search(r"^ARG TORCH_INDEX_URL=$", DOCKERFILE, re.MULTILINE)
    assert "--require-hashes --requirements requirements/lock.txt" in DOCKERFILE
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.*)$", last, re.MULTILINE) == ["1000"]
    assert "useradd --uid 1000 " in last
    assert not re.search(r"^ADD ", DOCKERFILE, re.MULTILINE)


def test_dockerfile__copies_what_exists_and_reaches_the_build():
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = set()
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE):
        copied.update(part for part in line.split()[:-1] if not part.startswith("--"))
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_dockerfile__run_lines_are_shell():
    joined = DOCKERFILE.replace("\\\n", " ")
    for command in re.findall(r"^RUN (.*)$", joined, re.MULTILINE):
        subprocess.run(["sh", "-nc", command], check=True)


@pytest.mark.parametrize("item", POOLS["deployments"], ids=lambda item: item["name"])
def test_pool_deployment__flow_settings_and_home(item):
    file, _, function = item["entrypoint"].partition(":")
    tree = ast.parse((ROOT / file).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    config = parse_config(item["parameters"]["config"])
    assert item["name"] == f"{config.name}-pool"
    assert config == load_recipe(ROOT / "recipes" / f"{config.name}.yaml")
    environment = item["work_pool"]["job_variables"]["env"]
    assert environment["CONTA_HOME"] == "{{ $CONTA_HOME }}"
    assert environment["PREFECT_RESULTS_DEFAULT_SERIALIZER"] == "json"
    assert all(isinstance(value, str) for value in environment.values())


def test_pools__the_code_is_where_the_worker_has_it():
    (step,) = POOLS["pull"]
    assert step["prefect.deployments.steps.set_working_directory"] == {
        "directory": "{{ $CONTA_CODE }}"
    }
    for name in ("CONTA_HOME", "CONTA_CODE"):
        assert re.search(rf"\b{name}=", DOCKERFILE)
