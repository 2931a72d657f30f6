"""Heads: the small networks that a task puts on a backbone's features."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from medssl.errors import ConfigError


class PooledHead(nn.Module):
    """A linear layer, or a layer of hidden units and a linear layer, on one vector an image.

    Args:
        in_channels: length of the vector, or feature maps of the stage.
        out_channels: number of outputs.
        hidden_channels: units of a hidden layer; None: linear.
    """

    def __init__(
        self, in_channels: int, out_channels: int, hidden_channels: int | None = None
    ) -> None:
        super().__init__()
        self.layers = _perceptron(in_channels, out_channels, hidden_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out_channels) for vectors (B, in_channels) or feature maps (B, C, X, Y[, Z]).

        Feature maps are averaged over all positions first.
        """
        pooled = x if x.ndim == 2 else x.flatten(2).mean(dim=2)
        return cast("Tensor", self.layers(pooled))


class SiameseHead(nn.Module):
    """Answers a question about several views of an image, each embedded alone by the same network.

    The embeddings are concatenated in the order of the views (late fusion), so the order carries
    meaning: which view is the first, or where each tile lies.

    Args:
        in_channels: length of one view's embedding.
        num_views: views an image.
        out_channels: number of outputs.
        hidden_channels: units of the hidden layer.
    """

    def __init__(
        self, in_channels: int, num_views: int, out_channels: int, hidden_channels: int = 512
    ) -> None:
        super().__init__()
        self.num_views = num_views
        self.layers = _perceptron(in_channels * num_views, out_channels, hidden_channels)

    def forward(self, embeddings_BVC: Tensor) -> Tensor:
        """Return (B, out_channels) for the embeddings (B, num_views, in_channels)."""
        if embeddings_BVC.ndim != 3 or embeddings_BVC.shape[1] != self.num_views:
            raise ConfigError(
                f"this head compares {self.num_views} views an image, found embeddings of shape "
                f"{tuple(embeddings_BVC.shape)}, wanted (B, {self.num_views}, C)."
            )
        return cast("Tensor", self.layers(embeddings_BVC.flatten(1)))


def _perceptron(in_channels: int, out_channels: int, hidden_channels: int | None) -> nn.Module:
    if hidden_channels is None:
        return nn.Linear(in_channels, out_channels)
    return nn.Sequential(
        nn.Linear(in_channels, hidden_channels),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_channels, out_channels),
    )
