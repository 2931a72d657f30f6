from __future__ import annotations

import pytest
import torch

from medssl.errors import ConfigError
from medssl.models.heads import PooledHead, SiameseHead


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5, 7), (4, 6, 3, 2, 5)])
@pytest.mark.parametrize("hidden", [None, 8])
def test_a_pooled_head_answers_vectors_and_feature_maps(shape, hidden):
    assert PooledHead(6, 3, hidden)(torch.rand(shape)).shape == (4, 3)


def test_a_pooled_head_answers_a_constant_map_as_its_value():
    head = PooledHead(6, 3)
    vector = torch.rand(2, 6)
    maps = vector[..., None, None].expand(-1, -1, 4, 4)
    torch.testing.assert_close(head(maps), head(vector))


def test_a_siamese_head_knows_the_order_of_its_views():
    head = SiameseHead(5, num_views=2, out_channels=8)
    views = torch.rand(3, 2, 5)
    assert head(views).shape == (3, 8)
    assert not torch.allclose(head(views), head(views.flip(1)))


@pytest.mark.parametrize("shape", [(3, 3, 5), (3, 10)])
def test_a_siamese_head_refuses_another_number_of_views(shape):
    with pytest.raises(
        ConfigError, match=r"compares 2 views an image, found .* wanted \(B, 2, C\)"
    ):
        SiameseHead(5, num_views=2, out_channels=8)(torch.rand(shape))
