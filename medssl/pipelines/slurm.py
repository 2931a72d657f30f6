"""Write the batch file that pretrains under Slurm, on one machine or many, for days if need be.

The job is ended before Slurm's time is over, saves, and queues itself again until it is done.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medssl.atomic import atomic_write
from medssl.config import load_config
from medssl.errors import ConfigError, MachineError
from medssl.pipelines.pretrain import PretrainConfig
from medssl.pipelines.run_folder import command_line

_MINUTES = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")
_WORD = re.compile(r"[\w.,:@%/+=\[\]-]+")
"""What Slurm's own names are made of; anything else could not stand in a comment of the file."""

_RESERVE_MINUTES, _RESERVE_SHARE = 10.0, 0.25
"""Left for starting, preparing and saving: ten minutes, of short jobs a quarter."""

_SIGNAL_SECONDS, _SHUTDOWN_SECONDS = 120, 90
"""Slurm's warning before the end, and how long torchrun then waits for the processes to save."""

_RESTARTS = 3
_HEADER = "#!/bin/bash\n# medssl: a pretraining for Slurm."


@dataclass(frozen=True)
class Job:
    """What to ask of Slurm.

    Attributes:
        nodes: machines.
        gpus_per_node: GPUs of each; 0 computes on CPUs.
        processes_per_node: processes on each; None: one for each GPU, or one.
        cpus_per_task: cores of a machine, for all its processes together.
        time: as Slurm takes it: minutes, hours:minutes:seconds, days-hours and so on.
        partition, account: of Slurm; None leaves them to the site.
        container: an Apptainer image to run in; None runs in the environment of ``sbatch``.
    """

    nodes: int = 1
    gpus_per_node: int = 1
    processes_per_node: int | None = None
    cpus_per_task: int = 8
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    container: str | None = None

    @property
    def processes(self) -> int:
        """Processes on each machine."""
        return self.processes_per_node or max(self.gpus_per_node, 1)


def write(script: str, file: Path) -> None:
    """Write a batch file, over an earlier one if there is one.

    Raises:
        MachineError: the file is something else, or cannot be written.
    """
    if file.exists() and (
        not file.is_file()
        or not file.read_text(encoding="utf-8", errors="replace").startswith(_HEADER)
    ):
        raise MachineError(
            f"{file.name} is there already, and medssl slurm did not write it. Choose another "
            "--file, or remove it."
        )
    atomic_write(file, script, mode=0o755)


