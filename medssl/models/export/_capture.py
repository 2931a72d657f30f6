"""A backbone as a program of its own, by ``torch.export``: no Python of medssl is left in it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from medssl.errors import WeightsError
from medssl.models.backbones.base import Backbone
from medssl.models.inflated_layers import InflatedConv, repeat_ends

_Net = TypeVar("_Net", bound=nn.Module)

Sizes = Literal["any", "multiples", "fixed"]

_EXAMPLE_STEPS = (2, 3, 2)
"""Size along each axis, in total strides: above 1, as a length of 1 is taken for a constant."""

_TENSORFLOW_PADDING = "Same"
"""Ends the names of timm's layers whose padding depends on the image's size, as TensorFlow's does.
For sizes that are not known, torch.export works on a chain of them for minutes."""

_FIXED = {2: (224, 224), 3: (96, 96, 96)}
"""Usual sizes, for networks that can be captured at one size only."""

_EXAMPLE_BATCH = 2


@dataclass(frozen=True)
class Captured:
    """A captured backbone.

    Attributes:
        program: takes images in [0, 1], (B, C, *S); returns every stage by name, and
            ``embedding``. B is free.
        example: images it was captured with.
        sizes: which S it takes: any, multiples of ``step``, or only that of ``example``.
        step: voxels.
        smallest: voxels along an axis down to which it was tried.
    """

    program: ExportedProgram
    example: Tensor
    sizes: Sizes
    step: int
    smallest: int

    @property
    def rule(self) -> str:
        """The sizes it takes, in words."""
        if self.sizes == "any":
            return f"any size from {self.smallest} voxels on along each axis"
        if self.sizes == "multiples":
            return f"multiples of {self.step} voxels, from {self.smallest} on, along each axis"
        return f"{' x '.join(map(str, self.example.shape[2:]))} voxels, no other size"

    def trial_sizes(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield batches and sizes on which an export is compared with the backbone."""
        size = tuple(self.example.shape[2:])
        yield 1, size
        if self.sizes != "fixed":
            yield 1, (self.smallest,) * len(size)
            if self.sizes == "any":  # odd at every halving, where the example is even
                yield 1, tuple(length + 1 for length in size)
            more = self.step if self.sizes == "multiples" else 7
            yield 3, tuple(self.smallest + more * axis for axis in reversed(range(len(size))))


