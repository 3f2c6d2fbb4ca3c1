# The default size on 568 tokens for each final parameter, on the dictionary. The window is the
# lab's best with as many tokens. The rate is not tuned: it is about a third of the default
# one, as the lab's best fell by as much from 18 to 568.
base = "configs/idea.py"

idea = {
    "max_steps": 34800, "warmup_steps": 870, "prune_every": 696, "learning_rate": 8e-3,
    "prune_start": 0.25, "prune_end": 0.5,
    "data_dir": "data/gcide", "dtype": "float32", "eval_every": 40000, "save_every": 2000,
}  # fmt: skip

arms = {
    "idea": idea,
    "scratch_flops": idea | {"d_ff": 176, "d_ff_target": 0, "max_steps": 44155},
}
