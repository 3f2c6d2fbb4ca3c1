# Remove a quarter of SmolLM2's neurons at once, after 6 steps. The unpruned model is
# the teacher of the pruned one.
from configs.smollm2 import *

teacher = init_from  # if you give another --init_from, give --teacher, too
d_ff_target = 1152  # of 1536

max_steps = 480  # half an hour to an hour on a CPU core
warmup_steps = 6
prune_schedule = "oneshot"
prune_start = 0.0125  # of 480 steps
