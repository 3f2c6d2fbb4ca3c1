# Which axis? As axes.py, with 70k final parameters and 59 tokens for each. The rates were
# chosen on seeds 11 and 12, for some arms on 11 alone (studies/units/sweep.csv).
# python -m tools.compare studies/units/axes_lab.py --out studies/mine
base = "configs/idea.py"

small = {"n_layer": 4, "d_model": 32, "head_dim": 8, "round_to": 4, "learning_rate": 6.4e-2}
wide = small | {"d_ff": 64, "d_ff_target": 0}
scratch = wide | {"learning_rate": 1.28e-1}

arms = {
    "idea": small | {"d_ff": 256, "d_ff_target": 64},
    "heads": wide | {"n_head": 10, "n_kv_head": 5, "n_kv_head_target": 2},
    "hidden": wide | {"d_model": 64, "d_model_target": 32},
    "depth": wide | {"n_layer": 8, "n_layer_target": 4},
    "all": small | {  # single units go last, so the window ends early, for about as many FLOPs
        "d_ff": 96, "d_ff_target": 64, "n_head": 6, "n_kv_head": 3, "n_kv_head_target": 2,
        "d_model": 36, "d_model_target": 32, "n_layer": 5, "n_layer_target": 4, "prune_end": 0.2,
    },
    "scratch": scratch,  # the final shape from the start, on the same tokens
    "scratch_flops": scratch | {"max_steps": 1127},  # on as many FLOPs as idea
}  # fmt: skip
