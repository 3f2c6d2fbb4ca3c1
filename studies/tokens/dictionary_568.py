# The lab on 568 tokens for each final parameter: four times its steps.
base = "configs/lab/idea.py"

idea = {
    "max_steps": 16000, "warmup_steps": 400, "prune_every": 400, "learning_rate": 1.13e-2,
    "prune_start": 0.25, "prune_end": 0.5,
    "data_dir": "data/gcide", "dtype": "float32", "eval_every": 20000,
}  # fmt: skip
scratch = idea | {"d_ff": 96, "d_ff_target": 0}

arms = {
    "idea": idea,
    "scratch_flops": scratch | {"max_steps": 18283},
    "scratch": scratch,
}
