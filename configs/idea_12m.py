# A model of 12M parameters that keeps a third of its FFN. It is large enough to measure
# speed:
#
# python -m tools.bench configs/idea_12m.py

n_layer = 6
d_model = 256
n_head = 4
n_kv_head = 4
d_ff = 2048
d_ff_target = 688
round_vocab_to = 4096

max_steps = 1000
batch_size = 16
context_length = 256
learning_rate = 2e-3
min_lr_fraction = 0.01
warmup_steps = 50
prune_every = 20
