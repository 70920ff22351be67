from pallas_kernels.wkv7.api import wkv7 as wkv7
