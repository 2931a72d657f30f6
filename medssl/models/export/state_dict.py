"""Plain tensors under the names of the library the network comes from, for that library's loader.

A torchvision network takes three channels. The stem of a grey backbone is written such that the
library's own model, given the grey image three times and normalised with the library's own
constants, answers as the backbone does; see `medssl.models.export._stems.spread_grey`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medssl.errors import WeightsError
from medssl.models.backbones.base import Backbone
from medssl.models.export._stems import spread_grey
from medssl.models.export.base import EMBEDDING, Export, Subject, check_equal

_TOKENS = """
`model(x)` is the class token, and medssl's embedding is the mean of the patch tokens: that is what
was pretrained and evaluated. A head in the place of `model.heads` would see the class token alone.
The embedding, and the patch tokens that it is the mean of:

```python
from torchvision.models.feature_extraction import create_feature_extractor

tokens = create_feature_extractor(model, ["encoder.ln"])(x)["encoder.ln"]
embedding = tokens[:, 1:].mean(dim=1)
```
"""
_PREFIX = "net."
_RGB = 3


@dataclass(frozen=True)
class Plain:
    """A backbone as another library knows it.

    Attributes:
        library: import name of the library.
        model: what the library calls the network.
        state: tensors by the library's own names.
        head: tensors of the library's classifier, which the file does not hold.
        channels: channels the library's model takes; 3 for one of a grey image: three copies.
        mean: subtracted from an image in [0, 1], one a channel.
        std: divides it, one a channel.
        build: returns the library's model, with no head.
        answer: its outputs by the names that `Subject.answers` uses; a part of them.
        code: Python that builds the model, called ``model``.
        size: the one image size that the library's model takes; None: not only one.
        note: what a user must know of the model's answer; empty where it is medssl's embedding.
    """

    library: str
    model: str
    state: dict[str, Tensor]
    head: tuple[str, ...]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    build: Callable[[], nn.Module]
    answer: Callable[[nn.Module, Tensor], Mapping[str, Tensor]]
    code: str
    size: tuple[int, ...] | None = None
    note: str = ""

    @property
    def file(self) -> str:
        """Name of the file."""
        return f"{self.library}_{self.model}.safetensors"

    def prepare(self, images_BC: Tensor) -> Tensor:
        """Return images in [0, 1] as the library's model takes them."""
        shape = (1, -1, *([1] * (images_BC.ndim - 2)))
        if images_BC.shape[1] != self.channels:
            images_BC = images_BC.expand(-1, self.channels, *images_BC.shape[2:])
        mean, std = (torch.tensor(values).view(shape) for values in (self.mean, self.std))
        return (images_BC - mean) / std


class StateDict(Export):
    """A ``.safetensors`` file that torchvision, timm or MONAI loads strictly."""

    description: ClassVar[str] = "plain tensors (safetensors) for torchvision, timm or MONAI"

    def check(self, subject: Subject) -> None:
        """See `Export.check`."""
        plain_of(subject.backbone)

    def files(self, subject: Subject) -> tuple[str, ...]:
        """See `Export.files`."""
        return (plain_of(subject.backbone).file,)

    def write(self, subject: Subject, folder: Path) -> dict[str, Any]:
        """See `Export.write`."""
        plain = plain_of(subject.backbone)
        file = folder / plain.file
        facts = {"format": "pt", "library": plain.library, "model": plain.model}
        if subject.licence:
            facts["licence"] = subject.licence
        state = {name: tensor.detach().contiguous() for name, tensor in plain.state.items()}
        save_file(state, file, metadata=facts)
        return {
            "library": plain.library,
            "model": plain.model,
            "channels": plain.channels,
            "mean": list(plain.mean),
            "std": list(plain.std),
            "head_left_out": list(plain.head),
            "largest_difference": _compare(subject, plain, file),
        }

    def usage(self, subject: Subject) -> str:
        """See `Export.usage`."""
        return _usage(plain_of(subject.backbone), subject.backbone)


def plain_of(backbone: Backbone) -> Plain:
    """Return a backbone as the library it comes from knows it.

    Raises:
        WeightsError: no library has this network, or not for these channels.
    """
    family = backbone.config.name
    makers = {"torchvision": _torchvision, "timm": _timm, "monai": _monai}
    if family not in makers:
        raise WeightsError(
            f"format state_dict: no library has a network like backbone {backbone.describe()}, so "
            f"nothing could load the file (there are: {', '.join(makers)}). Use the formats onnx, "
            "program or bundle."
        )
    return makers[family](backbone)


