# The final shape has 870k parameters, 3.5 times those of configs/idea.py, and 16 tokens for each.
base = "configs/idea.py"

common = {
    "d_model": 128, "n_head": 8, "n_kv_head": 4, "learning_rate": 1.13e-2,
    "max_steps": 3400, "warmup_steps": 170, "eval_every": 400, "save_every": 200,
}  # fmt: skip
scratch = common | {"d_ff": 352, "d_ff_target": 0}

arms = {
    "idea": common | {"d_ff": 928, "d_ff_target": 352, "prune_every": 68},
    "scratch": scratch,
    "scratch_flops": scratch | {"max_steps": 3933},
}
