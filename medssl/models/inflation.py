"""Inflation: a 2D convolutional network as a 3D one, with its weights.

Every kernel is laid over neighbouring slices such that a volume whose slices are all equal gives,
in every slice, the features that the 2D network gives for the slice: the inflation law. It holds up
to the outermost slice, as volumes are extended along Z by repeating it, and is checked rather than
trusted: what a network does outside of its layers cannot be seen from them.

Source: Carreira & Zisserman, Quo vadis, action recognition?, CVPR 2017, section 2.4.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from medssl.errors import ConfigError
from medssl.models.inflated_layers import FORMS, AlongZ, NoForm3dError, Spread, spread_kernel, stays

N = TypeVar("N", bound=nn.Module)
Run = Callable[[Any, Tensor], Sequence[Tensor]]
"""Runs a network on images and returns its features."""

LAW_TOLERANCE = 1e-4
"""Largest difference between 2D and 3D features, as a share of the largest feature of a stage."""

_LAW_SLICES = 3
_SHOWN = 3
"""Layers named in a message before the rest is only counted."""

_REMEDY = (
    "Choose a convolutional network, for example torchvision resnet18 or timm efficientnet_lite0, "
    "or backbone slicewise, which takes any 2D network."
)


@dataclass(frozen=True)
class Strides:
    """How far a network has shrunk X and Y at each step, and how far Z with it.

    Attributes:
        along_z: stride in Z, counted from the image, by the stride in X and Y, counted likewise.
    """

    along_z: Mapping[int, int]

    def between(self, before: int, after: int) -> int:
        """Return the stride in Z of a layer that takes X and Y from one stride to another."""
        return self.along_z[after] // self.along_z[before]


def inflate(
    flat: N,
    image_BCXY: Tensor,
    run: Run,
    *,
    name: str = "this network",
    z_kernel: int = 3,
    z_downsampling: int | None = None,
    spread: Spread = "mean",
) -> tuple[N, Strides]:
    """Return a copy of a 2D network as a 3D one, with its weights inflated, and its strides.

    Layers keep their names, so tensors of the same name belong together.

    Args:
        flat: the 2D network; left as it is.
        image_BCXY: an image to read the strides from; X and Y are multiples of all of them.
        run: runs ``flat`` on images, so that it passes all its layers.
        name: of the network, for messages.
        z_kernel: slices that a kernel covers, at most.
        z_downsampling: stride of the whole network in Z; the last steps shrink Z, the first do
            not. None: as in X and Y.
        spread: see `medssl.models.inflated_layers.spread_kernel`.

    Raises:
        ConfigError: a layer has no 3D form, or ``z_downsampling`` cannot be had.
    """
    refuse_unknown_layers(flat, name)
    steps = _read_steps(flat, image_BCXY, run, name)
    strides = _strides(steps, z_downsampling, name)

    made: dict[int, nn.Module] = {}  # a layer used twice stays one layer

    def turn(layer: nn.Module, path: str) -> nn.Module:
        if id(layer) in made:
            return made[id(layer)]
        key = id(layer)
        form = FORMS.get(type(layer))
        deep = layer
        if form is not None:
            stride = strides.between(*steps[path]) if path in steps else 1
            try:
                deep = form(layer, AlongZ(z_kernel, stride, spread))
            except NoForm3dError as error:
                raise _cannot(name, f"{type(layer).__name__} ({path}) with {error}") from None
            deep.training = layer.training
        made[key] = deep
        for child_name, child in list(deep.named_children()):
            deep.add_module(child_name, turn(child, f"{path}.{child_name}".lstrip(".")))
        return deep

    deep: Any = turn(copy.deepcopy(flat), "")
    return deep, strides


def refuse_unknown_layers(flat: nn.Module, name: str) -> None:
    """Raise a ConfigError that names every kind of layer that has no 3D form.

    Containers pass: what they compute between their layers is for `check_law` to judge.
    """
    found: dict[str, list[str]] = {}
    for path, layer in flat.named_modules():
        kind = type(layer).__name__
        known = type(layer) in FORMS or stays(layer)
        bare = next(layer.children(), None) is None
        tensors = [*layer.parameters(recurse=False), *_weights_like_buffers(layer)]
        if not known and (bare or tensors):
            found.setdefault(kind, []).append(path)
        elif layer._forward_hooks or layer._forward_pre_hooks:
            found.setdefault(f"{kind} with hooks", []).append(path)
    if found:
        raise _cannot(name, ", ".join(f"{kind} ({_some(paths)})" for kind, paths in found.items()))


def inflate_state(
    state: Mapping[str, Tensor], like: Mapping[str, Tensor], spread: Spread
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Inflate the tensors of a 2D network by the rule of the network itself.

    Args:
        state: tensors of the 2D network.
        like: tensors of the inflated network, for their shapes. What belongs to none of them by
            name or shape is passed on, for a strict loader to refuse.
        spread: see `medssl.models.inflated_layers.spread_kernel`.

    Returns:
        The tensors, and how each that changed was made, in words.
    """
    inflated, how = dict(state), {}
    for name, tensor in state.items():
        num = _slices_added(tensor, like.get(name))
        if num is None:
            continue
        if tensor.ndim != _KERNEL_DIMS:
            inflated[name], how[name] = tensor.unsqueeze(-1), "one axis added for the slices"
            continue
        inflated[name] = spread_kernel(tensor, num, spread)
        size = f"{tensor.shape[2]} x {tensor.shape[3]}"
        if num == 1:
            how[name] = f"inflated: {size} in one slice"
        elif spread == "mean":
            how[name] = f"inflated: {size} spread over {num} slices, divided by {num}"
        else:
            how[name] = f"inflated: {size} in the middle one of {num} slices, zeros in the others"
    return inflated, how


