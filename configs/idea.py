# IDEA Prune on the shipped corpus: enlarge, prune, recover, under one cosine.

out_dir = "out/idea"

d_ff = 512  # enlarged: 2.9 times the target
d_ff_target = 176
