# The usual pipeline: train to the end of a cosine, prune once, train again with a fresh optimizer,
# a second warm-up and the full peak.
from configs.lab.oneshot import *

lr_restart = True
prune_start = 0.1  # of five places, the best on seeds 11 and 12
