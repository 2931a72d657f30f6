"""Exports of the backbones that take 2D networks to volumes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import Conv2dSame
from torch import nn

from exports import MONAI_2D, make_backbone, make_subject
from medssl.errors import WeightsError
from medssl.models.export._capture import _for_multiples
from medssl.models.export.base import EMBEDDING, Subject, check_equal
from medssl.models.export.onnx import Onnx
from medssl.models.export.program import Program
from medssl.models.export.state_dict import StateDict
from medssl.models.inflated_layers import AlongZ, InflatedConv
from tests.unit.models.export.test_program import OTHER_PROCESS

IN_3D: dict[str, dict[str, Any]] = {
    "slicewise": {"name": "slicewise", "backbone": MONAI_2D, "pooling": "max"},
    "inflated": {"name": "inflated", "backbone": MONAI_2D, "z_downsampling": 4},
}


@pytest.fixture(
    scope="module",
    params=["slicewise", pytest.param("inflated", marks=pytest.mark.slow)],
)
def subject(request: pytest.FixtureRequest) -> Subject:
    """Return a backbone, captured once."""
    return make_subject(make_backbone(IN_3D[request.param]))


def test_a_process_without_medssl_gets_the_same_features(tmp_path: Path, subject: Subject) -> None:
    assert Program().write(subject, tmp_path)["largest_difference"] < 1e-4
    assert subject.captured.sizes == "any"
    images = subject.sample_images(2, (70, 66, subject.captured.smallest + 3))
    save_file({"images": images}, tmp_path / "images.safetensors")
    command = [sys.executable, "-c", OTHER_PROCESS]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = load_file(tmp_path / "found.safetensors")
    assert check_equal(found, subject.answers(images), "found") < 1e-4


@pytest.mark.slow
def test_onnxruntime_answers_as_the_backbone(tmp_path: Path, subject: Subject) -> None:
    assert Onnx().write(subject, tmp_path)["largest_difference"] < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_inputs()[0].shape == ["batch", 1, "x", "y", "z"]
    names = list(subject.output_names())
    images = subject.sample_images(3, (65, 72, subject.captured.smallest + 1))
    answers = session.run(names, {"image": images.numpy()})
    found = {name: torch.from_numpy(a) for name, a in zip(names, answers, strict=True)}
    assert check_equal(found, subject.answers(images), "found") < 1e-4


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_the_exported_embedding_pools_slices_as_the_backbone_does(pooling: str) -> None:
    subject = make_subject(make_backbone({**IN_3D["slicewise"], "pooling": pooling}))
    images = subject.sample_images(1, (33, 40, 5))
    with torch.inference_mode():
        wanted = subject.backbone.embed(images)
    torch.testing.assert_close(subject.answers(images)[EMBEDDING], wanted)
    with torch.no_grad():
        found = subject.captured.program.module()(images)[EMBEDDING]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_inflated_layers_that_pad_as_tensorflow_does_pad_by_constants_for_multiples() -> None:
    flat = Conv2dSame(1, 4, 3, stride=2)
    net: Any = nn.Sequential(InflatedConv(flat, AlongZ(3, 2, "mean"))).eval()
    images = torch.rand(1, 1, 12, 20, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        changed = _for_multiples(net)
        assert not isinstance(changed[0], InflatedConv)
        assert torch.allclose(changed(images), net(images), atol=1e-6)
    assert isinstance(net[0], InflatedConv)  # the backbone itself stays as it is


@pytest.mark.slow
def test_inflated_efficientnet_is_captured_for_multiples_of_its_stride(tmp_path: Path) -> None:
    lite0 = {"name": "timm", "variant": "efficientnet_lite0"}
    subject = make_subject(make_backbone({"name": "inflated", "backbone": lite0}))
    assert Program().write(subject, tmp_path)["largest_difference"] < 1e-4
    assert (subject.captured.sizes, subject.captured.step) == ("multiples", 32)


def test_more_slices_than_pass_at_once_are_exported_too(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medssl.models.backbones.slicewise.SLICES_AT_ONCE", 4)
    images = subject.sample_images(1, (64, 64, 69))
    with torch.no_grad():
        found = subject.captured.program.module()(images)
    assert check_equal(found, subject.answers(images), "found") < 1e-4


@pytest.mark.parametrize("settings", IN_3D.values(), ids=IN_3D)
def test_plain_tensors_are_refused_with_the_formats_that_serve(settings: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match=r"no library has a network like backbone (infl|slic)"):
        StateDict().check(make_subject(make_backbone(settings)))
