"""The 3D forms of 2D layers, for volumes (B, C, X, Y, Z).

In X and Y each works as its 2D layer does, padding included. Along Z, the last axis, a volume is
extended by repeating its outermost slices, so that layers answer a volume whose slices are all
equal with the 2D layer's answer in every slice. A stride ``s`` along Z leaves ``ceil(Z / s)``
slices, whatever Z.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.drop import DropPath
from timm.layers.norm import LayerNorm, LayerNorm2d
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from timm.layers.squeeze_excite import SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import convnext
from torchvision.ops import StochasticDepth
from torchvision.ops.misc import Permute

Spread = Literal["mean", "centre"]


class NoForm3dError(ValueError):
    """A layer of a known type has settings that have no 3D form here; says which."""


@dataclass(frozen=True)
class AlongZ:
    """What a layer does along the slices.

    Attributes:
        kernel: slices a layer looks at, at most.
        stride: of this layer.
        spread: how the 2D weights are laid over the slices, see `spread_kernel`.
    """

    kernel: int
    stride: int
    spread: Spread

    def span(self, kernel_xy: tuple[int, int]) -> int:
        """Return the slices that a kernel covers.

        No more than it covers in X and Y; the stride's own where that is longer, so that no slice
        is skipped; odd where there is no stride to share the shift of an even kernel.
        """
        num = min(*kernel_xy, max(self.kernel, self.stride))
        return num - 1 if num % 2 == 0 and self.stride % 2 else num


def spread_kernel(weight_OIXY: Tensor, num_slices: int, spread: Spread) -> Tensor:
    """Lay a 2D kernel over slices; (O, I, X, Y, num_slices), whose sum over slices is the kernel.

    Args:
        weight_OIXY: of a convolution.
        num_slices: of the 3D kernel.
        spread: ``mean``: an equal part in each slice; ``centre``: all of it in the middle one.

    Source: ``mean``: Carreira & Zisserman, Quo vadis, action recognition?, CVPR 2017, section 2.4.
    """
    weight = weight_OIXY.unsqueeze(-1)
    if spread == "mean":
        return (weight / num_slices).expand(*weight.shape[:-1], num_slices).contiguous()
    deep = weight.new_zeros(*weight.shape[:-1], num_slices)
    deep[..., (num_slices - 1) // 2] = weight_OIXY
    return deep


def repeat_ends(x_BCXYZ: Tensor, kernel: int, stride: int, dilation: int = 1) -> Tensor:
    """Repeat the outermost slices, so that a window without padding meets ceil(Z / stride) places.

    The windows lie as those of the usual padding by half a kernel. Joins views rather than call
    `functional.pad`, whose gradient is not deterministic on a GPU; a captured program, which has no
    gradient, picks slices, as a branch on their number would hold for some numbers only.
    """
    length = x_BCXYZ.shape[-1]
    reach = dilation * (kernel - 1) + 1
    before = max(0, (reach - stride + 1) // 2)
    if torch.compiler.is_exporting():
        total = ((length + stride - 1) // stride - 1) * stride + reach
        places = torch.arange(total, device=x_BCXYZ.device) - before
        return x_BCXYZ.index_select(-1, places.clamp(0, length - 1))
    after = (-(-length // stride) - 1) * stride + reach - length - before
    parts = [x_BCXYZ if after >= 0 else x_BCXYZ[..., : length + after]]
    if before:
        parts.insert(0, x_BCXYZ[..., :1].expand(*x_BCXYZ.shape[:-1], before))
    if after > 0:
        parts.append(x_BCXYZ[..., -1:].expand(*x_BCXYZ.shape[:-1], after))
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def pad_same(x_BCXYZ: Tensor, layer: Any, fill: float = 0.0) -> Tensor:
    """Pad X and Y as TensorFlow's SAME does: ceil(size / stride) places, the odd voxel at the end.

    Args:
        x_BCXYZ: features.
        layer: a convolution or pooling, for its kernel, stride and dilation.
        fill: what is padded with.
    """
    dilation = getattr(layer, "dilation", (1, 1, 1))
    pads = [0, 0]  # functional.pad counts from the last axis
    for axis in (1, 0):
        length, stride = x_BCXYZ.shape[2 + axis], layer.stride[axis]
        reach = dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        total = max(0, (-(-length // stride) - 1) * stride + reach - length)
        pads += [total // 2, total - total // 2]
    return functional.pad(x_BCXYZ, pads, value=fill) if any(pads) else x_BCXYZ


class InflatedConv(nn.Conv3d):
    """A 2D convolution that also sees the neighbouring slices.

    Args:
        flat: the 2D convolution; its bias is taken over, its weight spread.
        z: what it does along the slices.
    """

    def __init__(self, flat: nn.Conv2d, z: AlongZ) -> None:
        if flat.padding_mode != "zeros":
            raise NoForm3dError(f"padding_mode {flat.padding_mode!r}")
        kernel, stride, dilation = _pair(flat.kernel_size), _pair(flat.stride), flat.dilation
        depth = z.span(kernel)
        same = isinstance(flat, Conv2dSame) or flat.padding == "same"
        padding = (0, 0) if same or isinstance(flat.padding, str) else _pair(flat.padding)
        # On the meta device, as drawing weights that are replaced would spend randomness.
        super().__init__(
            flat.in_channels,
            flat.out_channels,
            (*kernel, depth),
            stride=(*stride, z.stride),
            padding=(*padding, 0),
            dilation=(*_pair(dilation), max(_pair(dilation)) if depth > 1 else 1),
            groups=flat.groups,
            bias=False,
            device="meta",
        )
        self.same = same
        weight = spread_kernel(flat.weight.detach(), depth, z.spread)
        self.weight = nn.Parameter(weight, requires_grad=flat.weight.requires_grad)
        self.bias = flat.bias

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        x_BCXYZ = repeat_ends(x_BCXYZ, self.kernel_size[2], self.stride[2], self.dilation[2])
        if self.same:
            x_BCXYZ = pad_same(x_BCXYZ, self)
        convolved: Tensor = self._conv_forward(x_BCXYZ, self.weight, self.bias)
        return convolved


class InflatedMaxPool(nn.MaxPool3d):
    """2D max pooling that also looks along the slices where it shrinks them."""

    def __init__(self, flat: nn.MaxPool2d, z: AlongZ) -> None:
        kernel, stride, dilation = _pair(flat.kernel_size), _pair(flat.stride), _pair(flat.dilation)
        depth = _pooled_slices(kernel, stride, z)
        super().__init__(
            (*kernel, depth),
            (*stride, z.stride),
            (*_pair(flat.padding), 0),
            (*dilation, max(dilation) if depth > 1 else 1),
            ceil_mode=flat.ceil_mode,
        )
        self.same = isinstance(flat, MaxPool2dSame)
        self.along_z = (depth, z.stride, self.dilation[2])  # type: ignore[index]

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        x_BCXYZ = repeat_ends(x_BCXYZ, *self.along_z)
        if self.same:
            x_BCXYZ = pad_same(x_BCXYZ, self, fill=-torch.inf)
        pooled: Tensor = super().forward(x_BCXYZ)
        return pooled


class InflatedAvgPool(nn.AvgPool3d):
    """2D average pooling that also averages over the slices where it shrinks them."""

    def __init__(self, flat: nn.AvgPool2d, z: AlongZ) -> None:
        kernel, stride = _pair(flat.kernel_size), _pair(flat.stride)
        depth = _pooled_slices(kernel, stride, z)
        super().__init__(
            (*kernel, depth),
            (*stride, z.stride),
            (*_pair(flat.padding), 0),
            ceil_mode=flat.ceil_mode,
            count_include_pad=flat.count_include_pad,
            divisor_override=flat.divisor_override and flat.divisor_override * depth,
        )
        self.same = isinstance(flat, AvgPool2dSame)
        self.along_z = (depth, z.stride)

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        x_BCXYZ = repeat_ends(x_BCXYZ, *self.along_z)
        return super().forward(pad_same(x_BCXYZ, self) if self.same else x_BCXYZ)


class BatchNormAct3d(nn.BatchNorm3d):
    """timm's batch norm with the activation that follows it."""

    def __init__(self, flat: BatchNormAct2d) -> None:
        super().__init__(
            flat.num_features, flat.eps, flat.momentum, flat.affine, flat.track_running_stats
        )
        self.drop = flat.drop
        self.act = flat.act

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        activated: Tensor = self.act(self.drop(super().forward(x_BCXYZ)))
        return activated


