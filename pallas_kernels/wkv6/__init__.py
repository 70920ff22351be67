from pallas_kernels.wkv6.api import wkv6 as wkv6
