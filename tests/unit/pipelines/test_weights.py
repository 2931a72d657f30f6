"""The table of published weights, fetching and verifying, through the command line."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save

from medssl.cli import cli, main
from medssl.errors import ConfigError, MachineError, WeightsError
from medssl.models.backbones import BACKBONES
from medssl.models.backbones.base import ImagenetWeights
from medssl.models.backbones.torchvision import TorchvisionBackbone
from medssl.models.inits._published import local_name
from medssl.pipelines import weights as pipeline

CONTENT = save({"layer.weight": torch.zeros(2)})
DIGEST = hashlib.sha256(CONTENT).hexdigest()
NAME = f"resnet18-{DIGEST[:8]}.pth"
HUB = "https://huggingface.co/timm/resnet34.a1/resolve/main/model.safetensors"
HUB_NAME = "timm--resnet34.a1--model.safetensors"


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Publish two files on a site that is a folder; this machine's caches are empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    site = tmp_path / "site"
    (site / "timm/resnet34.a1/resolve/main").mkdir(parents=True)
    monkeypatch.setenv("HF_ENDPOINT", site.as_uri())
    (site / NAME).write_bytes(CONTENT)
    (site / "timm/resnet34.a1/resolve/main/model.safetensors").write_bytes(CONTENT)
    published = {
        "resnet18": ImagenetWeights(NAME, DIGEST[:8], (site / NAME).as_uri(), licence="MIT"),
        "resnet34": ImagenetWeights("model.safetensors", None, HUB),
    }
    monkeypatch.setattr(TorchvisionBackbone, "imagenet", published)
    return site


def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def answer(*arguments: str | Path) -> Any:
    words = ["weights", *map(str, arguments), "--json"]
    return json.loads(CliRunner().invoke(cli, words, catch_exceptions=False).output)


def code_of(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["medssl", "weights", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


# -------------------------------------------------------------------------------------- the table


def test_the_table_names_every_declared_file_and_how_to_get_it(tmp_path):
    rows = {row["backbone"]: row for row in answer("list")}
    declared = {
        f"{family}:{variant}" for family in BACKBONES for variant in BACKBONES.load(family).imagenet
    }
    assert set(rows) == declared
    row = rows["torchvision:resnet18"]
    assert row["file"] == NAME
    assert row["sha256"] == DIGEST[:8]
    assert row["licence"] == "MIT"
    assert row["place"] is None
    assert row["remedy"] == "medssl weights fetch torchvision:resnet18"
    (cache(tmp_path) / NAME).write_bytes(CONTENT)
    found = {row["backbone"]: row for row in answer("list")}["torchvision:resnet18"]
    assert found["place"] == "torch hub cache"
    assert found["path"] == str(cache(tmp_path) / NAME)
    assert found["remedy"] is None


def test_a_file_in_the_hugging_face_cache_is_found(tmp_path):
    file = tmp_path / "hub/models--timm--resnet34.a1/snapshots/0a1b/model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(CONTENT)
    row = {row["backbone"]: row for row in answer("list")}["torchvision:resnet34"]
    assert (row["place"], row["path"]) == ("Hugging Face cache", str(file))


def test_the_table_is_readable_in_lines():
    lines = CliRunner().invoke(cli, ["weights", "list"], catch_exceptions=False).output
    assert f"torchvision:resnet18: {NAME}, sha256 {DIGEST[:8]}…, MIT" in lines
    assert f"torchvision:resnet34: {HUB_NAME}, no hash stated, licence not stated" in lines
    assert "not here: medssl weights fetch torchvision:resnet18" in lines


def test_an_architecture_is_asked_for_its_file_without_being_built(monkeypatch):
    monkeypatch.setattr(TorchvisionBackbone, "__init__", lambda *_, **__: pytest.fail("built"))
    assert pipeline.weights_of("torchvision:resnet18").file_name == NAME


# -------------------------------------------------------------------------------------- fetching


def test_a_file_is_fetched_to_where_the_init_looks(tmp_path):
    got = answer("fetch", "torchvision:resnet18")
    assert got["file"] == str(cache(tmp_path) / NAME)
    assert got["sha256"] == DIGEST
    assert Path(got["file"]).read_bytes() == CONTENT
    assert "there already" in answer("fetch", "torchvision:resnet18")["checked"]


def test_a_file_is_carried_over(tmp_path, site):
    stick = tmp_path / "stick"
    answer("fetch", "torchvision:resnet18", "--out", stick)
    shutil.rmtree(site)
    assert [file.name for file in stick.iterdir()] == [NAME]
    (check,) = answer("verify", stick)
    assert check["is_right"]
    assert check["sha256"] == DIGEST


def test_a_broken_copy_is_fetched_again(tmp_path):
    (cache(tmp_path) / NAME).write_bytes(CONTENT[:-1])
    assert answer("fetch", "torchvision:resnet18")["checked"] == "fetched, and right"
    assert (cache(tmp_path) / NAME).read_bytes() == CONTENT


def test_another_file_under_the_address_leaves_nothing(tmp_path, site):
    (site / NAME).write_bytes(b"<html>please log in</html>")
    with pytest.raises(WeightsError, match=rf"begins with [0-9a-f]{{12}}, wanted {DIGEST[:8]}"):
        pipeline.fetch("torchvision:resnet18", tmp_path / "stick")
    assert list((tmp_path / "stick").iterdir()) == []


def test_without_a_network_the_ways_are_named(site, monkeypatch, tmp_path):
    shutil.rmtree(site)
    with pytest.raises(MachineError, match=r"could not be downloaded; there is no network .*copy"):
        pipeline.fetch("torchvision:resnet18")
    assert list(cache(tmp_path).iterdir()) == []
    assert code_of(monkeypatch, "fetch", "torchvision:resnet18") == 4


def test_a_file_without_stated_hash_is_fetched_and_says_its_own(tmp_path):
    got = answer("fetch", "torchvision:resnet34")
    assert Path(got["file"]).name == HUB_NAME
    assert got["sha256"] == DIGEST
    assert "publisher states no hash" in got["checked"]
    assert "init.sha256" in got["checked"]


def hub_file(site: Path) -> Path:
    return site / "timm/resnet34.a1/resolve/main/model.safetensors"


def test_a_page_in_place_of_a_file_without_stated_hash_is_not_kept(tmp_path, site):
    hub_file(site).write_bytes(b"<html>please log in</html>")
    with pytest.raises(WeightsError, match=rf"^{HUB_NAME}: what arrived is no file of"):
        pipeline.fetch("torchvision:resnet34", tmp_path / "stick")
    assert list((tmp_path / "stick").iterdir()) == []


class _Hasty(http.server.BaseHTTPRequestHandler):
    """Promises a file and hangs up in the middle of it, where a tensor file seems to end."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT) + 1000))
        self.end_headers()
        self.wfile.write(CONTENT)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_file_without_stated_hash_that_the_network_cut_short_is_not_kept(tmp_path, monkeypatch):
    server = http.server.HTTPServer(("127.0.0.1", 0), _Hasty)
    threading.Thread(target=server.handle_request, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    with server, pytest.raises(MachineError, match=r"was cut short .* Fetch it again"):
        pipeline.fetch("torchvision:resnet34", tmp_path / "stick")
    assert list((tmp_path / "stick").iterdir()) == []


def test_a_mirror_that_is_no_address_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "mirror")
    with pytest.raises(MachineError, match=r"Correct HF_ENDPOINT"):
        pipeline.fetch("torchvision:resnet34", tmp_path / "stick")


