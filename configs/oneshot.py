# One prune, at the start of the window, under the single cosine.
from configs.idea import *

prune_schedule = "oneshot"
