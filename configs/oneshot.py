# One prune, under one cosine.
from configs.idea import *

prune_schedule = "oneshot"
prune_start = 0.25  # the best of three places, on seeds 11 and 12
