# The usual pipeline: train the enlarged model to the end of a cosine, prune it once,
# and train it again with a fresh optimizer, a second warm-up and the full peak.
#
# naive.py and oneshot.py prune at different places, because each has the place at which
# it ended lowest. To compare the restart alone, give both the same --prune_start.
from configs.oneshot import *

lr_restart = True
prune_start = 0.1  # the best of five places, on seeds 11 and 12
