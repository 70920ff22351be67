"""The names of mesh axes and logical axes, and the one table that maps the second to the first.

A parameter or activation names its dimensions with logical axes ("embed", "heads"); the table says over which mesh axes
each is split. Nothing else in the project names a mesh axis for a parameter.
"""

# Outermost first: the axes whose collectives are rarest and largest come first, so that `tensor`, which talks in every
# layer, gets the nearest neighbours.
MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")

BATCH_AXES = ("data", "fsdp")  # mesh axes that split the rows of a batch

RUNS = "runs"  # the one axis of a mesh of devices that have whole runs each, see `lm.train.places`

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": BATCH_AXES,
    "length": ("context",),
    "activation_embed": (),
    # parameters (the same names split activations where they appear in both)
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "layers": (),
}
