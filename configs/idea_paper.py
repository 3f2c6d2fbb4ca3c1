# What is known of the paper's window: it opens after half of the tokens.
from configs.idea import *

prune_start = 0.5
prune_end = 0.75
