# The enlarged model, never pruned: the ceiling.
from configs.lab.idea import *

d_ff_target = 0
