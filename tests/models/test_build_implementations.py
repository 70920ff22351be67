"""A named implementation is asked for where tokens are computed, not where parameters are made."""

import jax
import jax.numpy as jnp
import pytest

from lm.models.build import abstract_params, build_model, make_apply

WINDOW = dict(block=128, memory=1, cut="row")
KINDS = {"attention": {}, "bswa": WINDOW, "fam": WINDOW | dict(slots=0)}


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_made_where_the_implementation_does_not_serve(kind):
    """One token, here and on a TPU, which splash attention serves in neither."""
    model = build_model(dict(embed_dim=256, num_layers=1, vocab_size=64, pattern=(f"{kind}/mlp",), mlp=dict(),
                             **{kind: dict(num_heads=2, implementation="splash", **KINDS[kind])}), 64)
    params = abstract_params(model)
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)):
        assert jax.tree.structure(abstract_params(model)) == jax.tree.structure(params)
    with pytest.raises(ValueError, match="not 'splash': it is a TPU kernel and this is cpu"):
        jax.eval_shape(make_apply(model), params, jnp.zeros((1, 256), jnp.int32))
