# What is known of the paper's window: half of the tokens come before the first prune.
from configs.idea import *

prune_start = 0.5
prune_end = 0.75
