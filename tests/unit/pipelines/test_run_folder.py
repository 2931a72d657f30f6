"""The run folder: one configuration, and what happened to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from medssl.config import Config
from medssl.errors import ConfigError, DataError, MachineError
from medssl.pipelines.run_folder import (
    RunFolder,
    check_same_config,
    command_line,
    keep_comparison,
)


class Training(Config):
    steps: int = 10
    rate: float = 0.1
    max_minutes: float | None = None


class Small(Config):
    name: str = "small"
    seed: int = 0
    training: Training = Training()


def provenance(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "provenance.json").read_text())


def test_the_folder_keeps_the_resolved_config(tmp_path: Path):
    RunFolder(tmp_path / "run", Small(seed=3), "medssl study")
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert Small.model_validate(kept) == Small(seed=3)
    assert kept["training"] == {"steps": 10, "rate": 0.1, "max_minutes": None}


def test_provenance_says_what_ran_and_on_what(tmp_path: Path):
    folder = RunFolder(tmp_path, Small(), "medssl study my.yaml")
    found = provenance(tmp_path)
    assert found["command"] == "medssl study my.yaml"
    assert found["config_digest"] == Small().digest()
    assert found["versions"]["torch"]
    assert found["machine"]
    assert found["finished"] is None
    folder.note(store_digest="abc")
    folder.finish()
    found = provenance(tmp_path)
    assert found["store_digest"] == "abc"
    assert found["finished"] >= found["started"]


def test_restarts_are_counted_and_the_first_start_is_kept(tmp_path: Path):
    starts = []
    for _ in range(3):
        RunFolder(tmp_path, Small(), "medssl study")
        starts.append((provenance(tmp_path)["restarts"], provenance(tmp_path)["started"]))
    assert [number for number, _ in starts] == [0, 1, 2]
    assert len({moment for _, moment in starts}) == 1


def test_what_was_loaded_into_each_init_survives_a_restart(tmp_path: Path):
    RunFolder(tmp_path, Small(), "medssl study").note_inits({"imagenet": {"loaded": 3}})
    RunFolder(tmp_path, Small(), "medssl study").note_inits({"random": {"loaded": 0}})
    assert provenance(tmp_path)["inits"] == {"imagenet": {"loaded": 3}, "random": {"loaded": 0}}


def test_a_torn_provenance_does_not_stop_a_run(tmp_path: Path):
    RunFolder(tmp_path, Small(), "medssl study")
    (tmp_path / "provenance.json").write_text('{"started": ')
    RunFolder(tmp_path, Small(), "medssl study")
    assert provenance(tmp_path)["restarts"] == 0


def test_another_config_is_refused_with_what_changed_and_nothing_is_written(tmp_path: Path):
    out = tmp_path / "first"
    RunFolder(out, Small(), "medssl study")
    (out / "predictions.parquet").write_bytes(b"results")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError) as refused:
        RunFolder(out, Small(seed=1, training=Training(steps=20)), "medssl study")
    assert str(refused.value) == (
        "the run folder 'first' holds a run of another configuration: seed was 0, is 1, "
        "training.steps was 10, is 20. Choose another --out, or delete that folder."
    )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_run_goes_on_with_another_time_limit(tmp_path: Path):
    RunFolder(tmp_path, Small(), "medssl study").finish()
    (tmp_path / "checkpoints").mkdir()
    longer = Small(training=Training(max_minutes=90))
    RunFolder(tmp_path, longer, "medssl study", resume=True)
    assert provenance(tmp_path)["restarts"] == 1  # still the same run
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["training"]["max_minutes"] == 90
    other = Small(training=Training(max_minutes=90, steps=11))
    with pytest.raises(ConfigError, match=r"training\.steps was 10, is 11\. Choose"):
        RunFolder(tmp_path, other, "medssl study")


@pytest.mark.parametrize("result", ["checkpoints", "cells"])
def test_results_of_any_kind_belong_to_their_config(tmp_path: Path, result: str):
    RunFolder(tmp_path, Small(), "medssl study")
    (tmp_path / result).mkdir()
    with pytest.raises(ConfigError, match="seed was 0, is 1"):
        RunFolder(tmp_path, Small(seed=1), "medssl study")


def test_a_folder_without_results_may_be_taken_over_by_a_mended_config(tmp_path: Path):
    RunFolder(tmp_path, Small(), "medssl study").note_inits({"imagenet": {}})
    RunFolder(tmp_path, Small(seed=1), "medssl study")
    found = provenance(tmp_path)
    assert (found["restarts"], found["inits"]) == (0, {})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 1


def test_resuming_takes_no_other_config_even_without_results(tmp_path: Path):
    RunFolder(tmp_path, Small(), "medssl study")
    with pytest.raises(ConfigError, match="seed was 0, is 1"):
        RunFolder(tmp_path, Small(seed=1), "medssl study", resume=True)


def test_a_run_begun_before_a_setting_existed_goes_on(tmp_path: Path):
    RunFolder(tmp_path, Small(), "medssl study")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("name: small\nseed: 0\ntraining: {steps: 10}\n")
    check_same_config(tmp_path, Small(), resume=True)
    with pytest.raises(ConfigError, match=r"training\.rate was 0\.1, is 0\.2"):
        check_same_config(tmp_path, Small(training=Training(rate=0.2)), resume=True)


def test_how_to_read_and_when_to_pause_may_change_while_a_run_goes_on(tmp_path: Path):
    class Reading(Config):
        num_workers: int = 0
        max_minutes: float | None = None
        profile: bool = False
        steps: int = 10

    RunFolder(tmp_path, Reading(), "medssl pretrain")
    (tmp_path / "checkpoints").mkdir()
    check_same_config(tmp_path, Reading(num_workers=4, max_minutes=5, profile=True), resume=True)
    with pytest.raises(ConfigError, match="steps was 10, is 20"):
        check_same_config(tmp_path, Reading(steps=20), resume=True)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("")
    with pytest.raises(MachineError) as refused:
        check_same_config(tmp_path / "run", Small(), resume=False)
    assert str(refused.value) == "'run' is a file, and a run needs a folder. Choose another --out."


@pytest.mark.parametrize("content", ["{unclosed", "", "only words", "\x00"])
def test_a_config_that_cannot_be_read_is_called_so(tmp_path: Path, content: str):
    (tmp_path / "config.yaml").write_text(content)
    (tmp_path / "cells").mkdir()
    with pytest.raises(ConfigError) as refused:
        check_same_config(tmp_path, Small(), resume=False)
    assert "configuration: its config.yaml is not readable. Choose another" in str(refused.value)


def test_resuming_needs_a_run(tmp_path: Path):
    with pytest.raises(ConfigError) as refused:
        check_same_config(tmp_path / "empty", Small(), resume=True)
    assert str(refused.value) == (
        "there is no run to resume in 'empty'. Leave out --resume to start one."
    )
    assert not (tmp_path / "empty").exists()


def test_resuming_takes_the_same_config(tmp_path: Path):
    RunFolder(tmp_path, Small(), "medssl study")
    RunFolder(tmp_path, Small(), "medssl study", resume=True)
    assert provenance(tmp_path)["restarts"] == 1


def test_the_command_line_leaves_out_where_the_program_lies(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["/opt/venv/bin/medssl", "study", "my study.yaml", "seed=1"])
    assert command_line() == "medssl study 'my study.yaml' seed=1"


def test_a_run_is_held_to_the_data_it_was_started_on(tmp_path: Path):
    RunFolder(tmp_path, Small(), "medssl").pin_data({"index": "a", "store": "b"})
    RunFolder(tmp_path, Small(), "medssl").pin_data({"index": "a", "store": "b"})
    again = RunFolder(tmp_path, Small(), "medssl")
    with pytest.raises(DataError, match=r"the data have changed .* \(store\)"):
        again.pin_data({"index": "a", "store": "c"})
    assert provenance(tmp_path)["data"] == {"index": "a", "store": "b"}


def test_the_command_line_leaves_out_folders_of_absolute_paths(monkeypatch: pytest.MonkeyPatch):
    said = [
        "medssl",
        "study",
        "/home/jdoe/our.yaml",
        "index.folder=/archive/DOE_JANE/ct",
        "--out=~/r",
    ]
    monkeypatch.setattr("sys.argv", said)
    assert command_line() == "medssl study our.yaml index.folder=ct --out=r"


def test_a_comparison_names_no_folder_that_its_runs_lie_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "DOE_JOHN" / "ours"
    run.mkdir(parents=True)
    (run / "predictions.parquet").touch()
    words = ["medssl", "compare", "DOE_JOHN/ours", "--out", "../DOE_JOHN/both"]
    monkeypatch.setattr("sys.argv", words)
    keep_comparison(tmp_path / "both", [run], Small(), {})
    found = provenance(tmp_path / "both")
    assert found["command"] == "medssl compare ours --out both"
    assert "DOE" not in json.dumps(found)
