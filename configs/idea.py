# IDEA Prune on the shipped corpus: enlarge, prune, recover, under one cosine.

n_layer = 4
d_model = 64
n_head = 4
n_kv_head = 2
d_ff = 512  # enlarged: 2.9 times the target
d_ff_target = 176

max_steps = 1000
batch_size = 32
context_length = 128
learning_rate = 2.26e-2  # the best of three for the final shape from scratch; all methods share it
min_lr_fraction = 0.01
warmup_steps = 50

prune_start = 0.1  # earlier than the paper's half (studies/window)
prune_end = 0.35
prune_every = 20
