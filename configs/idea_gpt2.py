# A model that ends with GPT-2's size, 124M parameters. Its FFN starts 2.6 times as
# wide. It trains on 10B tokens of web text, on one GPU, or on eight with torchrun.
#
# Every GPU computes all of Muon's products. By our count, these are about 3% of a GPU's
# FLOPs in a step, if there are eight GPUs.

# Make it: python -m data.prepare --tokenizer gpt2 --input ... --out data/fineweb
data_dir = "data/fineweb"
round_vocab_to = 128  # 50,257 -> 50,304

n_layer = 12
d_model = 768
n_head = 12
n_kv_head = 12
d_ff = 5376
d_ff_target = 2048
round_to = 128

context_length = 1024
batch_size = 512  # 0.5M tokens
max_steps = 19_073  # 10B tokens
micro_batch_size = 32
learning_rate = 6e-4
min_lr_fraction = 0.01
warmup_steps = 700

prune_every = 250
eval_every = 500
eval_tokens = 10_000_000
save_every = 1000
