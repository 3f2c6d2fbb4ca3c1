# One prune at the start of the window, under the single cosine.
from configs.compare_gpu.idea import *

prune_schedule = "oneshot"
