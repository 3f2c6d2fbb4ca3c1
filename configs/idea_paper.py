# What is known of the paper: the prune window opens after half of the tokens, and the
# optimizer is Adam. The shape, with 250k final parameters, is ours.
#
# The learning rate is the best of four (studies/sweeps.csv). With the next higher rate,
# one of two runs went astray. We searched no learning rate for a small model beside it.

n_layer = 4
d_model = 64
n_head = 4
n_kv_head = 2
d_ff = 512  # 2.9 times the target
d_ff_target = 176

max_steps = 1000
batch_size = 32
learning_rate = 1.13e-2
min_lr_fraction = 0.01
warmup_steps = 50

optimizer = "adamw"
prune_start = 0.5
prune_end = 0.75
prune_every = 20
