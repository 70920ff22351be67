from lm.layers.block_sliding.bands import Columns as Columns
from lm.layers.block_sliding.bands import Keys as Keys
from lm.layers.block_sliding.bands import Queries as Queries
from lm.layers.block_sliding.bands import chunking as chunking
from lm.layers.block_sliding.bands import in_chunks as in_chunks
from lm.layers.block_sliding.bands import padded as padded
from lm.layers.block_sliding.bands import weighted as weighted
from lm.layers.block_sliding.dispatch import block_sliding_attention as block_sliding_attention
