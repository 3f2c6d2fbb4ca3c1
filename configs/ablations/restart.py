# The rate restarts where the window opens; pruning stays gradual.
from configs.compare.idea import *

lr_restart = True