def build(config: Path, overrides: Sequence[str], out: Path, job: Job) -> str:
    """Return the batch file.

    Args:
        config: of ``medssl pretrain``.
        overrides: ``key=value``.
        out: the run folder.
        job: what to ask of Slurm.

    Raises:
        ConfigError: the config is wrong, its batch cannot be dealt out to that many processes, or
            Slurm would not understand an option.
    """
    loaded = load_config(config, PretrainConfig, overrides)
    loaded.training.micro_batches(job.nodes * job.processes)
    limit = _max_minutes(job.time)
    if loaded.training.max_minutes is not None:
        limit = min(limit, loaded.training.max_minutes)
    kept = [each for each in overrides if not each.startswith("training.max_minutes=")]
    arguments = [str(config), *kept, f"training.max_minutes={limit:g}", "--out", str(out)]
    return _SCRIPT.format(
        header=_HEADER,
        command=command_line().replace("\n", " "),  # it stands in a comment of one line
        options="\n".join(f"#SBATCH {option}" for option in _options(job, out)),
        threads=max(job.cpus_per_task // job.processes, 1),
        shutdown=_SHUTDOWN_SECONDS,
        run=shlex.quote(str(out)),
        nodes=job.nodes,
        processes=job.processes,
        cpus=job.cpus_per_task,
        restarts=_RESTARTS,
        container=_container(job),
        arguments=shlex.join(arguments),
    )


def _options(job: Job, out: Path) -> list[str]:
    named = {"--time": job.time, "--partition": job.partition, "--account": job.account}
    for name, value in named.items():
        if value is not None and not _WORD.fullmatch(value):
            raise ConfigError(f"{name} {value!r} is nothing that Slurm can take.")
    gpus = [f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []
    return [
        f"--job-name=medssl-{re.sub(r'[^A-Za-z0-9_.-]', '-', out.name) or 'pretrain'}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={job.cpus_per_task}",
        *gpus,
        *(f"{name}={value}" for name, value in named.items() if value is not None),
        f"--signal=B:USR1@{_SIGNAL_SECONDS}",
        "--requeue",
        "--open-mode=append",
        "--output=%x-%j.out",
    ]


def _container(job: Job) -> str:
    if job.container is None:
        return ""
    gpu = "--nv " if job.gpus_per_node else ""
    image = shlex.quote(job.container)
    return f'apptainer exec {gpu}--bind "$PWD" --pwd "$PWD" {image} \\\n  '


def _max_minutes(time: str) -> float:
    """Return how long to train within a time of Slurm's.

    Raises:
        ConfigError: Slurm would not understand it.
    """
    found = _MINUTES.fullmatch(time)
    if not found:
        raise ConfigError(
            f"--time {time!r} is no time of Slurm's. Write minutes, hours:minutes:seconds or "
            "days-hours:minutes:seconds."
        )
    numbers = [int(number) for number in found["rest"].split(":")]
    if found["days"] is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        total = int(found["days"]) * 1440 + hours * 60 + minutes + seconds / 60
    elif len(numbers) == 3:
        total = numbers[0] * 60 + numbers[1] + numbers[2] / 60
    else:  # minutes[:seconds]
        total = numbers[0] + (numbers[1] / 60 if len(numbers) == 2 else 0)
    if total <= 0:
        raise ConfigError(f"--time {time} leaves no time to train.")
    return round(total - min(_RESERVE_MINUTES, _RESERVE_SHARE * total), 2)


_SCRIPT = """{header} Submit it from the folder that its paths start from:
#   sbatch THIS_FILE
# Written by: {command}
{options}

set -u

# Nothing is downloaded, and nothing phones home.
export MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
export OMP_NUM_THREADS={threads}
# How long torchrun waits for its processes to save before it kills them, in seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={shutdown}

run={run}
python=${{MEDSSL_PYTHON:-python}}

# Why the training was told to end, if it was.
# A SIGTERM to srun would become a SIGKILL of the tasks; scancel lets them save.
again=""
signalled=""
stop() {{ signalled=1; scancel --signal=TERM "$SLURM_JOB_ID"; }}
trap 'again=1; stop' USR1  # from Slurm, before the time is over: save, then queue again
trap 'again=""; stop' TERM # the job is cancelled: save, and stay away

# Processes meet on the first machine, at a port of this job's own.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

srun --nodes={nodes} --ntasks-per-node=1 --cpus-per-task={cpus} --kill-on-bad-exit=1 \\
  {container}"$python" -m torch.distributed.run \\
  --nnodes={nodes} --nproc-per-node={processes} --max-restarts={restarts} \\
  --rdzv-backend=c10d --rdzv-endpoint="$first_node:$port" \\
  --rdzv-id="$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}" \\
  -m medssl pretrain {arguments} &
step=$!

wait "$step"
code=$?
while [ -n "$signalled" ]; do # a signal interrupts `wait`
  signalled=""
  wait "$step"
  code=$?
done

# torchrun ends with 0 when training is done, and when training.max_minutes are over.
if grep -q '"finished": "' "$run/provenance.json" 2>/dev/null; then
  exit "$code"
fi
if [ "$code" -eq 0 ] || [ -n "$again" ]; then
  echo "Not finished yet: queued again." >&2
  scontrol requeue "$SLURM_JOB_ID"
  exit
fi
exit "$code"
"""
