# IDEA with no criterion at all.
from configs.compare.idea import *

criterion = "random"
