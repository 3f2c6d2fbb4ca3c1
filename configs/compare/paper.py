# What is known of the paper: half of the tokens before the first prune.
from configs.compare.idea import *

prune_start = 0.5
prune_end = 0.75