class LayerNorm3d(nn.LayerNorm):
    """A layer norm over the channels of each voxel."""

    def __init__(self, flat: nn.LayerNorm) -> None:
        super().__init__(list(flat.normalized_shape), flat.eps, flat.elementwise_affine)

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        return super().forward(x_BCXYZ.movedim(1, -1)).movedim(-1, 1)


class SqueezeExcite3d(nn.Module):
    """EfficientNet's gate of each channel, by the channel's mean over the whole volume."""

    def __init__(self, flat: SqueezeExcite) -> None:
        super().__init__()
        self.conv_reduce, self.act1 = flat.conv_reduce, flat.act1
        self.conv_expand, self.gate = flat.conv_expand, flat.gate

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        mean = x_BCXYZ.mean((2, 3, 4), keepdim=True)
        gated: Tensor = x_BCXYZ * self.gate(self.conv_expand(self.act1(self.conv_reduce(mean))))
        return gated


class SEModule3d(nn.Module):
    """timm's general form of the same gate."""

    def __init__(self, flat: SEModule) -> None:
        super().__init__()
        self.add_maxpool = flat.add_maxpool
        self.fc1, self.bn, self.act, self.fc2, self.gate = (
            flat.fc1, flat.bn, flat.act, flat.fc2, flat.gate,
        )  # fmt: skip

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        squeezed = x_BCXYZ.mean((2, 3, 4), keepdim=True)
        if self.add_maxpool:
            squeezed = 0.5 * squeezed + 0.5 * x_BCXYZ.amax((2, 3, 4), keepdim=True)
        gated: Tensor = x_BCXYZ * self.gate(self.fc2(self.act(self.bn(self.fc1(squeezed)))))
        return gated


