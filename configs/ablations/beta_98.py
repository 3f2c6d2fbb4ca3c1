# Scores averaged over fifty steps.
from configs.compare.idea import *

score_beta = 0.98
