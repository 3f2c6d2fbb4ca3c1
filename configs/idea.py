# IDEA Prune on the shipped corpus: enlarge, prune and recover under one cosine.
#
# The other arms of the comparison change a few of these lines:
#   scratch.py        trains the final shape from scratch, on the same tokens
#   scratch_flops.py  trains the final shape from scratch, with the same FLOPs
#   oneshot.py        prunes once
#   naive.py          prunes once, and then restarts the optimizer and the cosine
#   enlarged.py       never prunes

n_layer = 2
d_model = 32
n_head = 4
n_kv_head = 2
d_ff = 256  # enlarged: 2.7 times the target
d_ff_target = 96

max_steps = 4000
batch_size = 16
context_length = 128  # 8.2M tokens: 142 per final parameter
learning_rate = 2.26e-2  # the best of three, on seed 11
min_lr_fraction = 0.01
warmup_steps = 100

prune_start = 0.1  # the paper prunes after half of the run; see studies/README.md
prune_end = 0.35
prune_every = 100

eval_every = 500
save_every = 1000
log_every = 50
