"""Pretrain a backbone, and take it into code of your own.

python workflows/pretrain.py configs/pretrain/rotation_3d.yaml runs/rotation
"""

import sys
from pathlib import Path

import torch

import medssl
from medssl.config import load_config
from medssl.pipelines.pretrain import PretrainConfig


def main() -> None:
    """Pretrain as the config given first says, into the run folder given second."""
    config_file, out = map(Path, sys.argv[1:])
    run = medssl.pretrain(load_config(config_file, PretrainConfig), out)
    backbone, contract = medssl.load_backbone(run)
    size = (64,) * contract.spatial_dims
    features = backbone(torch.zeros(1, contract.in_channels, *size))
    for stage, feature in zip(backbone.stages, features, strict=True):
        print(stage.name, tuple(feature.shape))


if __name__ == "__main__":
    main()
