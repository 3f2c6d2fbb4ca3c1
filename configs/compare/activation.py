# IDEA with another criterion: activation energy.
from configs.compare.idea import *

criterion = "activation"
