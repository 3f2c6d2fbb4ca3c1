# The final shape from the start, on the same tokens.
from configs.idea import *

d_ff = d_ff_target
d_ff_target = 0
learning_rate = 5.6e-3  # the best of four for it; at that of idea it ends 0.24 higher
