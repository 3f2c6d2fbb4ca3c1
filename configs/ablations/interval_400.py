# A quarter of the prunes.
from configs.compare.idea import *

prune_every = 400