class CNBlock3d(nn.Module):
    """torchvision's ConvNeXt block; its scale of each channel gets an axis for the slices."""

    def __init__(self, flat: convnext.CNBlock) -> None:
        super().__init__()
        self.layer_scale = nn.Parameter(flat.layer_scale.detach().unsqueeze(-1))
        self.block, self.stochastic_depth = flat.block, flat.stochastic_depth

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        added: Tensor = self.stochastic_depth(self.layer_scale * self.block(x_BCXYZ))
        return added + x_BCXYZ


class ConvNeXtBlock3d(nn.Module):
    """timm's ConvNeXt block."""

    def __init__(self, flat: ConvNeXtBlock) -> None:
        super().__init__()
        self.channels_first = flat.use_conv_mlp
        self.conv_dw, self.norm, self.mlp = flat.conv_dw, flat.norm, flat.mlp
        self.gamma = flat.gamma
        self.shortcut, self.drop_path = flat.shortcut, flat.drop_path

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        x = self.conv_dw(x_BCXYZ)
        if self.channels_first:
            x = self.mlp(self.norm(x))
        else:
            x = self.mlp(self.norm(x.movedim(1, -1))).movedim(-1, 1)
        if self.gamma is not None:
            x = x * self.gamma.view(1, -1, 1, 1, 1)
        added: Tensor = self.drop_path(x) + self.shortcut(x_BCXYZ)
        return added


def _batch_norm(flat: nn.BatchNorm2d, _: AlongZ) -> nn.Module:
    return _with_tensors_of(
        flat,
        nn.BatchNorm3d(
            flat.num_features, flat.eps, flat.momentum, flat.affine, flat.track_running_stats
        ),
    )


