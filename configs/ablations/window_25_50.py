# The window later.
from configs.compare.idea import *

prune_start = 0.25
prune_end = 0.5
