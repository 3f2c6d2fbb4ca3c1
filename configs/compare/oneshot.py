# One prune at the start of the window, under the single cosine.
from configs.compare.idea import *

prune_schedule = "oneshot"