def _torchvision(backbone: Backbone) -> Plain:
    from torchvision import models

    _check_channels(backbone)
    name: str = backbone.config.variant  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[]):
        model = models.get_model(name, weights=None)
    published = models.get_model_weights(name).DEFAULT.transforms()
    mean, std = tuple(published.mean), tuple(published.std)
    state = _own_names(backbone)
    wanted = model.state_dict()
    head = tuple(key for key in wanted if key not in state)
    parts = {key.partition(".")[0] for key in head}
    if len(parts) != 1 or any(key not in wanted for key in state):
        raise WeightsError(
            f"format state_dict: the tensors of backbone {backbone.describe()} are not those of "
            f"torchvision's {name} without its classifier. Use the formats onnx, program or bundle."
        )
    (part,) = parts
    stem = _stem(state, wanted, backbone)
    if stem is not None:
        state[stem] = _for_three(backbone, state[stem], mean, std)
    elif (backbone.input_mean, backbone.input_std) != (mean, std):
        mean, std = backbone.input_mean, backbone.input_std

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            net = cast("nn.Module", models.get_model(name, weights=None))
        setattr(net, part, nn.Identity())
        return net

    code = (
        "import torch, torchvision\n\n"
        f'model = torchvision.models.get_model("{name}", weights=None)\n'
        f"model.{part} = torch.nn.Identity()"
    )
    shared = ("torchvision", name, state, head, _RGB, mean, std, build)
    if isinstance(model, models.VisionTransformer):
        return Plain(*shared, _patch_means, code, (model.image_size,) * 2, _TOKENS)
    return Plain(*shared, lambda net, x: {EMBEDDING: net(x).flatten(1)}, code)


def _patch_means(model: nn.Module, x_BCXY: Tensor) -> dict[str, Tensor]:
    """Return the mean of the patch tokens after the last norm, which no output of the model is."""
    kept: list[Tensor] = []
    encoder: Any = model.get_submodule("encoder.ln")
    handle = encoder.register_forward_hook(lambda _, __, tokens: kept.append(tokens))
    try:
        model(x_BCXY)
    finally:
        handle.remove()
    return {EMBEDDING: kept[0][:, 1:].mean(dim=1)}


def _timm(backbone: Backbone) -> Plain:
    net: Any = backbone.net
    published = net.default_cfg
    name = str(published["architecture"])
    state = _own_names(backbone)
    channels, mean, std = backbone.in_channels, backbone.input_mean, backbone.input_std
    if backbone.inside_channel:  # timm has no such channel: three of grey say the same
        _check_channels(backbone)
        stem = _stem(state, _built_by_timm(name, _RGB).state_dict(), backbone)
        mean, std = tuple(published["mean"]), tuple(published["std"])
        if stem is not None:
            state[stem] = _for_three(backbone, state[stem], mean, std)
        channels = _RGB
    names = [stage.name for stage in backbone.stages]
    return Plain(
        "timm", name, state, (), channels, mean, std,
        lambda: _built_by_timm(name, channels),
        lambda net, x: dict(zip(names, net(x), strict=True)),
        f'import timm\n\nmodel = timm.create_model("{name}", features_only=True, '
        f"in_chans={channels})",
    )  # fmt: skip


def _built_by_timm(name: str, channels: int) -> nn.Module:
    import timm

    with torch.random.fork_rng(devices=[]):
        return timm.create_model(name, features_only=True, in_chans=channels)


def _monai(backbone: Backbone) -> Plain:
    from monai.networks.nets.resnet import ResNet

    from medssl.models.backbones.monai import RESNET_BLOCKS

    config: Any = backbone.config
    if config.variant != "resnet" or config.norm not in (None, "batch"):
        raise WeightsError(
            f"format state_dict is not offered for backbone {backbone.describe()}. "
            "Use the formats onnx, program or bundle."
        )
    block, layers = RESNET_BLOCKS[config.depth]
    settings: dict[str, Any] = {
        "block": block,
        "layers": list(layers),
        "block_inplanes": [config.base_channels * factor for factor in (1, 2, 4, 8)],
        "spatial_dims": config.spatial_dims,
        "n_input_channels": backbone.in_channels,
        "conv1_t_stride": config.stem_stride,
        "shortcut_type": config.shortcut or "B",
        "feed_forward": False,
        "bias_downsample": False,
    }

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            return ResNet(**settings)

    lines = "".join(f"    {key}={value!r},\n" for key, value in settings.items())
    return Plain(
        "monai", f"resnet{config.depth}", _own_names(backbone), (), backbone.in_channels,
        backbone.input_mean, backbone.input_std, build,
        lambda net, x: {EMBEDDING: net(x).flatten(1)},
        f"from monai.networks.nets.resnet import ResNet\n\nmodel = ResNet(\n{lines})",
    )  # fmt: skip


