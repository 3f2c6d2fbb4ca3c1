# The single prune at other places than in configs/oneshot.py and configs/naive.py.
base = "configs/idea.py"

once = {"prune_schedule": "oneshot"}
naive = once | {"lr_restart": True}

arms = {
    "oneshot_15": once | {"prune_start": 0.15},
    "oneshot_25": once | {"prune_start": 0.25},
    "naive_25": naive | {"prune_start": 0.25},
    "naive_35": naive | {"prune_start": 0.35},
}
