# The final shape, trained from scratch on the same tokens as configs/idea.py.
from configs.idea import *

d_ff = d_ff_target
d_ff_target = 0
learning_rate = 3.2e-2  # the best for this shape
