"""Networks: backbones, heads, decoders, inits and checkpoints."""
