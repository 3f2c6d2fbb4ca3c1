# The single prune at other places than in configs/lab/oneshot.py and configs/lab/naive.py.
# One shot at 10% is in studies/lab/ablations.py.
base = "configs/lab/idea.py"

once = {"prune_schedule": "oneshot"}
naive = once | {"lr_restart": True}

arms = {
    "oneshot_15": once | {"prune_start": 0.15},
    "oneshot_35": once | {"prune_start": 0.35},
    "naive_15": naive | {"prune_start": 0.15},
    "naive_25": naive | {"prune_start": 0.25},
    "naive_35": naive | {"prune_start": 0.35},
}
