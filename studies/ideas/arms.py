# Ideas that need no code: other windows, other sizes of the start; each with the FLOPs of IDEA in
# the laboratory, to one step.
base = "configs/lab/idea.py"

arms = {
    "idea": {},
    "window_2_10": {"prune_start": 0.02, "prune_end": 0.1, "max_steps": 4222},
    "window_2_20": {"prune_start": 0.02, "prune_end": 0.2, "max_steps": 4168},
    "window_10_20": {"prune_end": 0.2, "max_steps": 4076},
    "window_50_75": {"prune_start": 0.5, "prune_end": 0.75, "max_steps": 3471},  # the paper's
    "larger_1.3": {"d_ff": 184, "round_to": 8, "max_steps": 4144},  # 1.3 times the parameters
    "larger_1.8": {"d_ff": 336, "max_steps": 3876},
}
