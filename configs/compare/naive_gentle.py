# The usual pipeline with a gentler restart: the second peak is a third of the first.
from configs.compare.naive import *

restart_fraction = 0.33
