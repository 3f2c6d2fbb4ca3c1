# Scores of one step each.
from configs.compare.idea import *

score_beta = 0.0
