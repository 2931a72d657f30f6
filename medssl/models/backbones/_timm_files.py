"""Files of timm's weights: where they are published, and what of them goes where.

Source: Wightman, PyTorch image models, https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import timm as timm_models
import torch
from torch import Tensor, nn

from medssl.errors import ConfigError, WeightsError
from medssl.models.backbones.base import AdaptedState, ImagenetWeights, missing_names
from medssl.models.stems import RGB

HEAD = (
    "_conv_head.weight",
    "_bn1.weight",
    "_bn1.bias",
    "_bn1.running_mean",
    "_bn1.running_var",
    "_bn1.num_batches_tracked",
    "_fc.weight",
    "_fc.bias",
)
"""The last tensors of efficientnet_lite0's file: the classifier, with the 1 x 1 convolution that
belongs to it."""

COUNTER = "num_batches_tracked"
HUB = "https://huggingface.co"
HUB_FILE = "model.safetensors"
"""What timm's repositories on the hub call their weights."""

FIRST_MARK = 1 << 20
"""Tensors of one value each stand for a file's tensors, to learn where timm loads them. Integers
from here on are exact in float32, and no network starts with such values."""

PLAIN_FILES = ("https://github.com/", "https://download.pytorch.org/")
"""Sites whose files hold the tensors by name and nothing around them."""

_DIGITS = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt|bin|safetensors)$")
_OF_IMAGENET = re.compile(r"in(1|12|21|22)k")

NOT_BUILT = (RuntimeError, AssertionError, AttributeError, TypeError, ValueError, KeyError)
"""What timm's constructors and networks raise for what they cannot do."""


def published_weights(variant: str) -> ImagenetWeights | None:
    """Return the file of ImageNet weights that timm names for a variant, or None.

    A file of GitHub or PyTorch whose name carries its hash comes first, then the hub's, which
    states none. The hub calls every file the same, so here it has the name of its repository.

    Raises:
        ConfigError: the variant's weights were not made on ImageNet, by their tag.
    """
    cfg = timm_models.get_pretrained_cfg(variant)
    if cfg is None or not (cfg.url or cfg.hf_hub_id):
        return None
    if cfg.tag and not _OF_IMAGENET.search(cfg.tag):
        model = variant.partition(".")[0]
        others = [n for n in timm_models.list_pretrained(f"{model}.*") if _OF_IMAGENET.search(n)]
        raise ConfigError(
            f"init imagenet: timm's weights {cfg.tag!r} of {model} were not made on ImageNet. "
            f"Variants that were: {', '.join(others) or 'none; use another init'}."
        )
    licence = str(cfg.license or "")
    url = str(cfg.url or "")
    digits = _DIGITS.search(url)
    readable = url and not cfg.custom_load
    if readable and (not cfg.hf_hub_id or (digits and url.startswith(PLAIN_FILES))):
        sha256 = digits.group(1) if digits else None
        return ImagenetWeights(url.rpartition("/")[2], sha256, url=url, licence=licence)
    if not cfg.hf_hub_id:
        return None
    remote = cfg.hf_hub_filename or HUB_FILE
    url = f"{HUB}/{cfg.hf_hub_id}/resolve/main/{remote}"
    return ImagenetWeights(remote, None, url=url, licence=licence)


