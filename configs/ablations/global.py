# Layers compete for neurons.
from configs.compare.idea import *

scope = "global"
