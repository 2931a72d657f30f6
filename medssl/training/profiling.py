"""Where the time of a step goes: a trace of a few steps, a table, and one line of advice.

Labels are those that `medssl.training.step` gives to the stretches of a step. On a CPU a part's
time is that of its stretch. On a GPU it is the time in which the device worked on what the stretch
launched; waiting counts only while the device has nothing to do, for hidden waiting costs nothing.
Each instant of a step belongs to one part, so the shares add up.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from medssl.atomic import atomic_write
from medssl.executors.local import available_cores
from medssl.training.settings import TrainingConfig

log = logging.getLogger(__name__)

TRACE_FILE, TABLE_FILE, CSV_FILE = "trace.json", "profile.txt", "profile.csv"

ACTIVE_STEPS, WARM_UP_STEPS, SKIPPED_STEPS = 5, 2, 5
"""Recorded; recorded and thrown away, as the profiler's own start is slow; and left in peace, as
allocators, caches and compilers settle in the first steps."""

_LEAST_STEPS = 4

_STEP = "medssl: step"
WAITING, COPIES, OTHER, IDLE = "waiting for data", "host-to-device copies", "other", "device idle"
PARTS = {
    "medssl: wait for data": WAITING,
    "medssl: copy": COPIES,
    "medssl: augmentation": "augmentation",
    "medssl: puzzle": "puzzle",
    "medssl: forward": "forward",
    "medssl: backward": "backward",
    "medssl: optimizer": "optimizer",
    _STEP: OTHER,
}
_NAMES = [*PARTS.values(), IDLE]
_OUTSIDE = -1

_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_LAUNCHES = {"cuda_runtime", "cuda_driver"}
_KEPT = ("schemaVersion", "displayTimeUnit", "baseTimeNanoseconds", "deviceProperties")

_MUCH_WAITING, _MUCH_COPYING, _MUCH_IDLE, _MUCH_PUZZLING = 0.2, 0.1, 0.3, 0.35
"""Shares from which on a part is what to mend first."""

Events = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Profile:
    """Where the time of some steps went.

    Attributes:
        steps: recorded.
        seconds: of all these steps, by part; they add up to the time of the steps.
    """

    steps: int
    seconds: dict[str, float]

    @property
    def shares(self) -> dict[str, float]:
        """Each part's share of a step; they add up to 1."""
        total = sum(self.seconds.values())
        return {part: seconds / total for part, seconds in self.seconds.items()}

    def rows(self) -> list[tuple[str, float, float]]:
        """Return part, per cent and milliseconds of a step; the per cents add up to 100.0."""
        tenths = _rounded([1000 * share for share in self.shares.values()])
        return [
            (part, tenth / 10, 1000 * seconds / self.steps)
            for tenth, (part, seconds) in zip(tenths, self.seconds.items(), strict=True)
        ]


