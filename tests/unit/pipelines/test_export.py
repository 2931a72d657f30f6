from __future__ import annotations

import json
import re
import runpy
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from exports import MONAI_2D, MONAI_3D, PATIENT_KEY, make_checkpoint
from medssl.cli import cli
from medssl.errors import ConfigError, WeightsError
from medssl.models.checkpoints import load_backbone
from medssl.models.export import EXPORTS
from medssl.pipelines.export import describe, plan, run

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Return the run folder of a study with one pretrained init, its results and its data."""
    folder = tmp_path / "ours"
    make_checkpoint(folder / "checkpoints" / "inpainting", MONAI_3D)
    (folder / "config.yaml").write_text("preprocessing: {spacing_mm: [1.0, 1.0, 2.0]}\n")
    data = {"dataset": "hippocampus", "licence": "CC-BY-SA-4.0", "synthetic": False,
            "modalities": {"MR": 12}}  # fmt: skip
    (folder / "data.json").write_text(json.dumps(data))
    row = {
        "init": "inpainting", "task": "segmentation", "protocol": "fine_tune", "selected": True,
        "label_fraction": 0.5, "num_labelled_patients": 10, "metric": "dice", "value": 0.8123,
        "ci_low": 0.79, "ci_high": 0.83, "num_patients": 30,
    }  # fmt: skip
    others = [{**row, "init": "imagenet", "value": 0.5}, {**row, "selected": False, "value": 0.6}]
    pd.DataFrame([row, *others]).to_csv(folder / "results.csv", index=False)
    compared = {**row, "reference": "imagenet", "effect": 0.021, "ci_low": 0.01, "ci_high": 0.03}
    pd.DataFrame([compared]).to_csv(folder / "comparisons.csv", index=False)
    return folder


@pytest.fixture
def checkpoint(run_folder: Path) -> Path:
    return run_folder / "checkpoints" / "inpainting"


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(cli, ["export", *map(str, arguments)], catch_exceptions=True)


def test_an_export_holds_files_card_contract_and_facts(checkpoint: Path, tmp_path: Path) -> None:
    exported = run(checkpoint, ["state_dict"], tmp_path / "out", licence="CC-BY-4.0")
    files = {path.name for path in exported.folder.iterdir()}
    assert files == {"MODEL_CARD.md", "contract.json", "export.json", "monai_resnet10.safetensors"}
    facts = json.loads((exported.folder / "export.json").read_text())
    assert facts["outputs"]["embedding"] == {"channels": 32}
    assert facts["formats"]["state_dict"]["largest_difference"] < 1e-4
    assert "state_dict: equal to the backbone within" in describe(exported)[0]


def test_the_card_tells_data_results_and_licence_and_names_nobody(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = run(checkpoint, ["state_dict"], tmp_path / "out", licence="CC-BY-4.0").folder
    card = (out / "MODEL_CARD.md").read_text()
    assert "Trained on 1 patients, 2 scans, of the data set hippocampus." in card
    assert "| segmentation | fine_tune | 10 | dice | 0.812 | 0.790 to 0.830 |" in card
    assert "+0.021 [+0.010, +0.030] from imagenet" in card
    assert "0.500" not in card  # another init's row
    assert "| Licence of the weights | CC-BY-4.0 |" in card
    assert "Licence of the data: CC-BY-SA-4.0." in card
    assert "| Spacing (mm, along X, Y, Z) | 1.0 x 1.0 x 2.0 |" in card
    for file in out.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert PATIENT_KEY.encode() not in content, file.name
        assert str(tmp_path).encode() not in content, file.name
    assert json.loads((out / "contract.json").read_text())["num_patients"] == 1


def test_a_run_without_results_says_so(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "run" / "checkpoints" / "backbone", MONAI_3D)
    card = (run(source, ["state_dict"], tmp_path / "out").folder / "MODEL_CARD.md").read_text()
    assert "None: no downstream task was evaluated" in card
    assert "| Licence of the weights | not stated |" in card


def test_an_export_is_not_overwritten_without_being_told(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(checkpoint, ["state_dict"], out)
    (out / "old").touch()
    with pytest.raises(ConfigError, match="already holds an export. Give --overwrite"):
        run(checkpoint, ["state_dict"], out)
    run(checkpoint, ["state_dict"], out, overwrite=True)
    assert not (out / "old").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_is_no_export_is_never_replaced(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years")
    with pytest.raises(ConfigError, match="'thesis' exists and is no export"):
        run(checkpoint, ["state_dict"], tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years"


def test_a_link_is_not_written_through(checkpoint: Path, tmp_path: Path) -> None:
    out = run(checkpoint, ["state_dict"], tmp_path / "out").folder
    (tmp_path / "link").symlink_to(out)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"'link' is a symbolic link, .* Give the folder itself"):
        run(checkpoint, ["state_dict"], tmp_path / "link", overwrite=True)
    assert sorted(tmp_path.iterdir()) == before


def test_others_may_read_an_export(checkpoint: Path, tmp_path: Path) -> None:
    out = run(checkpoint, ["state_dict"], tmp_path / "out").folder
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", EXPORTS.names())
def test_no_file_of_an_export_names_a_folder_of_this_machine(
    checkpoint: Path, tmp_path: Path, name: str
) -> None:
    out = run(checkpoint, [name], tmp_path / "out").folder
    found = {}
    for path in (path for path in out.rglob("*") if path.is_file()):
        found[path.name] = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                found |= {part: archive.read(part) for part in archive.namelist()}
    folders = [str(place).encode() for place in (tmp_path, ROOT, Path(torch.__file__).parents[1])]
    assert [part for part, content in found.items() if any(f in content for f in folders)] == []


def test_nothing_is_left_where_a_format_turns_out_wrong(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = EXPORTS.load("state_dict")

    def wrong(self: Any, subject: Any, folder: Path) -> Any:
        (folder / "half").touch()
        raise WeightsError("monai_resnet10.safetensors is wrong and was not kept")

    monkeypatch.setattr(member, "write", wrong)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(WeightsError, match="is wrong and was not kept"):
        run(checkpoint, ["state_dict"], tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_study_with_checkpoints_of_several_inits_asks_for_one(run_folder: Path) -> None:
    with pytest.raises(WeightsError, match="Name one: ours/checkpoints/inpainting"):
        plan(run_folder, ["state_dict"], run_folder / "out")


def test_old_contracts_take_the_preparation_of_the_runs_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    intensity = {"kind": "auto", "lower": 0.5, "upper": 99.5, "window_hu": [-1000.0, 1000.0]}
    source = make_checkpoint(
        folder / "checkpoints" / "backbone", MONAI_3D, preprocessing=None, intensity=intensity
    )
    config = folder / "config.yaml"
    config.write_text("preprocessing: {spacing_mm: [1.0, 1.0, 2.0]}\n")
    assert (
        "bundle/models/model.pt2" in plan(source, ["bundle"], tmp_path / "o", values="hu")["files"]
    )
    config.write_text("preprocessing: {spacing_mm: [1.0, 1.0, 1.0]}\n")
    with pytest.raises(WeightsError, match="spacing_mm: found .*2.0.* wanted"):
        plan(source, ["bundle"], tmp_path / "out", values="hu")
    config.unlink()
    with pytest.raises(ConfigError, match="Export from the run folder"):
        plan(source, ["bundle"], tmp_path / "out", values="hu")


def test_the_command_plans_and_exports(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = invoke(checkpoint, "--format", "state_dict", "--out", out, "--dry-run", "--json")
    assert planned.exit_code == 0, planned.output
    assert "monai_resnet10.safetensors" in json.loads(planned.stdout)["files"]
    assert not out.exists()
    done = invoke(checkpoint, "--format", "state_dict", "--out", out, "--json")
    assert json.loads(done.stdout)["formats"]["state_dict"]["model"] == "resnet10"
    backbone, _ = load_backbone(checkpoint)
    state = load_file(out / "monai_resnet10.safetensors")
    assert torch.equal(state["conv1.weight"], backbone.state_dict()["net.conv1.weight"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "onxn"), "there is no export format 'onxn'. Did you mean 'onnx'?"),
        (("--format", "program", "--image-size", "64,x"), "--image-size takes numbers"),
        (("--format", "program", "--image-size", "64,64"), "must hold 3 numbers of voxels"),
    ],
)
def test_the_command_explains_what_it_does_not_take(
    checkpoint: Path, arguments: tuple[str, ...], message: str
) -> None:
    error = invoke(checkpoint, *arguments, "--dry-run").exception
    assert isinstance(error, ConfigError)
    assert message in str(error)


def test_every_format_describes_itself() -> None:
    assert EXPORTS.names() == ["bundle", "onnx", "program", "state_dict"]
    assert all(EXPORTS.load(name).description for name in EXPORTS.names())


def snippets() -> dict[str, str]:
    """Return the Python of the README's section on exports, by the heading before each."""
    text = (ROOT / "README.md").read_text().partition("## Use the weights elsewhere")[2]
    section = text.partition("\n## ")[0]
    return dict(re.findall(r"\*\*(.+?)\*\*[^`]*?```python\n(.+?)```", section, re.DOTALL))


@pytest.mark.parametrize("name", ["Features", "Classification", "Segmentation with MONAI"])
def test_the_readmes_snippets_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path / "runs" / "ours" / "checkpoints" / "inpainting", MONAI_2D)
    monkeypatch.chdir(tmp_path)
    images = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    (tmp_path / "use.py").write_text(snippets()[name])
    made = runpy.run_path("use.py", init_globals={"images": images})
    shapes = {"Features": ("vectors", (2, 32)), "Classification": ("scores", (2, 3)),
              "Segmentation with MONAI": ("scores", (2, 2, 64, 64))}  # fmt: skip
    variable, shape = shapes[name]
    assert tuple(made[variable].shape) == shape
    if name != "Features":  # it is there to be trained: gradients reach the backbone
        made[variable].sum().backward()
        assert all(p.grad is not None for p in made["backbone"].parameters())
