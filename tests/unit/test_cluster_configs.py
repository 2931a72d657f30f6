"""The Kubernetes files: right where no cluster is needed to see it, and as closed as the rest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import parse_args

from medssl.cli import cli
from medssl.config import load_config
from medssl.pipelines.pretrain import PretrainConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "cluster"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
NAMES = ["pytorchjob", "trainjob"]
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text()))


def pod(name: str) -> dict[str, Any]:
    first = documents(name)[0]["spec"]
    if name == "pytorchjob":
        return first["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    (job,) = first["template"]["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]


def container(name: str) -> dict[str, Any]:
    """Return the container as it runs: a TrainJob's trainer overrides that of its runtime."""
    (found,) = pod(name)["containers"]
    if name == "pytorchjob":
        return found
    trainer = documents(name)[1]["spec"]["trainer"]
    named = {key: trainer[key] for key in ("command", "args")}
    return {**found, **named, "resources": trainer["resourcesPerNode"]}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("pytorchjob", [("kubeflow.org/v1", "PyTorchJob")]),
        (
            "trainjob",
            [
                ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"),
                ("trainer.kubeflow.org/v1alpha1", "TrainJob"),
            ],
        ),
    ],
)
def test_each_file_says_what_it_is_and_how_it_is_applied(name: str, kinds: list[tuple[str, str]]):
    found = documents(name)
    assert [(each["apiVersion"], each["kind"]) for each in found] == kinds
    assert all(LABEL.fullmatch(each["metadata"]["name"]) for each in found)
    header = (FOLDER / f"{name}.yaml").read_text().split("\napiVersion")[0]
    assert f"kubectl apply --filename configs/cluster/{name}.yaml" in header


def test_every_file_of_the_folder_is_tested():
    assert sorted(path.stem for path in FOLDER.iterdir()) == NAMES


def test_operators_find_the_container_by_its_name():
    assert container("pytorchjob")["name"] == "pytorch"
    assert container("trainjob")["name"] == "node"


def test_the_job_names_its_runtime():
    runtime, job = documents("trainjob")
    assert job["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org", "kind": runtime["kind"],
        "name": runtime["metadata"]["name"],
    }  # fmt: skip
    assert runtime["metadata"]["labels"] == {"trainer.kubeflow.org/framework": "torch"}
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    labels = replicated["template"]["metadata"]["labels"]
    assert labels == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_a_command_that_there_is_on_a_config_that_comes_along(name: str):
    found = container(name)
    assert found["command"] == ["python", "-m", "torch.distributed.run"]
    arguments = parse_args(found["args"])  # torchrun's own
    assert (arguments.module, arguments.training_script) == (True, "medssl")
    command, config, *rest = arguments.training_script_args
    assert command == "pretrain"
    context = cli.commands[command].make_context(command, [config, *rest], resilient_parsing=False)
    overrides = context.params["overrides"]
    loaded = load_config(ROOT / config, PretrainConfig, overrides)
    first = documents(name)[0]["spec"]
    replicas = (
        first["pytorchReplicaSpecs"]["Worker"]["replicas"]
        if name == "pytorchjob"
        else first["mlPolicy"]["numNodes"]
    )
    loaded.training.micro_batches(replicas * int(found["resources"]["limits"]["nvidia.com/gpu"]))
    work = {mount["mountPath"] for mount in found["volumeMounts"] if not mount.get("readOnly")}
    assert any(str(loaded.index).startswith(path) for path in work)
    assert any(str(context.params["out"]).startswith(path) for path in work)


def test_there_are_as_many_processes_as_gpus():
    spec = documents("pytorchjob")[0]["spec"]
    assert spec["nprocPerNode"] == container("pytorchjob")["resources"]["limits"]["nvidia.com/gpu"]
    policy, worker = spec["elasticPolicy"], spec["pytorchReplicaSpecs"]["Worker"]
    assert policy["minReplicas"] == policy["maxReplicas"] == worker["replicas"]
    assert policy["rdzvBackend"] == "c10d"
    runtime, job = documents("trainjob")
    assert runtime["spec"]["mlPolicy"]["numNodes"] == job["spec"]["trainer"]["numNodes"]
    assert runtime["spec"]["mlPolicy"]["torch"]["numProcPerNode"] == "auto"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_asked_for_is_what_is_given(name: str):
    resources = container(name)["resources"]
    assert resources["requests"] == resources["limits"]  # no pod is thrown out for using too much
    assert set(resources["limits"]) == {"cpu", "memory", "nvidia.com/gpu"}
    assert all(isinstance(value, str) for value in resources["limits"].values())


@pytest.mark.parametrize("name", NAMES)
def test_scans_are_read_only_and_memory_is_shared(name: str):
    volumes = {volume["name"]: volume for volume in pod(name)["volumes"]}
    mounts = {mount["name"]: mount for mount in container(name)["volumeMounts"]}
    assert set(volumes) == set(mounts)
    assert volumes["scans"]["persistentVolumeClaim"]["readOnly"] is True
    assert mounts["scans"]["readOnly"] is True
    assert mounts["shm"]["mountPath"] == "/dev/shm"
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert "sizeLimit" in volumes["shm"]["emptyDir"]
    assert not any("hostPath" in volume for volume in volumes.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_pod_may_gain_no_rights(name: str):
    found, inner = pod(name), container(name)["securityContext"]
    assert found["automountServiceAccountToken"] is False
    assert found["securityContext"]["runAsNonRoot"] is True
    # Kubernetes cannot tell that a user given by name is not root.
    assert f"--uid {found['securityContext']['runAsUser']} " in DOCKERFILE
    assert found["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert inner == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert not found.get("hostNetwork")
    assert "/tmp" in {mount["mountPath"] for mount in container(name)["volumeMounts"]}


@pytest.mark.parametrize("name", NAMES)
def test_there_is_time_to_save_before_the_pod_ends(name: str):
    values = {each["name"]: each["value"] for each in container(name)["env"]}
    assert all(isinstance(value, str) for value in values.values())
    patience = int(values["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert 60 <= patience < pod(name)["terminationGracePeriodSeconds"]
    assert values["MLFLOW_DISABLE_TELEMETRY"] == "true"


@pytest.mark.parametrize("name", NAMES)
def test_the_image_is_the_trainers(name: str):
    assert container(name)["image"].endswith("/" + COMPOSE["x-trainer"]["image"])
