# The enlarged model, never pruned: the ceiling.
from configs.compare.idea import *

d_ff_target = 0
