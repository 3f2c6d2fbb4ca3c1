# The final shape from the start, on the same tokens.
from configs.idea import *

d_ff = d_ff_target
d_ff_target = 0
learning_rate = 3.2e-2  # its best
