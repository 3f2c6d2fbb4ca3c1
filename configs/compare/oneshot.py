# One prune, at a quarter of the run, under the single cosine.
from configs.compare.idea import *

prune_schedule = "oneshot"
prune_start = 0.25
