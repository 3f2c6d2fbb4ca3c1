# The usual pipeline: train the enlarged model to the end of its own cosine, prune once, train again
# with a second warm-up and cosine and a fresh optimizer.
from configs.oneshot import *

lr_restart = True
prune_start = 0.15  # of five places, 10% and 15% are the best on seeds 11 and 12