class _Named(nn.Module):
    """A backbone that returns its outputs by name, without a branch that depends on the size."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        backbone = self.backbone
        features = backbone(image) if backbone.divisor == 1 else self._padded(image)
        named = {
            stage.name: feature for stage, feature in zip(backbone.stages, features, strict=True)
        }
        return {**named, "embedding": backbone.pool(features[-1])}

    def _padded(self, x_BC: Tensor) -> list[Tensor]:
        """Do as `Backbone.forward`, but pad always, if only by nothing."""
        backbone = self.backbone
        x_BC = (x_BC - cast("Tensor", backbone._mean)) / cast("Tensor", backbone._std)
        size = tuple(x_BC.shape[2:])
        if backbone.inside_channel:
            x_BC = torch.cat([x_BC, torch.ones_like(x_BC[:, :1])], dim=1)
        whole = zip(reversed(size), reversed(backbone.divisors), strict=True)
        far_ends = [
            number
            for length, divisor in whole
            for number in (0, (length + divisor - 1) // divisor * divisor - length)
        ]
        kept = []
        for feature, stage in zip(
            backbone.extract(functional.pad(x_BC, far_ends)), backbone.stages, strict=True
        ):
            for axis, (length, stride) in enumerate(zip(size, stage.stride, strict=True), start=2):
                # Not narrow: that it fits cannot be proved for all sizes at once.
                places = torch.arange((length + stride - 1) // stride, device=feature.device)
                feature = feature.index_select(axis, places)
            kept.append(feature)
        return kept


def capture(backbone: Backbone, fixed_size: tuple[int, ...] | None = None) -> Captured:
    """Capture a backbone for as many image sizes as it allows.

    Tried in turn: any size; multiples of the total stride (paddings that depend on the remainder,
    as TensorFlow's do, cannot be written for all sizes at once); one size.

    Args:
        backbone: in evaluation mode.
        fixed_size: the one size, and nothing else; None: try as above.

    Raises:
        WeightsError: it cannot be captured at all.
    """
    stride = max(max(stage.stride) for stage in backbone.stages)
    step = max(stride, backbone.divisor)
    problem = ""
    for sizes in _tries(backbone, fixed_size):
        example = _example(backbone, sizes, step, fixed_size)
        net = _Named(_for_multiples(backbone) if sizes == "multiples" else backbone).eval()
        try:
            program = _export(net, example, _dynamic(sizes, step, backbone.spatial_dims))
            return _measured(Captured(program, example, sizes, step, smallest=2 * step), net)
        # What torch.export raises for what it cannot express derives from one of these.
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            problem = type(error).__name__
    raise WeightsError(
        f"backbone {backbone.describe()} cannot be captured by torch.export ({problem}). "
        "Use the format state_dict, or load_backbone where medssl is installed."
    )


def _tries(backbone: Backbone, fixed_size: tuple[int, ...] | None) -> tuple[Sizes, ...]:
    if fixed_size is not None:
        return ("fixed",)
    padding = {
        type(module).__name__
        for module in backbone.modules()
        if type(module).__name__.endswith(_TENSORFLOW_PADDING) or getattr(module, "same", False)
    }
    if padding - {"Conv2dSame", "InflatedConv"}:
        return ("fixed",)
    return ("multiples", "fixed") if padding else ("any", "multiples", "fixed")


class _Conv2dOfMultiples(nn.Module):
    """A convolution that pads as timm's Conv2dSame does where its stride divides the size.

    Then (n / s - 1) s + (k - 1) d + 1 - n = (k - 1) d + 1 - s voxels are added along an axis, for
    kernel k, stride s and dilation d, whatever n is; the smaller half of them in front.
    """

    def __init__(self, conv: nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        sizes = zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)
        added = [max((k - 1) * d + 1 - s, 0) for k, s, d in sizes]
        self.padding = [n for total in reversed(added) for n in (total // 2, total - total // 2)]

    def forward(self, x_BCXY: Tensor) -> Tensor:
        padded = functional.pad(x_BCXY, self.padding)
        return functional.conv2d(
            padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


class _InflatedConvOfMultiples(_Conv2dOfMultiples):
    """The same of an inflated convolution, along X and Y; along Z it takes any number of slices."""

    def __init__(self, conv: InflatedConv) -> None:
        super().__init__(conv)
        self.kernel_size = conv.kernel_size
        self.padding = [0, 0, *self.padding[2:]]  # functional.pad begins with Z

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        along_z = (self.kernel_size[2], self.stride[2], self.dilation[2])
        padded = functional.pad(repeat_ends(x_BCXYZ, *along_z), self.padding)
        return functional.conv3d(
            padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


def _for_multiples(backbone: _Net) -> _Net:
    """Return a copy whose layers pad by constants; right for multiples of the total stride."""
    changed = copy.deepcopy(backbone)
    for name, module in list(changed.named_modules()):
        if type(module).__name__ == "Conv2dSame" and isinstance(module, nn.Conv2d):
            changed.set_submodule(name, _Conv2dOfMultiples(module))
        elif isinstance(module, InflatedConv) and module.same:
            changed.set_submodule(name, _InflatedConvOfMultiples(module))
    return changed


def _example(
    backbone: Backbone, sizes: Sizes, step: int, fixed_size: tuple[int, ...] | None
) -> Tensor:
    dims = backbone.spatial_dims
    if sizes == "fixed":
        size = fixed_size or _FIXED[dims]
    else:
        size = tuple(step * number for number in _EXAMPLE_STEPS[:dims])
    generator = torch.Generator().manual_seed(0)
    return torch.rand(_EXAMPLE_BATCH, backbone.in_channels, *size, generator=generator)


def _dynamic(sizes: Sizes, step: int, spatial_dims: int) -> dict[int, Any]:
    axes: dict[int, Any] = {0: Dim.DYNAMIC}
    for axis, name in zip(range(2, 2 + spatial_dims), "xyz", strict=False):
        if sizes == "any":
            axes[axis] = Dim.DYNAMIC
        elif sizes == "multiples":
            axes[axis] = step * Dim(f"{name}_steps")
    return axes


def _export(net: nn.Module, example: Tensor, dynamic: dict[int, Any]) -> ExportedProgram:
    # As torch.onnx sets it: a size of 1 is taken for any other, and needs no program of its own.
    settings: Any = torch.fx.experimental._config
    with _quiet(), torch.no_grad(), settings.patch(backed_size_oblivious=True):
        program = torch.export.export(net, (example,), dynamic_shapes=(dynamic,))
    _forget_places(program)
    return program


def _forget_places(program: ExportedProgram) -> None:
    """Drop the lines of code that each operation came from: they name folders of this machine."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


def _measured(captured: Captured, net: nn.Module) -> Captured:
    """Return the capture, after it has taken other sizes; values are compared by the formats.

    Raises:
        ValueError, RuntimeError, AssertionError: it has not.
    """
    module = captured.program.module()
    channels, dims = captured.example.shape[1], captured.example.ndim - 2

    def answers_alike(batch: int, size: tuple[int, ...]) -> None:
        images = torch.zeros(batch, channels, *size)
        found = module(images)
        for name, tensor in net(images).items():
            if found[name].shape != tensor.shape:
                raise ValueError(f"{name}: {tuple(found[name].shape)} for {tuple(tensor.shape)}")

    with torch.no_grad():
        if captured.sizes != "fixed":
            step = captured.step
            # Where a last stage of one voxel in all is refused, one of step + 1 has two an axis.
            for smallest in (1, 2, step, step + 1) if captured.sizes == "any" else (step,):
                try:
                    answers_alike(1, (smallest,) * dims)
                except (
                    RuntimeError,
                    ValueError,
                    AssertionError,
                ):  # it was captured for larger ones
                    continue
                captured = replace(captured, smallest=smallest)
                break
        for batch, size in captured.trial_sizes():
            answers_alike(batch, size)
    return captured


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.export's warnings about torch itself from the reader."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
