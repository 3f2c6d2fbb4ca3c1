# The final shape from the start, on the same tokens.
from configs.compare.idea import *

d_ff = d_ff_target
d_ff_target = 0
learning_rate = 1.3e-2  # between the two best of its sweep
