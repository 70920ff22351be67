from pallas_kernels.peer_experts.api import peer_experts as peer_experts
from pallas_kernels.peer_experts.api import peer_experts_with_sink as peer_experts_with_sink
from pallas_kernels.peer_experts.rows import TouchedRows as TouchedRows
from pallas_kernels.peer_experts.rows import merge_rows as merge_rows
from pallas_kernels.peer_experts.rows import num_touched as num_touched
