# The lab on 570 tokens for each final parameter, with the window of the paper: 50% to 75%.
base = "configs/lab/idea.py"

idea = {
    "max_steps": 16000, "warmup_steps": 400, "prune_every": 400,
    "prune_start": 0.5, "prune_end": 0.75,
    "dtype": "float32", "eval_every": 20000, "optimizer": "adamw", "learning_rate": 1.13e-2,
}  # fmt: skip
oneshot = idea | {"prune_schedule": "oneshot"}
scratch = idea | {"d_ff": 96, "d_ff_target": 0, "learning_rate": 5.6e-3}

arms = {
    "idea_50_75": idea,
    "oneshot_50": oneshot,
    "naive_50": oneshot | {"lr_restart": True},
    "scratch": scratch,
    "scratch_flops": scratch | {"max_steps": 19950},
}
