# Prune FFN neurons and KV heads. The model starts with twice as many heads as
# configs/idea.py, and ends with the same shape.
from configs.idea import *

n_head = 8
n_kv_head = 4
head_dim = 8  # d_model / n_head = 32 / 4 in configs/idea.py
n_kv_head_target = 2
