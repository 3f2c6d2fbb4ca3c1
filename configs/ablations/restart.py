# The rate restarts at the first prune, which stays gradual.
from configs.compare.idea import *

lr_restart = True
