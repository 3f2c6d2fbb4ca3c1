# 18 tokens for each final parameter, in an eighth of the lab's steps (--shorter=8).
base = "configs/lab/idea.py"

scratch = {"d_ff": 96, "d_ff_target": 0, "learning_rate": 4.5e-2}

arms = {
    "idea": {"learning_rate": 3.2e-2},
    "scratch": scratch,
    "scratch_flops": scratch | {"max_steps": 4321},
}
