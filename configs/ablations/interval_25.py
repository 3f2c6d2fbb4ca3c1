# Four times as many prunes.
from configs.compare.idea import *

prune_every = 25
