"""Sizes of the chunks and tiles of the forms of this folder."""

from pallas_kernels.dispatch import current_platform

# Bytes of gathered rows in a chunk. On CPUs they should still be in a core's cache for their second use; an accelerator
# needs enough of them to fill it, and 64 MiB is under 1% of what the whole gather takes at B8 T2048 D1024 h8 k16.
CHUNK_BYTES = {"cpu": 2 ** 20}
OTHER_CHUNK_BYTES = 2 ** 26


def chunk_bytes() -> int:
    """Bytes of gathered rows that a chunk may hold on this platform."""
    return CHUNK_BYTES.get(current_platform(), OTHER_CHUNK_BYTES)


def chunk_tokens(token_bytes: int) -> int:
    """Tokens of a chunk, at least one."""
    return max(1, chunk_bytes() // token_bytes)


# TPU kernels. Rows of SLOTS tokens are in VMEM: one being computed, one on its way, one being asked for.
SLOTS = 3


def block_tokens(tokens: int, width: int) -> int:
    """Tokens of a block, a multiple of 16: 256 KiB of float32 for each array of them that VMEM holds."""
    return max(16, min(2 ** 16 // width, -(-tokens // 16) * 16) // 16 * 16)
