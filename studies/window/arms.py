# The lab on 570 tokens for each final parameter, with AdamW. The name of an arm has its place:
# 10_35 is a window from 10% to 35% of the run, 625 is one prune at 62.5%.
base = "configs/lab/idea.py"

idea = {
    "max_steps": 16000, "warmup_steps": 400, "prune_every": 400,
    "prune_start": 0.5, "prune_end": 0.75,
    "dtype": "float32", "eval_every": 20000, "save_every": 1000,
    "optimizer": "adamw", "learning_rate": 1.13e-2,
}  # fmt: skip
oneshot = idea | {"prune_schedule": "oneshot"}
scratch = idea | {"d_ff": 96, "d_ff_target": 0, "learning_rate": 5.6e-3}

arms = {
    # The paper's window, seeds 21 to 30
    "idea_50_75": idea,
    "oneshot_50": oneshot,
    "naive_50": oneshot | {"lr_restart": True},
    "scratch": scratch,
    "scratch_flops": scratch | {"max_steps": 19950},
    # When: these, idea_50_75, oneshot_50 and scratch, seeds 31 to 40
    "idea_10_35": idea | {"prune_start": 0.1, "prune_end": 0.35},
    "oneshot_25": oneshot | {"prune_start": 0.25},
    "oneshot_625": oneshot | {"prune_start": 0.625},
    "oneshot_75": oneshot | {"prune_start": 0.75},
    "scratch_flops_10_35": scratch | {"max_steps": 17283},
}
