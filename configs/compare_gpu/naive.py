# The usual pipeline: two cosines, one prune between them, a fresh optimizer.
from configs.compare_gpu.idea import *

prune_start = 0.25
prune_schedule = "oneshot"
lr_restart = True
