# Which axis? As configs/axes.py, with 70k final parameters and 59 tokens for each. The rates were
# chosen on one seed (results/axes_lab/sweep.csv).
# python -m tools.compare configs/axes_lab.py --compile=on --out results/mine
base = "configs/idea.py"

small = {"n_layer": 4, "d_model": 32, "head_dim": 8, "d_ff": 64, "round_to": 4}
scratch = small | {"d_ff_target": 0}
wide = scratch | {"learning_rate": 3.2e-2}

arms = {
    "idea": wide | {"d_ff": 256, "d_ff_target": 64},
    "heads": wide | {"n_head": 10, "n_kv_head": 5, "n_kv_head_target": 2},
    "hidden": wide | {"d_model": 64, "d_model_target": 32},
    "depth": wide | {"n_layer": 8, "n_layer_target": 4},
    "mixed": small | {  # neurons, channels and a layer
        "d_ff": 96, "d_ff_target": 64, "d_model": 36, "d_model_target": 32,
        "n_layer": 5, "n_layer_target": 4,
    },
    "scratch": scratch,  # the final shape from the start, on the same tokens
    "scratch_flops": scratch | {"max_steps": 1127},  # on as many FLOPs as idea
}  # fmt: skip
