# The usual pipeline, pruned after 10%, where it ended lowest; oneshot.py ended lowest after 25%.
# Train the enlarged model to the end of a cosine, prune once, train again with a fresh optimizer, a
# second warm-up and the full peak. To compare the restart alone, give both one --prune_start.
from configs.oneshot import *

lr_restart = True
prune_start = 0.1  # of five places, the best on seeds 11 and 12
