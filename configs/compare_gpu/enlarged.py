# The enlarged model, never pruned: the ceiling.
from configs.compare_gpu.idea import *

d_ff_target = 0
