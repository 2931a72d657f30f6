"""The training state: everything comes back, and nothing else is taken for one."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from medssl.errors import DataError
from medssl.training.loop import build_network, start_state
from medssl.training.state import TrainingState
from training import CPU, configured, pretext_task, tiny_backbone


def fresh(task: str = "rotation", precision: str = "fp32", seed: int = 0) -> TrainingState:
    network = build_network(tiny_backbone(2, seed), pretext_task(task, 2), seed=seed)
    return start_state(network, configured(precision=precision), CPU)


def used(precision: str = "fp32") -> TrainingState:
    """Return a state that has made a step."""
    state = fresh(precision=precision)
    state.scaler.scale(state.network.backbone(torch.rand(2, 1, 16, 16))[-1].mean()).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.step, state.notes = 17, {"best": 0.5, "layer": "stem"}
    return state


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_everything_that_moves_comes_back(tmp_path: Path, precision: str):
    state, other = used(precision), fresh(precision=precision, seed=9)
    state.save(tmp_path / "state.pt")
    other.load(tmp_path / "state.pt", CPU)
    assert (other.step, other.notes) == (17, {"best": 0.5, "layer": "stem"})
    assert other.scaler.state_dict() == state.scaler.state_dict()
    ours, theirs = other.network.state_dict(), state.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert str(other.optimizer.state_dict()) == str(state.optimizer.state_dict())


def test_saving_leaves_one_file_and_replaces_the_one_before(tmp_path: Path):
    state = used()
    state.save(tmp_path / "state.pt")
    state.step = 18
    state.save(tmp_path / "state.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    state.load(tmp_path / "state.pt", CPU)
    assert state.step == 18


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def text(path: Path) -> None:
    path.write_text("this is no training state")


def code(path: Path) -> None:
    path.write_bytes(pickle.dumps(Path("anything but tensors"), protocol=2))


def missing(path: Path) -> None:
    path.unlink()


def without_step(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    del content["step"]
    torch.save(content, path)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut off": cut_off,
    "empty": lambda path: path.write_bytes(b"") and None,
    "text": text,
    "a pickle of another kind": code,
    "missing": missing,
    "a list": lambda path: torch.save([1, 2], path),
    "without its step": without_step,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_file_is_refused_with_a_remedy(tmp_path: Path, damage: Callable[[Path], None]):
    path = tmp_path / "training_state.pt"
    used().save(path)
    damage(path)
    state = fresh()
    with pytest.raises(DataError) as refused:
        state.load(path, CPU)
    assert str(refused.value).startswith(
        "the training state training_state.pt cannot be taken up ("
    )
    assert str(refused.value).endswith(
        "): it is damaged or belongs to another network. Delete it to start this training anew."
    )
    assert refused.value.exit_code == 3
    assert state.step == 0


def test_the_state_of_another_network_is_refused(tmp_path: Path):
    used().save(tmp_path / "state.pt")
    with pytest.raises(DataError, match=r"\(RuntimeError\): it is damaged or belongs to another"):
        fresh("inpainting").load(tmp_path / "state.pt", CPU)


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path):
    used().save(tmp_path / "state.pt")
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    content["optimizer"]["param_groups"] = content["optimizer"]["param_groups"][:1]
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(DataError, match=r"\(ValueError\): it is damaged or belongs to another"):
        fresh().load(tmp_path / "state.pt", CPU)
