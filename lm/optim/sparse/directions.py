"""The optimizers that tables may have row by row, by name."""

import optax

from lm.optim.options import OptimizerOptions


def row_direction(options: OptimizerOptions) -> optax.GradientTransformation:
    """What `options.sparse_tables` names, without learning rate and weight decay.

    adamw: Adam. adagrad: the gradient over the root of the sum of all squares (Duchi et al. 2011). sgd: momentum.
    """
    if options.sparse_tables == "adamw":
        return optax.scale_by_adam(0.9 if options.b1 is None else options.b1,
                                   0.95 if options.b2 is None else options.b2, options.eps)
    if options.sparse_tables == "adagrad":
        return optax.scale_by_rss(initial_accumulator_value=0.0, eps=options.eps**2)
    momentum = 0.9 if options.momentum is None else options.momentum
    return optax.trace(momentum, bool(options.nesterov)) if momentum else optax.identity()