def _own_names(backbone: Backbone) -> dict[str, Tensor]:
    state = backbone.state_dict()
    if not all(name.startswith(_PREFIX) for name in state):
        raise WeightsError(
            f"format state_dict is not offered for backbone {backbone.describe()}: it is more than "
            "one library's network. Use the formats onnx, program or bundle."
        )
    return {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}


def _stem(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], backbone: Backbone
) -> str | None:
    """Return the one tensor whose shape differs from the library's, or None where none does."""
    found = [name for name in state if state[name].shape != wanted[name].shape]
    if len(found) > 1:
        raise WeightsError(
            f"format state_dict: {len(found)} tensors of backbone {backbone.describe()} have other "
            f"shapes than the library's ({', '.join(found[:4])}), and only a stem can be "
            "rewritten. Use the formats onnx, program or bundle."
        )
    return found[0] if found else None


def _check_channels(backbone: Backbone) -> None:
    if backbone.in_channels not in (1, _RGB):
        raise WeightsError(
            f"format state_dict: the library's model takes three channels, and backbone "
            f"{backbone.describe()} takes {backbone.in_channels}. Use the formats onnx, program or "
            "bundle."
        )


def _for_three(
    backbone: Backbone, stem: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    offset = stem[:, 1:] if backbone.inside_channel else None
    (grey_mean,), (grey_std,) = backbone.input_mean, backbone.input_std
    return spread_grey(
        stem[:, :1], offset, grey_mean=grey_mean, grey_std=grey_std, mean=mean, std=std
    )


def _compare(subject: Subject, plain: Plain, file: Path) -> float:
    """Load the file as a stranger would, strictly, and return the largest difference."""
    model = plain.build()
    try:
        model.load_state_dict(load_file(file), strict=True)
    except RuntimeError:
        raise WeightsError(
            f"{file.name} is wrong and was not kept: {plain.library} does not load it strictly "
            f"into {plain.model}. Use the formats onnx, program or bundle."
        ) from None
    model.eval()
    step = max(*subject.backbone.stages[-1].stride, subject.backbone.divisor)
    size = (2 * step, 3 * step, 2 * step)[: subject.backbone.spatial_dims]
    images = subject.sample_images(2, plain.size or subject.image_size or size)
    with torch.no_grad():
        found = plain.answer(model, plain.prepare(images))
    wanted = {name: tensor for name, tensor in subject.answers(images).items() if name in found}
    return check_equal(found, wanted, file.name)


def _usage(plain: Plain, backbone: Backbone) -> str:
    shape = "1, -1" + ", 1" * backbone.spatial_dims
    copied = plain.channels != backbone.in_channels
    copy = f"images = images.expand(-1, {plain.channels}" + ", -1" * backbone.spatial_dims + ")\n"
    text = f"""`{plain.file}` needs {plain.library} and safetensors, and is loaded strictly.

```python
{plain.code}
from safetensors.torch import load_file

model.load_state_dict(load_file("{plain.file}"), strict=True)
```

Images are those of the contract, in [0, 1]{", grey copied to three" if copied else ""}, then
normalised:

```python
import torch

{copy if copied else ""}mean = torch.tensor({list(plain.mean)})
std = torch.tensor({list(plain.std)})
x = (images - mean.view({shape})) / std.view({shape})
```
"""
    if plain.note:
        text += plain.note
    if plain.head:
        part, names = plain.head[0].partition(".")[0], ", ".join(f"`{n}`" for n in plain.head)
        text += f"""
The classifier is not in the file ({names}): after loading, set
`model.{part}` to one of your own and train it.
"""
    if plain.size:
        text += f"""
The library's model takes images of {" x ".join(map(str, plain.size))} voxels alone; medssl
interpolates the position embeddings for others.
"""
    elif backbone.divisor > 1:
        text += f"""
The library's model answers as medssl's for sizes that are multiples of {backbone.divisor}: medssl
pads other sizes at the far ends with zeros after normalising, and cuts the features.
"""
    return text
