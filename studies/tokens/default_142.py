# The default size on 142 tokens for each final parameter, 8.7 times the default run.
base = "configs/idea.py"

idea = {"max_steps": 8700, "warmup_steps": 435, "prune_every": 174, "eval_every": 2000}
scratch = idea | {"d_ff": 176, "d_ff_target": 0}

arms = {
    "idea": idea,
    "scratch": scratch,
    "scratch_flops": scratch | {"max_steps": 9971},
}
