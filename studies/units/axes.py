# Which axis? Five ways to be larger at first. All arms end in the shape of configs/idea.py. The
# rates were chosen on one seed (studies/units/sweep.csv).
# python -m tools.compare studies/units/axes.py --out studies/mine
base = "configs/idea.py"

scratch = {"d_ff": 176, "d_ff_target": 0, "head_dim": 16}

arms = {
    "idea": {},  # neurons: d_ff 512 -> 176, as in configs/idea.py
    "heads": scratch | {"n_head": 12, "n_kv_head": 6, "n_kv_head_target": 2},
    "hidden": scratch | {"d_model": 128, "d_model_target": 64, "round_to": 8},
    "depth": scratch | {"n_layer": 7, "n_layer_target": 4, "learning_rate": 3.2e-2},
    "all": {  # single units go last, so the window ends early, for about as many FLOPs
        "d_ff": 240, "head_dim": 16, "n_head": 6, "n_kv_head": 3, "n_kv_head_target": 2,
        "d_model": 80, "d_model_target": 64, "n_layer": 5, "n_layer_target": 4,
        "round_to": 8, "prune_end": 0.2,
    },
    "scratch": scratch,  # the final shape from the start, on the same tokens
    "scratch_flops": scratch | {"max_steps": 1146},  # on as many FLOPs as idea
}  # fmt: skip
