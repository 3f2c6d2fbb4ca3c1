# Prune SmolLM2, a model that others trained. Three prunes remove half of its FFN, and a
# short recovery follows.
#
# Its weights come from a Hugging Face folder:
# python -m tools.import_hf FOLDER --to out/smollm2-135m
# docs/hugging-face.md says how you get the folder and make the data.

init_from = "out/smollm2-135m"  # 30 layers with d_ff 1536
data_dir = "data/sotu-smollm2"
d_ff_target = 768

max_steps = 24  # a short try: 24,576 tokens
batch_size = 4
context_length = 256
optimizer = "adamw"
learning_rate = 4e-4
warmup_steps = 3

score_beta = 0.75
prune_start = 0.25
prune_end = 0.625
prune_every = 3
round_to = 64

eval_every = 24
eval_tokens = 1024  # as many as measure the loss before and after a prune
save_every = 24
log_every = 2
