# KV groups instead of neurons: twice the heads at first.
from configs.compare.idea import *

d_ff = 96
d_ff_target = 0
n_head, n_kv_head, head_dim = 8, 4, 8
n_kv_head_target = 2
