# As many units at each prune.
from configs.compare.idea import *

prune_schedule = "linear"
