# One thing changed in configs/lab/idea.py, many times. All end in the same shape.
# python -m tools.compare configs/lab/idea.py studies/lab/ablations.py --seeds 1 --out studies/mine
# studies/lab/ablations.py:magnitude is one of them.
base = "configs/lab/idea.py"

once = {"prune_schedule": "oneshot"}  # where the window opens, at 10%
naive = once | {"lr_restart": True}

arms = {
    # When: the window, as fractions of the run
    "paper": {"prune_start": 0.5, "prune_end": 0.75},  # half of the tokens before the first prune
    "window_10_20": {"prune_end": 0.2},  # shorter
    # One prune, at other places than in configs/lab/oneshot.py and configs/lab/naive.py
    "oneshot_10": once,
    "oneshot_15": once | {"prune_start": 0.15},
    "oneshot_35": once | {"prune_start": 0.35},
    "naive_15": naive | {"prune_start": 0.15},
    "naive_25": naive | {"prune_start": 0.25},
    "naive_35": naive | {"prune_start": 0.35},
    # Which: what units are judged by
    "magnitude": {"criterion": "magnitude"},  # the size of the weights
    "random": {"criterion": "random"},  # nothing
    # What: other units
    "heads": {  # heads instead of neurons
        "d_ff": 96, "d_ff_target": 0, "n_head": 8, "n_kv_head": 4, "head_dim": 8,
        "n_kv_head_target": 2,
    },
    "hidden": {  # channels instead of neurons
        "d_ff": 96, "d_ff_target": 0, "d_model": 64, "d_model_target": 32, "head_dim": 8,
    },
    # The learning rate
    "restart": {"lr_restart": True},  # it restarts where the window opens; pruning stays gradual
}  # fmt: skip
