"""The compose file fits the compose specification and keeps its promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
TRAINERS = ["trainer-cpu", "trainer-gpu"]
OUR_IMAGES = ["mlflow", *TRAINERS]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def check_compose(path: Path) -> subprocess.CompletedProcess[str]:
    # check-jsonschema carries the schema that the Compose Specification publishes.
    module = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    return subprocess.run([*module, str(path)], capture_output=True, text=True, check=False)


def test_compose_file_fits_the_compose_specification() -> None:
    result = check_compose(ROOT / "docker-compose.yml")
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_schema_notices_a_misspelt_key(tmp_path: Path) -> None:
    broken = tmp_path / "docker-compose.yml"
    broken.write_text((ROOT / "docker-compose.yml").read_text().replace("cap_drop:", "capdrop:"))
    assert check_compose(broken).returncode == 1


def test_it_has_a_database_mlflow_and_trainers() -> None:
    assert set(SERVICES) == {"db", "mlflow", *TRAINERS}


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned_by_a_tag(name: str) -> None:
    image = SERVICES[name]["image"]
    assert ":" in image
    assert not image.endswith(":latest")


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_bound_to_this_machine_alone(name: str) -> None:
    ports = SERVICES[name].get("ports", [])
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_only_mlflow_opens_a_port() -> None:
    assert [name for name in SERVICES if "ports" in SERVICES[name]] == ["mlflow"]


@pytest.mark.parametrize("name", SERVICES)
def test_no_service_may_gain_rights(name: str) -> None:
    assert "no-new-privileges:true" in SERVICES[name]["security_opt"]
    assert "privileged" not in SERVICES[name]


@pytest.mark.parametrize("name", OUR_IMAGES)
def test_our_services_run_without_capabilities_on_a_read_only_root(name: str) -> None:
    assert SERVICES[name]["cap_drop"] == ["ALL"]
    assert SERVICES[name]["read_only"] is True


def test_the_password_stands_only_in_a_secret_file() -> None:
    assert COMPOSE["secrets"] == {"db_password": {"file": "./secrets/db_password.txt"}}
    assert SERVICES["db"]["environment"]["POSTGRES_PASSWORD_FILE"] == "/run/secrets/db_password"
    for service in SERVICES.values():
        named = [key for key in service.get("environment", {}) if "PASSWORD" in key]
        assert all(key.endswith("_FILE") for key in named)
    uri = SERVICES["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"]
    assert uri == "postgresql+psycopg://mlflow@db:5432/mlflow"
    assert "secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def test_mlflow_answers_by_its_service_name_and_is_checked_on_an_api_path() -> None:
    hosts = SERVICES["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert "mlflow:5000" in hosts
    assert "*" not in hosts
    check = "\n".join(SERVICES["mlflow"]["healthcheck"]["test"])
    assert "http://mlflow:5000/api/2.0/mlflow/" in check


@pytest.mark.parametrize("name", OUR_IMAGES)
def test_telemetry_is_off(name: str) -> None:
    assert SERVICES[name]["environment"]["MLFLOW_DISABLE_TELEMETRY"] == "true"


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_start_by_profile_and_wait_for_mlflow(name: str) -> None:
    assert SERVICES[name]["profiles"] == [name.removeprefix("trainer-")]
    assert SERVICES[name]["depends_on"]["mlflow"]["condition"] == "service_healthy"


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_cannot_write_scans_nor_reach_the_internet(name: str) -> None:
    mounts = {volume["target"]: volume for volume in SERVICES[name]["volumes"]}
    assert mounts["/scans"]["read_only"] is True
    assert all(COMPOSE["networks"][network]["internal"] for network in SERVICES[name]["networks"])


def test_only_the_gpu_trainer_asks_for_a_device() -> None:
    assert [name for name in SERVICES if "deploy" in SERVICES[name]] == ["trainer-gpu"]


def test_every_named_volume_and_network_is_declared() -> None:
    for service in SERVICES.values():
        assert set(service["networks"]) <= set(COMPOSE["networks"])
        named = {v["source"] for v in service.get("volumes", []) if v["type"] == "volume"}
        assert named <= set(COMPOSE["volumes"])


@pytest.mark.parametrize("name", OUR_IMAGES)
def test_every_build_target_exists_and_ends_as_a_user_without_rights(name: str) -> None:
    target = SERVICES[name]["build"]["target"]
    stage = DOCKERFILE.split(f" AS {target}\n")[1].split("\nFROM ")[0]
    users = [line.split()[1] for line in stage.splitlines() if line.startswith("USER ")]
    assert users == ["medssl"]


def test_docker_installs_locked_packages_only() -> None:
    installs = [line for line in DOCKERFILE.splitlines() if "pip install" in line]
    assert installs
    assert all("--constraint" in line and "requirements.lock" in line for line in installs)


def test_every_variable_of_the_compose_file_is_explained() -> None:
    used = set()
    for part in (ROOT / "docker-compose.yml").read_text().split("${")[1:]:
        used.add(part.split(":-")[0].split("}")[0])
    explained = (ROOT / ".env.example").read_text()
    assert {name for name in used if f"\n{name}=" not in explained} == set()


def test_scans_runs_and_secrets_stay_out_of_the_build() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    assert not {"!data", "!runs", "!secrets", "!.env"} & set(lines)
