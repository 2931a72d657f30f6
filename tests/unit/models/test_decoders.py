from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.errors import ConfigError
from medssl.models.backbones.base import Backbone
from medssl.models.backbones.monai import Config, MonaiBackbone
from medssl.models.build import seeded_construction
from medssl.models.decoders import UNetDecoder


def small(spatial_dims: int, stem_stride: int = 2) -> tuple[Backbone, UNetDecoder]:
    config = Config(depth=10, spatial_dims=spatial_dims, base_channels=4, stem_stride=stem_stride)  # type: ignore[arg-type]
    with seeded_construction(0, "test"):
        backbone = MonaiBackbone(config)
        decoder = UNetDecoder(backbone, out_channels=3, channels=(8, 8, 4, 4, 4))
    return backbone.eval(), decoder.eval()


NETWORKS = {(dims, stride): small(dims, stride) for dims in (2, 3) for stride in (1, 2)}


@settings(max_examples=25, deadline=None)
@given(
    key=st.sampled_from(sorted(NETWORKS)),
    size=st.tuples(*[st.integers(min_value=17, max_value=45)] * 3),
)
def test_the_output_has_exactly_the_size_of_the_image(key, size):
    backbone, decoder = NETWORKS[key]
    size = size[: key[0]]
    with torch.inference_mode():
        out = decoder(backbone(torch.rand(1, 1, *size)), size)
    assert out.shape == (1, 3, *size)


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_an_image_is_decoded_alike_alone_and_in_a_batch(norm):
    backbone, _ = small(2)
    with seeded_construction(0, "test"):
        decoder = UNetDecoder(backbone, 2, norm=norm)
    x_BC = torch.rand(3, 1, 40, 33, generator=torch.Generator().manual_seed(0))
    size = (40, 33)
    with torch.inference_mode():
        together = decoder(backbone(x_BC), size)
        alone = decoder(backbone(x_BC[1:2]), size)
        evaluated = decoder.eval()(backbone(x_BC), size)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together, evaluated)


@pytest.mark.parametrize("norm", ["instance", "group", "batch"])
def test_every_norm_learns(norm):
    backbone, _ = small(2)
    with seeded_construction(0, "test"):
        decoder = UNetDecoder(backbone, 1, channels=(8, 8, 8, 8, 8), norm=norm)
    generator = torch.Generator().manual_seed(0)
    x_BC = torch.rand(2, 1, 32, 32, generator=generator)
    wanted = (x_BC > 0.5).float()
    optimizer = torch.optim.AdamW([*backbone.parameters(), *decoder.parameters()], lr=3e-3)
    losses = []
    for _ in range(30):
        out = decoder(backbone.train()(x_BC), (32, 32))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(out, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]


def test_channels_that_do_not_match_the_stages_are_refused():
    backbone, _ = small(2)
    with pytest.raises(ConfigError, match=r"found 2 levels \(8, 4\), wanted 5 for backbone monai"):
        UNetDecoder(backbone, 1, channels=(8, 4))
