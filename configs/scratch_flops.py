# The final shape, trained from scratch with the same FLOPs as configs/idea.py. So it
# has more steps.
from configs.scratch import *

max_steps = 4321  # the same FLOPs, to within one step
