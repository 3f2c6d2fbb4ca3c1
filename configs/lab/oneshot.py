# One prune, under the single cosine.
from configs.lab.idea import *

prune_schedule = "oneshot"
prune_start = 0.25  # of three places, the best on seeds 11 and 12
