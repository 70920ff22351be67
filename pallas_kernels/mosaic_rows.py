"""What Mosaic GPU kernels over [B, T, C] share: a warpgroup has one batch row and `WIDTH` channels, one a thread.

It goes through time in blocks of steps. The copy engine (TMA) brings the blocks of all inputs into shared memory, some
blocks ahead, and takes the finished ones back. Rows of a block are read and written by the thread whose channel it is,
so between steps nothing has to be waited for. Reads beyond the last step bring zeros and writes there go nowhere.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import gpu
from pallas_kernels.arguments import vary_alike

Array = jax.Array
WIDTH = 128         # channels of a block: the threads of a warpgroup
GROUP = 16          # steps written out one after the other in a loop's body; two groups share a word of resets
_ROW = 64           # bytes of a channel in a block


class Plan(NamedTuple):
    """How the kernel goes through [B, T, C] arrays: blocks of `steps` steps, `slots` of them in shared memory."""
    batch: int
    length: int
    width: int
    steps: int
    slots: int

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.length, self.steps)

    @property
    def whole(self) -> bool:
        """Whether the last block is full."""
        return self.length % self.steps == 0


def plan(x: Array, slots: int = 3) -> Plan:
    """For arrays like x, whose channels fill blocks: see `padded`."""
    batch, length, width = x.shape
    fits = pl.cdiv(length, GROUP) * GROUP
    return Plan(batch, length, width, min(_ROW // x.dtype.itemsize, fits), slots)


def padded(x: Array) -> Array:
    """x with zeros up to whole blocks of channels: the copy engine wants rows of 16 bytes, and blocks are full."""
    missing = -x.shape[-1] % WIDTH
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def call(name: str, plan: Plan, body: Callable, inputs: Sequence[Array], others: Sequence[Array],
         outputs: Sequence[Any], rows: Sequence[Any]) -> list[Array]:
    """[*outputs, *rows] from body(place, other refs, input refs, output refs, row refs), refs of global memory.

    inputs, outputs: [B, T, C], which go through shared memory; others are read, and rows written, as they are.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu
    memory = [plgpu.SMEM((plan.slots, plan.steps, WIDTH), x.dtype) for x in (*inputs, *outputs)]
    sizes = [len(others), len(inputs), len(outputs), len(rows), len(inputs), len(outputs)]

    def kernel(*refs):
        *refs, barrier = refs
        *parts, shared_inputs, shared_outputs = _split(refs, sizes)
        channels = pl.ds(jax.lax.axis_index("channels") * WIDTH, WIDTH)
        body(Place(plgpu, plan, jax.lax.axis_index("batch"), channels, shared_inputs, shared_outputs, barrier), *parts)

    kernel.__name__ = name
    # A thread reads and writes its own channel alone, so no barrier is wanted between a read and a write of a row.
    made = plgpu.kernel(
        kernel, out_type=[*outputs, *rows], grid=(plan.batch, plan.width // WIDTH), grid_names=("batch", "channels"),
        scratch_types=[*memory, plgpu.Barrier(num_arrivals=len(inputs), num_barriers=plan.slots)],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True,
                                             lowering_semantics=plgpu.LoweringSemantics.Lane), **gpu.interpret_mosaic(),
    )(*others, *inputs)
    return list(vary_alike(*inputs, *made)[len(inputs):])       # `plgpu.kernel` forgets the axes of jax.shard_map