class Profiler:
    """Records a few steps of a training, and writes what it found; see `profiling`.

    Args:
        folder: receives trace, table and CSV.
        config: of the training.
        device: where it computes.
        steps: still to do.
    """

    def __init__(
        self, folder: Path, config: TrainingConfig, device: torch.device, steps: int
    ) -> None:
        self._folder, self._config, self._device = folder, config, device
        active = min(ACTIVE_STEPS, max(1, steps - WARM_UP_STEPS - 1))
        self._skipped = max(0, min(SKIPPED_STEPS, steps - active - WARM_UP_STEPS))
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=self._skipped, warmup=WARM_UP_STEPS, active=active, repeat=1),
            on_trace_ready=self._keep,
            with_stack=False,  # stacks name the files of this machine
        )
        self._done = 0

    @contextmanager
    def running(self) -> Iterator[Profiler]:
        """Record from here to the end of the block at the latest."""
        self._profiler.start()
        try:
            yield self
        finally:
            self._profiler.on_trace_ready = None  # a training that ends early has no whole profile
            self._profiler.stop()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Take the block as one step."""
        if self._device.type == "cuda" and self._done == self._skipped + WARM_UP_STEPS:
            torch.cuda.synchronize(self._device)  # what came before is no part of the record
        with record_function(_STEP):
            yield
        self._done += 1
        self._profiler.step()

    def _keep(self, profiler: Any) -> None:
        with tempfile.TemporaryDirectory(prefix="medssl-profile-") as place:
            draft = Path(place) / TRACE_FILE
            profiler.export_chrome_trace(str(draft))
            trace = json.loads(draft.read_text(encoding="utf-8"))
        write_profile(self._folder, trace, self._config, self._device)


class Unprofiled:
    """Stands in for a `Profiler` where nothing is recorded."""

    @contextmanager
    def step(self) -> Iterator[None]:
        """Do nothing."""
        yield


@contextmanager
def profiling(
    folder: Path | None, config: TrainingConfig, device: torch.device, steps: int
) -> Iterator[Profiler | Unprofiled]:
    """Profile the steps of a training if its config says so; what is trained stays the same.

    Args:
        folder: receives trace, table and CSV; None: nothing is recorded.
        config: of the training; `TrainingConfig.profile` is obeyed.
        device: where it computes.
        steps: still to do.
    """
    if folder is None or not config.profile:
        yield Unprofiled()
        return
    if steps < _LEAST_STEPS:
        log.warning("a profile needs %d steps; %d are left, and none is made", _LEAST_STEPS, steps)
        yield Unprofiled()
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # it takes a missing GPU for an error
    with Profiler(folder, config, device, steps).running() as profiler:
        yield profiler


def write_profile(
    folder: Path, trace: Mapping[str, Any], config: TrainingConfig, device: torch.device
) -> Profile:
    """Write trace, table and CSV into a folder, and return what the table says."""
    found = parts_of(trace["traceEvents"])
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["part", "percent", "ms_per_step"])
    writer.writerows((part, f"{share:.1f}", f"{ms:.3f}") for part, share, ms in found.rows())
    atomic_write(folder / TRACE_FILE, json.dumps(cleaned(trace)))
    atomic_write(folder / CSV_FILE, table.getvalue())
    atomic_write(folder / TABLE_FILE, table_in_words(found, config, device))
    return found


def parts_of(events: Events) -> Profile:
    """Return where the time of the steps of a trace went.

    Args:
        events: of a trace in Chrome's format: microseconds; stretches of the host in
            ``user_annotation``, work of the device tied to its launch by ``correlation``.
    """
    steps = [event for event in events if _is_stretch(event) and event["name"] == _STEP]
    threads = {(event["pid"], event["tid"]) for event in steps}
    stretches = [
        event for event in events if _is_stretch(event) and (event["pid"], event["tid"]) in threads
    ]
    stretches.sort(key=lambda event: (event["ts"], -event["dur"]))  # the inner ones last
    host = _Line(stretches)
    for event in stretches:
        host.paint(event, _NAMES.index(PARTS[event["name"]]))
    work = [event for event in events if event.get("cat") in _ON_DEVICE]
    if not work:
        return Profile(len(steps), host.seconds(leave_out=IDLE))

    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    line = _Line([*stretches, *work])
    for event in stretches:
        waiting = PARTS[event["name"]] == WAITING
        line.paint(event, _NAMES.index(WAITING if waiting else IDLE))
    copies = [event for event in work if "HtoD" in event["name"]]
    for event in copies:
        if line.touches(event):
            line.paint(event, _NAMES.index(COPIES))
    for event in work:
        if "HtoD" not in event["name"]:
            at = launched.get(event["args"].get("correlation"), float("-inf"))
            line.paint(event, host.at(at))
    return Profile(len(steps), line.seconds())


def cleaned(trace: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trace without what tells of the machine's names, users and folders."""
    events = []
    for event in trace["traceEvents"]:
        if event.get("name") in ("process_name", "process_labels"):
            continue
        kept = {
            name: value
            for name, value in event.get("args", {}).items()
            if not (isinstance(value, str) and ("/" in value or "\\" in value))
        }
        events.append({**event, "args": kept} if "args" in event else event)
    return {**{name: trace[name] for name in _KEPT if name in trace}, "traceEvents": events}


def table_in_words(found: Profile, config: TrainingConfig, device: torch.device) -> str:
    """Return the table and the advice, as text of one screen."""
    each = sum(found.seconds.values()) / found.steps
    title = (
        f"{found.steps} steps of {config.global_batch_size} images on {device.type}, "
        f"{1000 * each:.1f} ms a step (the profiler slows them a little)"
    )
    lines = [
        title,
        "",
        f"{'part':24}{'share':>8}{'ms a step':>12}",
        *(f"{part:24}{share:>6.1f} %{ms:>12.2f}" for part, share, ms in found.rows()),
        f"{'sum':24}{100:>6.1f} %{1000 * each:>12.2f}",
        "",
        advice(found.shares, config, device.type, available_cores()),
    ]
    return "\n".join(lines) + "\n"


