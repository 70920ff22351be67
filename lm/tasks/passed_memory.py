"""Random state passing: rows often begin after another text's memory (Hwang et al. 2024, TransformerFAM, section 3.5).

A model that updates a memory block after block is trained on a few updates. Where rows begin with the memory that the
step before ended with, it meets as many as come, though no gradient flows through more than one step.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.batch import Batch
from lm.core.types import Apply, Array, Carry, Key, Mean, Metrics, Params, State
from lm.tasks.language_modeling import LanguageModeling

SALT = 2**31 - 2  # of this draw, which no layer folds its key by


@dataclasses.dataclass(frozen=True)
class PassedMemory:
    """`inner`, with rows that begin after the memory of the first row of the batch before, all of them with this
    probability and else from nothing. The carry is that memory, layer by layer, float32.

    inner: an objective that takes a state and gives one. initial_state(rows): the model's.
    """

    inner: LanguageModeling
    initial_state: Callable[[int], State]
    probability: float
    carry_per_row: bool = False

    @property
    def weights(self) -> Mapping[str, Any]:
        """Weight of each term."""
        return self.inner.weights

    @property
    def not_additive(self) -> tuple[str, ...]:
        """As of the inner one."""
        return self.inner.not_additive

    def counts(self, batch: Batch) -> Mapping[str, Array]:
        """The weight that each term divides by."""
        return self.inner.counts(batch)

    def __call__(self, apply: Apply, params: Params, carry: Carry, batch: Batch,
                 key: Key | None) -> tuple[Mapping[str, Mean], Carry, Metrics]:
        """(means of the terms, memory after the first row, metrics of the inner one and `passed`, how often rows began
        with a memory)."""
        nothing = self.initial_state(batch.tokens.shape[0])
        wanted = key is not None and jax.random.bernoulli(jax.random.fold_in(key, SALT), self.probability)
        uses = [there & wanted for _, there in carry]
        given = iter([(memory, use) for (memory, _), use in zip(carry, uses, strict=True)])
        state = jax.tree.map(lambda node: node.begun(*next(given)) if has_memory(node) else node, nothing,
                             is_leaf=has_memory)
        means, after, metrics = self.inner(apply, params, state, batch, key)
        passed = jnp.mean(jnp.stack([jnp.mean(use.astype(jnp.float32)) for use in uses]))
        return means, handed_on(after, carry), {**metrics, "passed": Mean(passed, jnp.ones(()))}


def has_memory(node: Any) -> bool:
    """Whether a part of a state has a memory that other rows can begin with."""
    return hasattr(node, "begun") and hasattr(node, "passed")


def handed_on(state: State, before: Carry) -> Carry:
    """The memory of the first row of every layer, and whether there is one; that of before where there is none."""
    nodes = [node for node in jax.tree.leaves(state, is_leaf=has_memory) if has_memory(node)]
    out = []
    for node, (old, was) in zip(nodes, before, strict=True):
        memory, there = jax.lax.stop_gradient(node.passed())
        rows = there.reshape(*there.shape, *[1] * (memory.ndim - there.ndim))
        out.append((jnp.where(rows, memory, old), there | was))
    return out


def first_carry(initial_state: Callable[[int], State]) -> Callable[[], Carry]:
    """What makes the carry before the first step. Raises ValueError for a model without a memory to pass on."""
    make = lambda: [node.passed() for node in jax.tree.leaves(initial_state(1), is_leaf=has_memory)
                    if has_memory(node)]
    if not any(memory.shape[-2] for memory, _ in jax.eval_shape(make)):
        raise ValueError("train.pass_memory passes on the feedback memory of `fam` layers, and this model has none; "
                         "leave it out, or give a layer of kind fam slots")
    return make
