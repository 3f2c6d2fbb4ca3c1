# The lab: IDEA at a size of which a core trains 25 or more an hour, 142 tokens per final
# parameter. The other arms of configs/lab/ start from these lines.
from configs.idea import *

n_layer = 2
d_model = 32
n_head = 4
n_kv_head = 2
d_ff = 256  # 2.7 times the target
d_ff_target = 96

max_steps = 4000
batch_size = 16  # 8.2M tokens, 142 per final parameter
warmup_steps = 100

prune_every = 100

eval_every = 500
save_every = 1000
log_every = 50