def test_a_hash_from_elsewhere_is_compared(tmp_path):
    got = answer("fetch", "torchvision:resnet34", "--sha256", DIGEST.upper())
    assert got["checked"] == "fetched, and right"
    with pytest.raises(WeightsError, match="wanted 000000000000"):
        pipeline.fetch("torchvision:resnet34", tmp_path / "x", sha256="0" * 64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", r"'resnet18' is not of the form FAMILY:VARIANT\. For example: "),
        ("torchvision:", r"is not of the form FAMILY:VARIANT"),
        ("torchvison:resnet18", r"no backbone 'torchvison'\. Did you mean 'torchvision'"),
        ("monai:resnet", r"no published ImageNet weights for 'monai:resnet'\. There are for: "),
        ("torchvision:resnet19", r"backbone 'torchvision:resnet19' does not fit"),
    ],
)
def test_a_backbone_without_weights_is_named(name, message):
    with pytest.raises(ConfigError, match=message):
        pipeline.fetch(name)


@pytest.mark.parametrize("text", ["abc", "z" * 64])
def test_a_hash_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match=r"--sha256 takes 64 hexadecimal digits"):
        answer("fetch", "torchvision:resnet34", "--sha256", text)


# -------------------------------------------------------------------------------------- verifying


def test_a_changed_file_has_exit_code_3(tmp_path, monkeypatch, capsys):
    file = tmp_path / NAME
    file.write_bytes(CONTENT + b"!")
    assert code_of(monkeypatch, "verify", file) == 3
    printed = capsys.readouterr()
    assert printed.out.startswith(f"FAIL  {NAME}: {NAME}: its sha256 begins with")
    assert f"1 of 1 weight file(s) are not shown to be what they should be: {NAME}" in printed.err