def random_state(
    draws: Sequence[Mapping[str, Tensor]], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Make the random weights of a 3D network from several random 2D networks.

    The slices of a kernel come from different draws, divided by the root of their number. That is
    the 2D network's own scheme with the fan of a 3D kernel, whatever the scheme: each draws with a
    variance of c / fan, and the fan grows with the number of slices. What is zero stays zero.

    Args:
        draws: tensors of independently drawn 2D networks, `num_draws` or more.
        like: tensors of the inflated network, for their shapes.
    """
    state: dict[str, Tensor] = {}
    for name, wanted in like.items():
        first = draws[0][name]
        num = _slices_added(first, wanted)
        if num is None:
            state[name] = first
        elif first.ndim != _KERNEL_DIMS:
            state[name] = first.unsqueeze(-1)
        else:
            slices = [draw[name] for draw in draws[:num]]
            state[name] = torch.stack(slices, dim=-1) / math.sqrt(num)
    return state


def num_draws(flat: nn.Module, deep: nn.Module) -> int:
    """Return how many random 2D networks `random_state` needs: the slices of the longest kernel."""
    like = deep.state_dict()
    found = (_slices_added(tensor, like[name]) for name, tensor in flat.state_dict().items())
    return max((num for num in found if num), default=1)


def check_law(
    flat: nn.Module, deep: nn.Module, image_BCXY: Tensor, run: Run, *, name: str, spread: Spread
) -> None:
    """Refuse an inflated network that does not follow the inflation law.

    Both are run with the same weights: those of ``flat``, but scales, offsets and statistics drawn
    anew, as many start at a value (a layer scale of 1e-6, say) that hides what they scale. Neither
    network, nor any random state, is changed.

    Args:
        flat: the 2D network.
        deep: what `inflate` made of it.
        image_BCXY: an image; repeated along Z it makes the volume.
        run: runs either on images or volumes.
        name: of the network, for messages.
        spread: see `medssl.models.inflated_layers.spread_kernel`.

    Raises:
        ConfigError: the features differ, or ``deep`` cannot be run.
    """
    weights = _telling(flat.state_dict())
    inflated, _ = inflate_state(weights, deep.state_dict(), spread)
    volume_BCXYZ = image_BCXY.unsqueeze(-1).expand(*image_BCXY.shape, _LAW_SLICES)
    with torch.no_grad():
        wanted = _run_with(flat, weights, image_BCXY, run)
        try:
            found = _run_with(deep, inflated, volume_BCXYZ, run)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
            raise _cannot(name, "something between its layers, which is written for 2D") from None
    for number, (feature_BCXYZ, feature_BCXY) in enumerate(zip(found, wanted, strict=True)):
        difference = law_difference(feature_BCXYZ, feature_BCXY)
        if not difference <= LAW_TOLERANCE:  # so that a nan is refused
            raise _cannot(
                name,
                f"something between its layers (the features of stage {number} differ from the "
                f"2D network's by {difference:.2g} of the largest)",
            )


def law_difference(feature_BCXYZ: Tensor, feature_BCXY: Tensor) -> float:
    """Return how far features of a repeated image are from the 2D ones, in any slice.

    Returns:
        The largest difference as a share of the largest 2D feature; infinite where the shapes do
        not match, or where the 2D features are all the same and so prove nothing.
    """
    if feature_BCXYZ.ndim != 5 or feature_BCXYZ.shape[:-1] != feature_BCXY.shape:
        return math.inf
    if feature_BCXY.amax() == feature_BCXY.amin():
        return math.inf
    difference = (feature_BCXYZ - feature_BCXY.unsqueeze(-1)).abs().amax()
    return float(difference / feature_BCXY.abs().amax())


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode for the block, and every layer back after it."""
    modes = [(layer, layer.training) for layer in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode


_KERNEL_DIMS = 4
"""Axes of a 2D convolution's weight; no other tensor of a known layer has as many."""


def _slices_added(flat: Tensor, deep: Tensor | None) -> int | None:
    """Return the length of the axis that inflation adds to a tensor; None where it adds none."""
    if deep is None or deep.ndim != flat.ndim + 1 or deep.shape[:-1] != flat.shape:
        return None
    return deep.shape[-1]


def _read_steps(
    flat: nn.Module, image_BCXY: Tensor, run: Run, name: str
) -> dict[str, tuple[int, int]]:
    """Return, for every layer that shrinks X and Y, their strides before and after it."""
    steps: dict[str, tuple[int, int]] = {}
    sizes = tuple(image_BCXY.shape[2:])

    def stride_of(path: str, features: Tensor) -> int:
        strides = {
            size // found if size % found == 0 else 0
            for size, found in zip(sizes, features.shape[2:], strict=True)
        }
        if len(strides) != 1 or 0 in strides:
            raise _cannot(name, f"the strides of {path}, which differ in X and Y or are no numbers")
        return strides.pop()

    def watch(path: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def note(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            steps[path] = (stride_of(path, inputs[0]), stride_of(path, output))

        return note

    watched = [
        layer.register_forward_hook(watch(path))
        for path, layer in flat.named_modules()
        if type(layer) in FORMS and getattr(layer, "stride", 1) not in (1, (1, 1))
    ]
    try:
        with torch.no_grad(), evaluating(flat):
            run(flat, image_BCXY)
    finally:
        for handle in watched:
            handle.remove()
    return steps


def _strides(
    steps: Mapping[str, tuple[int, int]], z_downsampling: int | None, name: str
) -> Strides:
    levels = sorted({1, *(stride for step in steps.values() for stride in step)})
    if any(after % before for before, after in pairwise(levels)):
        raise _cannot(name, f"its strides {levels}, which are no steps of one another")
    total = levels[-1]
    found = _share(levels, total if z_downsampling is None else z_downsampling)
    if found is None:
        possible = [str(number) for number in range(1, total + 1) if _share(levels, number)]
        raise ConfigError(
            f"z_downsampling: {z_downsampling} cannot be had with {name}, which shrinks X and Y "
            f"by {total} in steps. Choose one of {', '.join(possible)}."
        )
    return Strides(found)


def _share(levels: Sequence[int], z_downsampling: int) -> dict[int, int] | None:
    """Give each step its part of the stride in Z, from the last step to the first."""
    parts = []
    for before, after in reversed(list(pairwise(levels))):
        parts.append(math.gcd(after // before, z_downsampling))
        z_downsampling //= parts[-1]
    if z_downsampling != 1:
        return None
    along_z = {levels[0]: 1}
    for level, part in zip(levels[1:], reversed(parts), strict=True):
        along_z[level] = along_z[max(along_z)] * part
    return along_z


def _telling(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a network's tensors with scales, offsets and statistics that are not trivial."""
    generator = torch.Generator().manual_seed(0)
    drawn: dict[str, Tensor] = {}
    for name, tensor in state.items():
        is_kernel = tensor.ndim in (2, _KERNEL_DIMS)
        if is_kernel or not tensor.is_floating_point():
            drawn[name] = tensor
        elif name.endswith(("bias", "running_mean")):
            drawn[name] = 0.1 * torch.randn(tensor.shape, generator=generator)
        else:
            drawn[name] = 0.5 + torch.rand(tensor.shape, generator=generator)
    return drawn


class _Running(nn.Module):
    """A network run in a way of one's own, for `functional_call`."""

    def __init__(self, net: nn.Module, run: Run) -> None:
        super().__init__()
        self.net = net
        self.run = run

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        return self.run(self.net, images)


def _run_with(
    net: nn.Module, state: Mapping[str, Tensor], images: Tensor, run: Run
) -> Sequence[Tensor]:
    """Run a network with other tensors than its own."""
    tensors = {f"net.{name}": tensor for name, tensor in state.items()}
    with evaluating(net):
        found: Sequence[Tensor] = functional_call(_Running(net, run), tensors, (images,))
    return found


def _weights_like_buffers(layer: nn.Module) -> list[Tensor]:
    """Return the buffers of a layer's own that a checkpoint holds."""
    unsaved = layer._non_persistent_buffers_set
    return [buffer for name, buffer in layer.named_buffers(recurse=False) if name not in unsaved]


def _cannot(name: str, what: str) -> ConfigError:
    return ConfigError(f"{name} cannot be inflated to 3D; there is no 3D form of {what}. {_REMEDY}")


def _some(paths: list[str]) -> str:
    shown = [path or "the network itself" for path in paths[:_SHOWN]]
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(shown) + more
