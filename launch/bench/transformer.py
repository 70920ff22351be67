"""Our own transformer at the width of the benchmarks: rotary attention and a GELU MLP."""

from typing import Any

from launch.bench.sizes import HEADS, LAYERS, WIDTH


def config(seq_len: int) -> dict[str, Any]:
    """The `model` group."""
    return dict(embed_dim=WIDTH, num_layers=LAYERS, pattern=("attention/mlp",), norm="layer",
                attention=dict(num_heads=HEADS), mlp=dict(mlp_dim=4 * WIDTH, activation="gelu"), dtype="float32",
                scan=False)
