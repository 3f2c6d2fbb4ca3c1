# The laboratory on 1,540 tokens for each final parameter, as many as in the paper: 10.8 times its
# steps.
base = "configs/compare/idea.py"

idea = {
    "max_steps": 43240, "warmup_steps": 1080, "prune_every": 1080, "learning_rate": 1.13e-2,
    "prune_start": 0.25, "prune_end": 0.5,
    "data_dir": "data/gcide", "dtype": "float32", "eval_every": 50000,
}  # fmt: skip

arms = {
    "idea": idea,
    "scratch_flops": idea | {"d_ff": 96, "d_ff_target": 0, "max_steps": 49410},
}
