# The usual pipeline: train the enlarged model to the end of its own cosine, prune once, train again
# with a second warm-up and cosine and a fresh optimizer.
from configs.oneshot import *

lr_restart = True
prune_start = 0.15  # the best of five places on seeds 11 and 12, with 10%
