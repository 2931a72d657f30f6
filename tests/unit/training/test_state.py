"""The training state: everything comes back, and nothing else is taken for one."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medssl.errors import DataError
from medssl.training.loop import start_state
from medssl.training.network import build_network
from medssl.training.state import TrainingState, discard_states, saved_states
from training import CPU, configured, pretext_task, tiny_backbone


def fresh(task: str = "rotation", seed: int = 0, **settings: Any) -> TrainingState:
    network = build_network(tiny_backbone(2, seed), pretext_task(task, 2), seed=seed)
    return start_state(network, configured(**settings), CPU)


def used(**settings: Any) -> TrainingState:
    """Return a state that has made a step."""
    state = fresh(**settings)
    state.scaler.scale(state.network.backbone(torch.rand(2, 1, 16, 16))[-1].mean()).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.average is not None:
        state.average.update_parameters(state.network)
    state.step, state.micro_batches = 17, 2
    state.notes = {"best": 0.5, "layer": "stem"}
    return state


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_everything_that_moves_comes_back(tmp_path: Path, precision: str, ema_decay: float):
    state = used(precision=precision, ema_decay=ema_decay)
    other = fresh(precision=precision, ema_decay=ema_decay, seed=9)
    state.save(tmp_path)
    assert other.resume(tmp_path, CPU)
    assert (other.step, other.micro_batches) == (17, 2)
    assert other.notes == {"best": 0.5, "layer": "stem"}
    assert other.scaler.state_dict() == state.scaler.state_dict()
    for ours, theirs in ((other.network, state.network), (other.result, state.result)):
        wanted = theirs.state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in ours.state_dict().items())
    assert (state.result is state.network) == (ema_decay == 0)
    assert str(other.optimizer.state_dict()) == str(state.optimizer.state_dict())


def test_a_folder_without_states_leaves_everything_as_it_is(tmp_path: Path):
    state = fresh()
    assert not state.resume(tmp_path, CPU)
    assert not state.resume(tmp_path / "missing", CPU)
    assert state.step == 0


def test_the_two_newest_are_kept_and_named_by_step_and_digest(tmp_path: Path):
    state = used()
    for step in (18, 19, 20):
        state.step = step
        state.save(tmp_path)
    names = [path.name for path in saved_states(tmp_path)]
    assert [name[:24] for name in names] == ["training_state-00000020-", "training_state-00000019-"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    digest = hashlib.sha256((tmp_path / names[0]).read_bytes()).hexdigest()
    assert names[0] == f"training_state-00000020-{digest[:32]}.pt"


def test_saving_the_same_step_again_keeps_the_one_before(tmp_path: Path):
    state = used()
    for step in (18, 19, 19):
        state.step = step
        state.save(tmp_path)
    assert [path.name[15:23] for path in saved_states(tmp_path)] == ["00000019", "00000018"]


def test_states_of_a_finished_training_are_discarded(tmp_path: Path):
    used().save(tmp_path)
    (tmp_path / "contract.json").write_text("{}")
    discard_states(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["contract.json"]


# ----------------------------------------------------------------------------------------- damage


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def text(path: Path) -> None:
    path.write_text("this is no training state")


def nothing(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut off": cut_off,
    "one bit": one_bit,
    "empty": nothing,
    "text": text,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_state_gives_way_to_the_one_before_it(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
):
    state = used()
    state.save(tmp_path)
    state.step = 18
    newest = state.save(tmp_path)
    damage(newest)
    resumed = fresh()
    assert resumed.resume(tmp_path, CPU)
    assert resumed.step == 17
    assert f"{newest.name} is damaged" in caplog.text


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_where_all_are_damaged_nothing_starts_anew_by_itself(
    tmp_path: Path, damage: Callable[[Path], None]
):
    path = used().save(tmp_path)
    damage(path)
    state = fresh()
    with pytest.raises(DataError, match="Delete them to start this training anew") as refused:
        state.resume(tmp_path, CPU)
    assert path.name in str(refused.value)
    assert refused.value.exit_code == 3
    assert state.step == 0


def renamed(path: Path) -> Path:
    """Give a file the name of its content, as if it had been written so."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    return path.rename(path.with_name(f"training_state-00000017-{digest}.pt"))


def change(content: dict[str, Any], name: str) -> Any:
    if name == "a list":
        return [1, 2]
    if name == "without its step":
        del content["step"]
    if name == "another optimizer":
        content["optimizer"]["param_groups"] = content["optimizer"]["param_groups"][:1]
    if name == "an average":
        content["average"] = content["network"]
    return content


@pytest.mark.parametrize(
    "name", ["a list", "without its step", "another optimizer", "an average", "code"]
)
def test_a_whole_file_of_something_else_is_refused(tmp_path: Path, name: str):
    path = used().save(tmp_path)
    if name == "code":
        path.write_bytes(pickle.dumps(Path("anything but tensors"), protocol=2))
    else:
        torch.save(change(torch.load(path, weights_only=True), name), path)
    renamed(path)
    state = fresh()
    with pytest.raises(DataError, match="damaged or belong to another network"):
        state.resume(tmp_path, CPU)
    assert (state.step, state.notes) == (0, {})


def test_the_state_of_another_network_is_refused(tmp_path: Path):
    used().save(tmp_path)
    with pytest.raises(DataError, match="damaged or belong to another network"):
        fresh("inpainting").resume(tmp_path, CPU)
