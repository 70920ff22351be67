"""The tables of a model whose gradients may be taken as rows: those of layers that retrieve by product keys."""

from lm.core.tables import Table
from lm.layers.fam_block import FAMBlock
from lm.models.decoder import DecoderLM


def tables_of(model: DecoderLM) -> dict[str, Table]:
    """Each such table by its parameter's name; a stack of layers has one."""
    return {f"{place}/{name}/{layer.table}": Table(layer.num_rows, layer.num_heads, layer.top_k, layer.table_axes, runs)
            for place, block, repeats, runs in model.blocks() if repeats
            for name, layer in zip(block.names, block.layers, strict=True)
            # A mixer of fam runs for its memory besides, which rows that are counted for the tokens do not hold.
            if hasattr(layer, "table_axes") and not isinstance(block, FAMBlock)}
