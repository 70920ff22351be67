"""An optimizer applied to every layer of a stack by itself.

Leaves under `pattern_<k>` hold one parameter of each repeated layer on a leading axis. Adam, Lion and SGD work element
by element and do not see it; an optimizer that looks at a whole parameter (its shape, its norm) must.
"""

import jax
import optax


def per_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` mapped over the leading axis of all leaves, which must be equally long: exactly what `tx` does to separately
    held layers. State arrays get the same leading axis; scalars of the state (step counts) are shared by the layers.
    """

    def axes(params):
        layer = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), params)
        return jax.tree.map(lambda s: 0 if s.ndim else None, jax.eval_shape(tx.init, layer))

    def init(params):
        return jax.vmap(tx.init, out_axes=axes(params))(params)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("per_layer needs the parameters in update(updates, state, params)")
        over = axes(params)
        return jax.vmap(tx.update, in_axes=(0, over, 0), out_axes=(0, over))(updates, state, params)

    return optax.GradientTransformation(init, update)
