# The final shape from the start, with the FLOPs of IDEA: more steps.
from configs.compare.scratch import *

match_flops = "configs/compare/idea.py"
