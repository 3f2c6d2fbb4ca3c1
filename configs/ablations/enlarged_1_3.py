# An FFN enlarged 1.3 times.
from configs.compare.idea import *

d_ff = 128
