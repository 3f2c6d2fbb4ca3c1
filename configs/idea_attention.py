# FFN neurons and KV heads: twice the heads at first, the same final shape.
from configs.idea import *

n_head = 8
n_kv_head = 4
head_dim = 8  # as 32 / 4 in the base
n_kv_head_target = 2