def test_a_file_of_torchs_naming_is_checked_by_its_own_name(tmp_path):
    name = f"somebodys-{DIGEST[:16]}.pth"
    (tmp_path / name).write_bytes(CONTENT)
    assert pipeline.verify(tmp_path / name)[0].is_right
    (tmp_path / name).write_bytes(CONTENT + b"!")
    assert not pipeline.verify(tmp_path / name)[0].is_right


def test_a_file_that_nobody_vouches_for_does_not_pass(tmp_path, monkeypatch):
    (tmp_path / "theirs.pth").write_bytes(CONTENT)
    (check,) = pipeline.verify(tmp_path / "theirs.pth")
    assert not check.is_right
    assert "give --sha256" in check.text
    assert pipeline.verify(tmp_path / "theirs.pth", sha256=DIGEST)[0].is_right
    assert code_of(monkeypatch, "verify", tmp_path / "theirs.pth", "--sha256", DIGEST) == 0


def test_all_means_what_is_on_this_machine(tmp_path):
    (cache(tmp_path) / NAME).write_bytes(CONTENT)
    checks = {check["file"]: check for check in answer("verify")}
    assert checks[NAME]["is_right"]
    (cache(tmp_path) / NAME).write_bytes(b"")
    assert not {check.file: check for check in pipeline.verify()}[NAME].is_right


def test_nothing_to_verify_has_exit_code_4(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    assert code_of(monkeypatch, "verify", tmp_path / "empty") == 4
    assert "no weight file whose hash is known at the path given" in capsys.readouterr().err


def test_one_hash_is_for_one_file(tmp_path):
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_bytes(CONTENT)
    with pytest.raises(ConfigError, match="--sha256 belongs to one file"):
        pipeline.verify(tmp_path, sha256=DIGEST)


def test_a_checkpoint_is_compared_with_its_contract(tmp_path):
    from medssl.models.backbones.monai import Config
    from medssl.models.build import build_backbone
    from medssl.models.checkpoints import Contract, save_checkpoint
    from medssl.models.inits.random import Config as RandomConfig

    config = Config(depth=10, spatial_dims=2, base_channels=4)
    backbone, _ = build_backbone(config, RandomConfig(), in_channels=1, seed=0)
    contract = Contract(
        spacing_mm=None, orientation="RAS", axis_order="CXY", intensity={}, in_channels=1,
        spatial_dims=2, backbone=config.model_dump(mode="json"), init={"name": "random"},
        index_digest="0", store_digest="0", patients=(), seed=0, steps=0, package_versions={},
    )  # fmt: skip
    run = tmp_path / "run"
    weights = run / "checkpoints" / "backbone" / "backbone.safetensors"
    save_checkpoint(weights.parent, backbone, contract)
    for given in (run, weights.parent, weights):
        (check,) = pipeline.verify(given)
        assert check.is_right
        assert check.text == "agrees with its contract"
    weights.write_bytes(weights.read_bytes()[:-1])
    (check,) = pipeline.verify(run)
    assert not check.is_right
    assert "cut short" in check.text


def test_names_of_files_tell_repositories_apart():
    weights = ImagenetWeights("model.safetensors", None, HUB)
    other = ImagenetWeights("model.safetensors", None, HUB.replace("resnet34", "resnet50"))
    assert local_name(weights) == HUB_NAME
    assert local_name(other) == "timm--resnet50.a1--model.safetensors"
