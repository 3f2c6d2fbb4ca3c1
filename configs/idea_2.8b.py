# The paper's run, 2.82B -> 1.31B on 2T tokens, in a shape that fits what is known of it.
# What it needs: python -m tools.plan configs/idea_2.8b.py --gpus 64 --gpu h100
# In such a late window, IDEA had no lead in small runs (studies/README.md); none had this size.
from configs.idea_paper import *

data_dir = "data/fineweb"  # yours: python -m data.prepare --tokenizer gpt2 --input ... --out ...
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
recompute = "cheap"  # the fastest that fits into 80 GB, by the plan
optimizer = "adamw"  # Muon, the default, is not the paper's
learning_rate = 3e-4
warmup_steps = 2000

prune_every = 1000
eval_every = 5000
eval_tokens = 10_000_000
save_every = 5000
