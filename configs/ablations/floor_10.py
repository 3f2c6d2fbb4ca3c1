# The rate ends at a tenth of its peak.
from configs.compare.idea import *

min_lr_fraction = 0.1
