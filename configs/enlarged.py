# The enlarged model, never pruned. It shows how much IDEA could gain at most.
from configs.idea import *

d_ff_target = 0
