# IDEA with another criterion: the size of the weights.
from configs.compare.idea import *

criterion = "magnitude"
