"""The config that experiments start from: every group, empty, so that each keeps the defaults of its option class.

    from experiments import base

    def get_config():
        config = base.get_config()
        config.model = dict(embed_dim=256, num_layers=8)
        config.train.steps = 1000
        return config
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """A config with all groups and no field set; docs/config-reference.md lists the fields and their defaults."""
    groups = ("model", "loss", "optimizer", "data", "train", "mesh", "checkpoint", "eval", "log")
    return ConfigDict({group: {} for group in groups}, allow_dotted_keys=True)
