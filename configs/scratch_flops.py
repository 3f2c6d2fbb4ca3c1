# The final shape from the start, with the FLOPs of IDEA: more steps.
from configs.scratch import *

max_steps = 4321  # as many FLOPs as configs/idea.py, to one step
