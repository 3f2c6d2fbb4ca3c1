# One prune under the one cosine, after 25%, where it ended lowest; naive.py ended lowest after 10%.
from configs.idea import *

prune_schedule = "oneshot"
prune_start = 0.25  # of three places, the best on seeds 11 and 12
