# The paper's run: 2.82B -> 1.31B parameters on 2T tokens. The paper's shape is not
# known. This shape fits what is known.
#
# See what it needs: python -m tools.plan configs/idea_2.8b.py --gpus=64 --gpu=h100
#
# With such a late prune window, IDEA had no lead in our small runs (studies/README.md).
# We have run nothing of this size.
from configs.idea_paper import *

# Make it: python -m data.prepare --tokenizer gpt2 --input ... --out data/fineweb
data_dir = "data/fineweb"
round_vocab_to = 128  # 50,257 -> 50,304

n_layer = 24
d_model = 2048
n_head = 16
n_kv_head = 8
d_ff = 16384  # 2.7 times the target
d_ff_target = 6144
round_to = 128

context_length = 2048
batch_size = 1024  # 2.1M tokens
max_steps = 953_674  # 2T tokens
micro_batch_size = 4
recompute = "cheap"  # by the plan, the fastest that fits into 80 GB
optimizer = "adamw"  # as in the paper; our default is Muon
learning_rate = 3e-4
warmup_steps = 2000

prune_every = 1000
eval_every = 5000
eval_tokens = 10_000_000
save_every = 5000
