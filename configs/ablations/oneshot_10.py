# One prune where the window opens.
from configs.compare.idea import *

prune_schedule = "oneshot"
