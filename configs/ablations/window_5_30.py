# The window earlier.
from configs.compare.idea import *

prune_start = 0.05
prune_end = 0.3
