# The default size on 65 tokens for each final parameter, four times the default run.
base = "configs/idea.py"

idea = {"max_steps": 4000, "warmup_steps": 200, "prune_every": 80, "save_every": 2000}
scratch = idea | {"d_ff": 176, "d_ff_target": 0}

arms = {
    "idea": idea,
    "scratch": scratch,
    "scratch_flops": scratch | {"max_steps": 4584},
}
