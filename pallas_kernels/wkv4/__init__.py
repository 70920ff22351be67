from pallas_kernels.wkv4.api import initial_state as initial_state
from pallas_kernels.wkv4.api import wkv4 as wkv4
