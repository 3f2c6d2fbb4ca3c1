# FFN neurons and KV groups: twice the heads at first, the same final shape.
from configs.idea import *

n_head = 8
n_kv_head = 4
head_dim = 16
n_kv_head_target = 2
learning_rate = 8e-3  # at that of idea it ends 0.26 higher