def advice(shares: Mapping[str, float], config: TrainingConfig, device: str, cores: int) -> str:
    """Return in a line what bounds a run and what to change."""
    waiting, copies, idle = (shares.get(part, 0.0) for part in (WAITING, COPIES, IDLE))
    making = shares["augmentation"] + shares["puzzle"]
    if waiting >= _MUCH_WAITING:
        faster = _read_faster(config, cores)
        return f"Reading bounds this run ({waiting:.0%} of a step waits). {faster}"
    if copies >= _MUCH_COPYING:
        return (
            f"Copies to the device bound this run ({copies:.0%}). Keep the scans there "
            "(training.resident), or make the crops smaller."
        )
    if idle >= _MUCH_IDLE:
        compiled = "" if config.compile else ", or set training.compile=true"
        return (
            f"The device idles {idle:.0%} of a step: the host cannot launch its work fast enough. "
            f"Raise training.micro_batch_size or global_batch_size{compiled}."
        )
    if making >= _MUCH_PUZZLING:
        return (
            f"Making puzzles bounds this run (augmentation {shares['augmentation']:.0%}, puzzle "
            f"{shares['puzzle']:.0%}). Vary less (augmentation), or make fewer views of an image."
        )
    network = sum(shares[part] for part in ("forward", "backward", "optimizer"))
    return (
        f"The network bounds this run ({network:.0%} of a step). {_compute_faster(config, device)}"
    )


def _read_faster(config: TrainingConfig, cores: int) -> str:
    if config.num_workers < cores - 1:
        return (
            f"Raise training.num_workers (now {config.num_workers}; {cores} cores are usable), or "
            "keep the scans on the device (training.resident)."
        )
    return (
        f"{config.num_workers} workers read on {cores} cores already: keep the scans on the device "
        "(training.resident), or use a faster disk."
    )


def _compute_faster(config: TrainingConfig, device: str) -> str:
    if config.recompute:
        return "training.recompute=false is faster, if the memory allows it."
    if device != "cuda":
        if config.precision != "fp32":
            return "training.precision=fp32 is faster on a CPU; a GPU is faster still."
        return "A GPU, a smaller backbone or smaller crops make it faster; more workers do not."
    if config.precision == "fp32":
        return "Set training.precision=bf16."
    if not config.channels_last:
        return "Set training.channels_last=true."
    if not config.compile:
        return "Set training.compile=true."
    return "Nothing outside it is left to gain; more GPUs (torchrun) are."


class _Line:
    """A line of time, cut at every edge; each stretch carries the number of a part."""

    def __init__(self, events: Events) -> None:
        edges = [edge for event in events for edge in _span(event)]
        self._edges = np.unique(np.array(edges, dtype=np.float64))
        self._parts = np.full(max(len(self._edges) - 1, 0), _OUTSIDE)

    def paint(self, event: Mapping[str, Any], part: int) -> None:
        """Give an event's stretch to a part."""
        self._parts[self._inside(event)] = part

    def touches(self, event: Mapping[str, Any]) -> bool:
        """Return whether any of an event's stretch has a part."""
        return bool((self._parts[self._inside(event)] != _OUTSIDE).any())

    def at(self, time: float) -> int:
        """Return the part of an instant."""
        index = int(np.searchsorted(self._edges, time, side="right")) - 1
        return int(self._parts[index]) if 0 <= index < len(self._parts) else _OUTSIDE

    def seconds(self, leave_out: str | None = None) -> dict[str, float]:
        """Return the seconds of every part."""
        lengths = np.diff(self._edges) / 1e6
        return {
            name: float(lengths[self._parts == number].sum())
            for number, name in enumerate(_NAMES)
            if name != leave_out
        }

    def _inside(self, event: Mapping[str, Any]) -> slice:
        start, end = np.searchsorted(self._edges, _span(event))
        return slice(int(start), int(end))


def _span(event: Mapping[str, Any]) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def _is_stretch(event: Mapping[str, Any]) -> bool:
    return event.get("cat") == "user_annotation" and event.get("name") in PARTS


def _rounded(values: Sequence[float]) -> list[int]:
    """Round to whole numbers whose sum is the rounded sum: the largest rests are rounded up."""
    floors = [int(value) for value in values]
    missing = round(sum(values)) - sum(floors)
    by_rest = sorted(range(len(values)), key=lambda i: floors[i] - values[i])
    for i in by_rest[:missing]:
        floors[i] += 1
    return floors
