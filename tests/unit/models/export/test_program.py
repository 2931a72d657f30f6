from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import Conv2dSame
from torch import Tensor, nn

from exports import MONAI_2D, make_backbone, make_subject
from medssl.errors import WeightsError
from medssl.models.export._capture import _for_multiples
from medssl.models.export.base import Subject, check_equal
from medssl.models.export.program import Program

OTHER_PROCESS = """
import sys
sys.modules["medssl"] = None  # importing it fails from here on
import torch
from safetensors.torch import load_file, save_file

network = torch.export.load("model.pt2").module()
with torch.no_grad():
    outputs = network(load_file("images.safetensors")["images"])
save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, "found.safetensors")
"""


def test_a_process_without_medssl_gets_the_same_features(tmp_path: Path, slices: Subject) -> None:
    Program().write(slices, tmp_path)
    images = torch.rand(1, 1, 41, 57, generator=torch.Generator().manual_seed(0))
    save_file({"images": images}, tmp_path / "images.safetensors")
    command = [sys.executable, "-c", OTHER_PROCESS]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = load_file(tmp_path / "found.safetensors")
    assert list(slices.answers(images)) == [
        "stem",
        "layer1",
        "layer2",
        "layer3",
        "layer4",
        "embedding",
    ]
    assert check_equal(found, slices.answers(images), "found") < 1e-4


def test_volumes_of_any_size_are_taken(tmp_path: Path, volumes: Subject) -> None:
    facts = Program().write(volumes, tmp_path)
    assert facts["largest_difference"] < 1e-4
    assert facts["images"].startswith("any size from")
    network = torch.export.load(tmp_path / "model.pt2").module()
    images = volumes.sample_images(2, (34, 51, 43))
    with torch.no_grad():
        assert check_equal(network(images), volumes.answers(images), "found") < 1e-4


def test_a_network_captured_at_one_size_says_so() -> None:
    subject = make_subject(make_backbone(MONAI_2D), image_size=(48, 40))
    assert subject.captured.rule == "48 x 40 voxels, no other size"
    with pytest.raises(AssertionError):
        subject.captured.program.module()(subject.sample_images(1, (48, 48)))


class TensorFlowPadding(nn.Module):
    """The smallest network that holds what the layers of tf_efficientnet do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Conv2dSame(1, 4, 3, stride=2)
        self.second = Conv2dSame(4, 4, 5, stride=2, dilation=1, groups=4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_layers_that_pad_as_tensorflow_does_pad_by_constants_for_multiples() -> None:
    net: Any = TensorFlowPadding().eval()
    images = torch.rand(1, 1, 12, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(_for_multiples(net)(images), net(images), atol=1e-6)
    assert isinstance(net.first, Conv2dSame)  # the backbone itself stays as it is


@pytest.mark.slow
def test_efficientnet_is_captured_for_multiples_of_its_stride(tmp_path: Path) -> None:
    subject = make_subject(make_backbone({"name": "timm", "variant": "efficientnet_lite0"}))
    assert Program().write(subject, tmp_path)["largest_difference"] < 1e-4
    assert (subject.captured.sizes, subject.captured.step) == ("multiples", 32)


def test_a_wrong_answer_is_refused_with_the_output_and_the_difference() -> None:
    wanted = {"stem": torch.ones(2), "embedding": torch.ones(2)}
    with pytest.raises(WeightsError, match=r"output embedding differs .* by 2.0e-03, allowed"):
        check_equal({**wanted, "embedding": torch.tensor([1.0, 1.002])}, wanted, "model.onnx")
    with pytest.raises(WeightsError, match=r"output stem has shape None, wanted \(2,\)"):
        check_equal({}, wanted, "model.onnx")
    with pytest.raises(WeightsError, match="differs from the backbone's by nan"):
        check_equal({**wanted, "stem": torch.full((2,), torch.nan)}, wanted, "model.onnx")
