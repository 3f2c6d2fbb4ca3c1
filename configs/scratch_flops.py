# The final shape from the start, with the same FLOPs: max_steps grows until they are spent.
from configs.scratch import *

match_flops = "configs/idea.py"
