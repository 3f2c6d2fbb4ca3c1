# The final shape has 75% of the enlarged model's parameters, not 49% as in configs/idea.py.
base = "configs/idea.py"

scratch = {"d_ff": 176, "d_ff_target": 0}

arms = {
    "idea": {"d_ff": 288},
    "scratch": scratch,
    "scratch_flops": scratch | {"max_steps": 1053},
}
