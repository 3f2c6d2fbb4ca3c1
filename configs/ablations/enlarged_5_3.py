# An FFN enlarged 5.3 times.
from configs.compare.idea import *

d_ff = 512
