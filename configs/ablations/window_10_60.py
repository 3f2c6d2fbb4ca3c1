# A longer window.
from configs.compare.idea import *

prune_end = 0.6