class Place(NamedTuple):
    """The part of the arrays that one warpgroup works on."""
    plgpu: Any
    plan: Plan
    row: Array              # of the batch
    channels: Any           # slice
    inputs: Sequence        # shared memory [slots, steps, channels] for each input
    outputs: Sequence
    barrier: Any

    def through_time(self, given: Sequence, made: Sequence, backwards: bool, block: Callable, carry):
        """carry = block(start, input refs, output refs, carry), refs [steps, channels], over all blocks of steps."""
        plgpu, plan = self.plgpu, self.plan
        start = lambda i: (plan.blocks - 1 - i if backwards else i) * plan.steps
        part = lambda ref, i: ref.at[self.row, pl.ds(start(i), plan.steps), self.channels]

        def fetch(i, slot):
            for ref, shared in zip(given, self.inputs, strict=True):
                plgpu.copy_gmem_to_smem(part(ref, i), shared.at[slot], self.barrier.at[slot])

        def one(i, carry):
            slot = jax.lax.rem(i, jnp.int32(plan.slots))
            plgpu.barrier_wait(self.barrier.at[slot])
            plgpu.wait_smem_to_gmem(plan.slots - 1, wait_read_only=True)    # what was in this slot has left
            carry = block(start(i), [x.at[slot] for x in self.inputs], [x.at[slot] for x in self.outputs], carry)
            plgpu.commit_smem()             # all threads are done with the slot
            for ref, shared in zip(made, self.outputs, strict=True):
                plgpu.copy_smem_to_gmem(shared.at[slot], part(ref, i), commit_group=False)
            plgpu.commit_smem_to_gmem_group()

            @pl.when(i + plan.slots < plan.blocks)
            def _():
                fetch(i + plan.slots, slot)

            return carry

        for i in range(min(plan.slots, plan.blocks)):
            fetch(jnp.int32(i), i)
        carry = jax.lax.fori_loop(0, plan.blocks, one, carry)
        plgpu.wait_smem_to_gmem(0)
        return carry

    def read(self, ref, *index) -> Array:
        """The row of the place's channels in float32, from global memory [B, *index, C].

        Inside of jax.shard_map what is read has a type that varies over the mesh, and what is computed has not; loops
        want one type, so the row is computed, too: times 1.
        """
        return ref[self.row, *index, self.channels].astype(jnp.float32) * 1.0

    def write(self, ref, value: Array, *index) -> None:
        """The opposite, into an array of float32."""
        ref[self.row, *index, self.channels] = value

    def full(self, value: float) -> Array:
        """A row of one value that loops can carry: each thread holds its own, as it does of rows that were read."""
        layout = self.plgpu.Layout.WG_STRIDED((WIDTH,), 1)
        return self.plgpu.layout_cast(jnp.full((WIDTH,), value, jnp.float32), layout)

    def in_groups(self, start, words: Sequence, backwards: bool, group: Callable, carry):
        """carry = group(first, moments, carry) over the groups of a block; moments: (forget, here) of each step.

        forget(x, empty) is x, or `empty` where the row resets at that step; here(new, old) is `new`, where the step is
        one of the array. first: index of the group's first step in the block.
        """
        plan = self.plan

        def body(g, carry):
            first = (plan.steps // GROUP - 1 - g if backwards else g) * GROUP
            word = words[0][self.row, jnp.minimum((start + first) >> 5, words[0].shape[1] - 1)] if words else None
            return group(first, [self._moment(start + first + j, word) for j in range(GROUP)], carry)

        return jax.lax.fori_loop(0, plan.steps // GROUP, body, carry)

    def _moment(self, step, word) -> tuple[Callable, Callable]:
        forget = lambda x, empty: x
        if word is not None:
            restarts = (word >> (step & 31)) & 1
            forget = lambda x, empty: jnp.where(restarts != 0, empty, x)
        if self.plan.whole:
            return forget, lambda new, old: new
        return forget, lambda new, old: jax.tree.map(lambda x, y: jnp.where(step < self.plan.length, x, y), new, old)


def read_group(refs: Sequence, first) -> list[list[Array]]:
    """The rows of a group's steps, one list a step, in float32: all are asked for before the chain that needs them."""
    return [[x[first + j].astype(jnp.float32) for x in refs] for j in range(GROUP)]


def _split(refs: Sequence, sizes: Sequence[int]) -> list[Sequence]:
    out, start = [], 0
    for size in sizes:
        out.append(refs[start:start + size])
        start += size
    return out
