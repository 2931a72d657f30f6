"""Go on pretraining from the weights of an earlier run, and see where they come from.

python workflows/continual_pretraining.py configs/pretrain/inpainting_3d.yaml runs/old runs/new
"""

import json
import sys
from pathlib import Path

import medssl
from medssl.config import load_config
from medssl.models.checkpoints import lineage
from medssl.pipelines.pretrain import PretrainConfig


def main() -> None:
    """Pretrain as the config given first says, from the run given second, into the third."""
    config_file, earlier, out = map(Path, sys.argv[1:])
    start = json.dumps({"name": "checkpoint", "path": str(earlier)})
    config = load_config(config_file, PretrainConfig, [f"init={start}"])
    _, contract = medssl.load_backbone(medssl.pretrain(config, out))
    print("lineage:", lineage(contract))
    print("patients seen on the way:", len(contract.patients))


if __name__ == "__main__":
    main()
