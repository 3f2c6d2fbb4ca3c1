# The laboratory for a GPU: twenty times the parameters, on text of your own (130M tokens or more):
# python -m data.prepare --tokenizer shipped --input ... --out data/fineweb
from configs.compare.idea import *

data_dir = "data/fineweb"

n_layer = 4
d_model = 128
d_ff = 1024
d_ff_target = 384

max_steps = 8000
batch_size = 64
context_length = 256  # 131M tokens, 140 per final parameter
learning_rate = 4e-3  # a guess: sweep it, and scratch's most carefully
warmup_steps = 200

prune_every = 200

dtype = "auto"