def _instance_norm(flat: nn.InstanceNorm2d, _: AlongZ) -> nn.Module:
    return _with_tensors_of(
        flat,
        nn.InstanceNorm3d(
            flat.num_features, flat.eps, flat.momentum or 0.0, flat.affine, flat.track_running_stats
        ),
    )


def _adaptive_pool(flat: nn.Module, _: AlongZ) -> nn.Module:
    size = flat.output_size
    if size not in (1, (1, 1)):
        raise NoForm3dError(f"output_size {size}")
    if isinstance(flat, nn.AdaptiveMaxPool2d):
        return nn.AdaptiveMaxPool3d(1)
    return nn.AdaptiveAvgPool3d(1)


def _permute(flat: Permute, _: AlongZ) -> nn.Module:
    orders = {(0, 2, 3, 1): [0, 2, 3, 4, 1], (0, 3, 1, 2): [0, 4, 1, 2, 3]}
    order = tuple(flat.dims)
    if order not in orders:
        raise NoForm3dError(f"the order of axes {list(order)}")
    permute: nn.Module = Permute(orders[order])
    return permute


FORMS: Mapping[type[nn.Module], Callable[[Any, AlongZ], nn.Module]] = {
    nn.Conv2d: InflatedConv,
    Conv2dSame: InflatedConv,
    nn.MaxPool2d: InflatedMaxPool,
    MaxPool2dSame: InflatedMaxPool,
    nn.AvgPool2d: InflatedAvgPool,
    AvgPool2dSame: InflatedAvgPool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.AdaptiveMaxPool2d: _adaptive_pool,
    nn.BatchNorm2d: _batch_norm,
    BatchNormAct2d: lambda flat, _: _with_tensors_of(flat, BatchNormAct3d(flat)),
    nn.InstanceNorm2d: _instance_norm,
    LayerNorm2d: lambda flat, _: _with_tensors_of(flat, LayerNorm3d(flat)),
    convnext.LayerNorm2d: lambda flat, _: _with_tensors_of(flat, LayerNorm3d(flat)),
    nn.Dropout2d: lambda flat, _: nn.Dropout3d(flat.p, flat.inplace),
    Permute: _permute,
    SqueezeExcite: lambda flat, _: SqueezeExcite3d(flat),
    SEModule: lambda flat, _: SEModule3d(flat),
    convnext.CNBlock: lambda flat, _: CNBlock3d(flat),
    ConvNeXtBlock: lambda flat, _: ConvNeXtBlock3d(flat),
}
"""How each 2D layer becomes a 3D one. Exactly these types: a subclass may compute otherwise."""

AS_THEY_ARE: frozenset[type[nn.Module]] = frozenset(
    {
        nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict,
        nn.Linear, nn.LayerNorm, LayerNorm, nn.GroupNorm, nn.Dropout, DropPath, StochasticDepth,
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU,
        nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh,
    }
)  # fmt: skip
"""Layers that work on volumes as on images."""

_ELEMENTWISE = ("timm.layers.activations", "timm.layers.activations_me")
"""Modules whose layers all work number by number."""


def stays(layer: nn.Module) -> bool:
    """Return whether a layer works on volumes as it does on images."""
    return type(layer) in AS_THEY_ARE or type(layer).__module__ in _ELEMENTWISE


def _pooled_slices(kernel: tuple[int, int], stride: tuple[int, int], z: AlongZ) -> int:
    """Return the slices that a pooling covers: one where it shrinks X and Y alone."""
    return 1 if max(stride) > 1 and z.stride == 1 else z.span(kernel)


def _with_tensors_of(flat: nn.Module, deep: nn.Module) -> nn.Module:
    for name, parameter in flat.named_parameters(recurse=False):
        deep.register_parameter(name, parameter)
    for name, buffer in flat.named_buffers(recurse=False):
        deep.register_buffer(name, buffer)
    return deep


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
