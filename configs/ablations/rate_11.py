# A higher peak.
from configs.compare.idea import *

learning_rate = 1.13e-2
