# Little text, read many times: 172,512 tokens, 3 for each final parameter, in 47 epochs.
base = "configs/lab/idea.py"

common = {
    "data_dir": "data/sotu_3", "learning_rate": 3.2e-2, "weight_decay": 0.3, "eval_every": 1000,
}  # fmt: skip
scratch = common | {"d_ff": 96, "d_ff_target": 0}
oneshot = common | {"prune_schedule": "oneshot", "prune_start": 0.25}

arms = {
    "idea": common,
    "scratch": scratch,
    "scratch_flops": scratch | {"max_steps": 4321},
    "oneshot": oneshot,
    "naive": oneshot | {"lr_restart": True},
    "paper": common | {"prune_start": 0.5, "prune_end": 0.75},
    "enlarged": common | {"d_ff_target": 0},  # the ceiling
}  # fmt: skip
