# The final shape from the start, with the FLOPs of IDEA: more steps.
from configs.compare_gpu.scratch import *

match_flops = "configs/compare_gpu/idea.py"