def create_features(variant: str, in_channels: int, options: Mapping[str, Any], **more: Any) -> Any:
    """Return timm's network for features.

    Args:
        variant: by timm's name.
        in_channels: channels of the network's input.
        options: see `medssl.models.backbones.timm.ANY_SIZE`.
        more: further arguments of timm's constructor.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # renamed models: the new one is built all the same
        return timm_models.create_model(
            variant, features_only=True, in_chans=in_channels, **options, **more
        )


def by_position(file_state: Mapping[str, Tensor], wanted: list[str], source: str) -> AdaptedState:
    """Match efficientnet_lite0's file with timm's tensors, in order.

    The file names its tensors differently, but holds them in the order of the layers; each pair
    must have the same kind (``weight``, ``running_mean``, …), and its shape is checked on loading.
    """
    missing = missing_names(HEAD, file_state)
    if missing:
        raise WeightsError(f"{source}: the classifier's {', '.join(missing)} are missing.")
    found = [(key, tensor) for key, tensor in file_state.items() if key not in HEAD]
    if len(found) != len(wanted):
        raise WeightsError(
            f"{source}: found {len(found)} tensors before the classifier, wanted "
            f"{len(wanted)}. It is another network's file."
        )
    state: dict[str, Tensor] = {}
    for name, (key, tensor) in zip(wanted, found, strict=True):
        if name.rpartition(".")[2] != key.rpartition(".")[2]:
            raise WeightsError(
                f"{source}: tensor {key} stands where net.{name} is wanted. "
                "The order of its tensors is not the published one."
            )
        state[name] = tensor
    return AdaptedState(state, head=HEAD)


def by_timm(
    file_state: Mapping[str, Tensor], variant: str, options: Mapping[str, Any], source: str
) -> AdaptedState:
    """Let timm load the file, and learn from marked tensors what went where.

    timm renames and reshapes tensors as it loads them, into the whole network as into the one for
    features, but is not always strict. So a file of marks, every tensor filled with a number of
    its own, is loaded first: in the whole network each tensor must carry a mark and each mark must
    arrive, so the file is this network's. In the network for features each tensor must carry a
    mark too; the marks that do not arrive there are the head's.
    """
    keys = list(file_state)
    marks = {
        key: torch.full(
            tensor.shape,
            FIRST_MARK + number,
            dtype=torch.float32 if tensor.is_floating_point() else torch.int64,
        )
        for number, (key, tensor) in enumerate(file_state.items())
    }
    whole = _origins(_loaded(variant, marks, source), keys)
    counters = [name for name in whole if name.endswith(COUNTER)]
    uncounted = bool(counters) and all(whole[name] is None for name in counters)
    missing = [n for n, key in whole.items() if key is None and not (uncounted and n in counters)]
    extra = sorted(set(keys) - {key for key in whole.values() if key is not None})
    for names, problem in ((missing, "lacks"), (extra, "has, beyond those,")):
        if names:
            raise WeightsError(
                f"{source}: {problem} {len(names)} of the tensors of timm's {variant}, "
                f"the first is {names[0]}. Use the published file."
            )
    origins = _origins(_loaded(variant, marks, source, options), keys)
    state: dict[str, Tensor] = _loaded(variant, file_state, source, options)
    adapted: list[tuple[str, str]] = []
    for name, key in origins.items():
        if key is None and not (uncounted and name.endswith(COUNTER)):
            raise WeightsError(
                f"{source}: nothing of it reaches tensor {name} of timm's {variant} as a network "
                "for features. Choose another variant."
            )
        if key is not None and not _same(state[name], file_state[key]):
            adapted.append((name, f"{key}, rearranged or converted by timm's own loading"))
    if uncounted:
        adapted.append((COUNTER, "not in the file, a count and no weight; kept at 0"))
    used = set(origins.values())
    head = tuple(key for key in keys if key not in used)
    return AdaptedState(state, head=head, adapted=tuple(adapted))


def _loaded(
    variant: str,
    state: Mapping[str, Tensor],
    source: str,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Return the tensors of timm's network after timm loaded a file into it.

    Args:
        variant: the network.
        state: the file's tensors.
        source: the file's name.
        options: of the network for features; None: the whole network, with its classifier.
    """
    # Sources that timm would rather load from, or would load through foreign code, are taken out.
    given: dict[str, Any] = {"state_dict": dict(state), "custom_load": False, "source": ""}
    pretrained: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": given}
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net: nn.Module = (
                timm_models.create_model(variant, **pretrained)
                if options is None
                else create_features(variant, RGB, options, **pretrained)
            )
    except (*NOT_BUILT, IndexError) as error:
        raise WeightsError(
            f"{source}: timm's {variant} does not load it: {first_line(error)}. "
            "Use the published file."
        ) from None
    return dict(net.state_dict())


def _origins(state: Mapping[str, Tensor], keys: list[str]) -> dict[str, str | None]:
    """Return, for tensors loaded from marks, the key in the file that each came from."""
    origins: dict[str, str | None] = {}
    for name, tensor in state.items():
        mark = tensor.flatten()[0].item() - FIRST_MARK if tensor.numel() else -1
        known = 0 <= mark < len(keys) and bool((tensor == tensor.flatten()[0]).all())
        origins[name] = keys[int(mark)] if known else None
    return origins


def _same(loaded: Tensor, own: Tensor) -> bool:
    return (
        loaded.shape == own.shape and loaded.dtype == own.dtype and bool(torch.equal(loaded, own))
    )


def first_line(error: Exception) -> str:
    """Return what timm says, in one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    return text if len(text) <= 160 else text[:159] + "…"
