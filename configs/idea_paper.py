# What is known of the paper: half of the tokens go to the enlarged model before the first prune.
from configs.idea import *

prune_start = 0.5
prune_end = 0.75
