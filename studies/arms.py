# The arms of the studies: python -m tools.compare studies/arms.py:TABLE --out studies/mine
# studies/arms.py:TABLE:ARM is one of them. An arm is the base with these changes. The
# commands of a study, and how it found its rates, are in its folder.

base = "configs/idea.py"
small = {"d_ff": 96, "d_ff_target": 0}  # the final shape from the start
once = {"prune_schedule": "oneshot"}  # where the window opens
twice = once | {"lr_restart": True}

# One thing changed in configs/idea.py (studies/restart)
changes = dict(
    # When: the window, as fractions of the run
    paper={"prune_start": 0.5, "prune_end": 0.75},  # half of the tokens before the first prune
    # One prune, at other places than in configs/oneshot.py and configs/naive.py
    oneshot_10=once,
    oneshot_15=once | {"prune_start": 0.15},
    oneshot_35=once | {"prune_start": 0.35},
    naive_15=twice | {"prune_start": 0.15},
    naive_25=twice | {"prune_start": 0.25},
    naive_35=twice | {"prune_start": 0.35},
    # Which: what units are judged by
    magnitude={"criterion": "magnitude"},  # the size of the weights
    random={"criterion": "random"},  # nothing
)

# The enlarged model, never pruned, as a teacher (studies/teacher)
_teacher = {"teacher": "out/teacher", "teacher_weight": 0.25}  # the better of two weights
_scratch = small | {"learning_rate": 3.2e-2}
teacher = dict(idea={}, idea_taught=_teacher, scratch=_scratch, scratch_taught=_scratch | _teacher)

# From two starts of the weights (studies/start): `_usual` is model.py's, and `_width` that of
# studies/start/by_width.patch: three arms at a time, in a clone each
_idea = {"dtype": "float32", "eval_every": 4000, "save_every": 500, "learning_rate": 1.6e-2}
_small = _idea | small | {"learning_rate": 3.2e-2}
start = dict(
    idea_usual=_idea,
    scratch_usual=_small,
    scratch_flops_usual=_small | {"max_steps": 4321},
    idea_width=_idea | {"learning_rate": 2.26e-2},
    scratch_width=_small | {"learning_rate": 3.2e-2},
    scratch_flops_width=_small | {"learning_rate": 2.26e-2, "max_steps": 4321},
)

# When to prune (studies/window): 570 tokens for each final parameter, with AdamW. The name of an
# arm has its place: 10_35 is a window from 10% to 35% of the run, 625 is one prune at 62.5%.
_late = {
    "max_steps": 16000, "warmup_steps": 400, "prune_every": 400,
    "prune_start": 0.5, "prune_end": 0.75,
    "dtype": "float32", "eval_every": 20000, "save_every": 1000,
    "optimizer": "adamw", "learning_rate": 1.13e-2,
}  # fmt: skip
_scratch = _late | small | {"learning_rate": 5.6e-3}
window = dict(
    # The paper's window, seeds 21 to 30
    idea_50_75=_late,
    oneshot_50=_late | once,
    naive_50=_late | twice,
    scratch=_scratch,
    scratch_flops=_scratch | {"max_steps": 19950},
    # When: these, idea_50_75, oneshot_50 and scratch, seeds 31 to 40
    idea_10_35=_late | {"prune_start": 0.1, "prune_end": 0.35},
    oneshot_25=_late | once | {"prune_start": 0.25},
    oneshot_625=_late | once | {"prune_start": 0.625},
    oneshot_75=_late | once | {"prune_start": 0.75},
    scratch_flops_10_35=_scratch | {"max_steps": 17283},
)

# Other lengths and texts (studies/tokens): TEXT_TOKENS, for each final parameter. 18 are an eighth
# of the steps (--shorter=8).
_scratch = small | {"learning_rate": 4.5e-2}
speeches_18 = dict(
    idea={"learning_rate": 3.2e-2},
    scratch=_scratch,
    scratch_flops=_scratch | {"max_steps": 4321},
)
_idea = {
    "max_steps": 16000, "warmup_steps": 400, "prune_every": 400, "learning_rate": 1.13e-2,
    "prune_start": 0.25, "prune_end": 0.5,
    "data_dir": "data/gcide", "dtype": "float32", "eval_every": 20000,
}  # fmt: skip
dictionary_568 = dict(
    idea=_idea,
    scratch_flops=_idea | small | {"max_steps": 18283},
    scratch=_idea | small,
)
# As many tokens as in the paper, at the rate and in the window of 568
_idea = _idea | {
    "max_steps": 43240, "warmup_steps": 1080, "prune_every": 1080, "eval_every": 50000,
}  # fmt: skip
dictionary_1540 = dict(idea=_idea, scratch_flops=_idea | small | {"max_steps": 49410})

# Three sizes, 36 tokens of the dictionary for each final parameter. FFNs end 3 d_model wide, from
# 8/3 of that; warm-up and prunes have the same fractions of the run (studies/size).


def _three(idea, small_rate, flops_steps):  # the small model: on IDEA's tokens, on its FLOPs
    scratch = idea | {"d_ff": idea["d_ff_target"], "d_ff_target": 0, "learning_rate": small_rate}
    return dict(idea=idea, scratch=scratch, scratch_flops=scratch | {"max_steps": flops_steps})


_idea = {
    "d_ff_target": 96, "max_steps": 1000, "warmup_steps": 25, "prune_every": 25,
    "data_dir": "data/gcide", "dtype": "float32", "eval_every": 5000, "save_every": 200,
    "learning_rate": 3.2e-2,
}  # fmt: skip
dictionary_36 = _three(_idea, 4.5e-2, 1080)
_idea = _idea | {
    "n_layer": 4, "d_model": 64, "d_ff": 512, "d_ff_target": 192, "batch_size": 32,
    "max_steps": 2320, "warmup_steps": 58, "prune_every": 58, "learning_rate": 1.6e-2,
}  # fmt: skip
dictionary_36_250k = _three(_idea, 2.26e-2, 2638)
# With AdamW, and the start of studies/start/by_width.patch
_adamw = {"optimizer": "adamw", "learning_rate": 3.2e-2}
dictionary_36_250k_adamw = _three(_idea | _adamw, 1.6e-2, 2638)
_idea = _idea | {
    "n_layer": 5, "d_model": 80, "d_ff": 640, "d_ff_target": 240,
    "max_steps": 4080, "warmup_steps": 102, "prune_every": 102,
}  # fmt: skip
dictionary_36_500k = _three(_idea, 1.13e-2, 4704)
seconds = dict(  # the small model for IDEA's seconds, `scratch_seconds` in size/runs.csv
    dictionary_36=dictionary_36["scratch"] | {"max_steps": 1053},
    dictionary_36_250k=dictionary_36_250k["scratch"] | {"max_steps": 2558},
    dictionary_36_500k=dictionary_36_500k["scratch"] | {"max_steps": 4501},
)

# 250k final parameters, and 16 tokens for each (studies/larger, studies/tokens)
_idea = {
    "n_layer": 4, "d_model": 64, "d_ff": 512, "d_ff_target": 176,
    "max_steps": 1000, "batch_size": 32, "warmup_steps": 50, "prune_every": 20,
    "eval_every": 250, "save_every": 250, "log_every": 10,
}  # fmt: skip
_small = {"d_ff": 176, "d_ff_target": 0}
speeches_16_250k = dict(
    idea=_idea,
    scratch=_idea | _small,
    scratch_flops=_idea | _small | {"max_steps": 1146},
    oneshot=_idea | once | {"prune_start": 0.35},  # of five places, the best on seeds 11 and 12
    oneshot_15=_idea | once | {"prune_start": 0.15},
    oneshot_25=_idea | once | {"prune_start": 0.25},
    naive=_idea | twice | {"prune_start": 0.15},  # of five places, 10% and 15% are the best there
    naive_25=_idea | twice | {"prune_start": 0.25},
    naive_35=_idea | twice | {"prune_start": 0.35},
    enlarged=_idea | {"d_ff_target": 0},
)
_longer = {"max_steps": 4000, "warmup_steps": 200, "prune_every": 80, "save_every": 2000}
speeches_65_250k = dict(
    idea=_idea | _longer,
    scratch=_idea | _longer | _small,
    scratch_flops=_idea | _longer | _small | {"max_steps": 4584},
)
_longer = {"max_steps": 8700, "warmup_steps": 435, "prune_every": 174, "eval_every": 2000}
speeches_142_250k = dict(
    idea=_idea | _longer,
    scratch=_idea | _longer | _small,
    scratch_flops=_idea | _longer | _small | {"max_steps": 9971},
)
# The window is the best of dictionary_568. The rate is not tuned: it is about a third of that with
# 16, as the best for 58k final parameters fell by as much from 18 to 568.
_longer = {
    "max_steps": 34800, "warmup_steps": 870, "prune_every": 696, "learning_rate": 8e-3,
    "prune_start": 0.25, "prune_end": 0.5,
    "data_dir": "data/gcide", "dtype": "float32", "eval_every": 40000, "save_every": 2000,
}  # fmt: skip
dictionary_568_250k = dict(
    idea=_idea | _longer,
    scratch_flops=_idea | _longer | _small | {"max_steps": 44155},
)

# 870k final parameters, and 16 tokens for each (studies/tokens)
_common = _idea | {
    "d_model": 128, "n_head": 8, "n_kv_head": 4, "learning_rate": 1.13e-2,
    "max_steps": 3400, "warmup_steps": 170, "eval_every": 400, "save_every": 200,
}  # fmt: skip
_scratch = _common | {"d_ff": 352, "d_ff_target": 0}
speeches_16_870k = dict(
    idea=_common | {"d_ff": 928, "d_ff_target": 352, "prune_every": 68},
    scratch=_scratch,
    scratch_flops=_scratch | {"max_steps": 3933},
)

# Which axis (studies/units)? Five ways to be larger at first, with 250k final parameters. The
# rates were chosen on one seed.
_scratch = _idea | _small | {"head_dim": 16}
axes = dict(
    idea=_idea,  # neurons: d_ff 512 -> 176
    heads=_scratch | {"n_head": 12, "n_kv_head": 6, "n_kv_head_target": 2},
    hidden=_scratch | {"d_model": 128, "d_model_target": 64, "round_to": 8},
    depth=_scratch | {"n_layer": 7, "n_layer_target": 4, "learning_rate": 3.2e-2},
    all=_idea | {  # single units go last, so the window ends early, for about as many FLOPs
        "d_ff": 240, "head_dim": 16, "n_head": 6, "n_kv_head": 3, "n_kv_head_target": 2,
        "d_model": 80, "d_model_target": 64, "n_layer": 5, "n_layer_target": 4,
        "round_to": 8, "prune_end": 0.2,
    },
    scratch=_scratch,
    scratch_flops=_scratch | {"max_steps": 1146},
)  # fmt: skip
# The same with 70k final parameters, and 59 tokens for each. The rates were chosen on seeds 11 and
# 12, for some arms on 11 alone.
_narrow = _idea | {"d_model": 32, "head_dim": 8, "round_to": 4, "learning_rate": 6.4e-2}
_wide = _narrow | {"d_ff": 64, "d_ff_target": 0}
_scratch = _wide | {"learning_rate": 1.28e-1}
axes_70k = dict(
    idea=_narrow | {"d_ff": 256, "d_ff_target": 64},
    heads=_wide | {"n_head": 10, "n_kv_head": 5, "n_kv_head_target": 2},
    hidden=_wide | {"d_model": 64, "d_model_target": 32},
    depth=_wide | {"n_layer": 8, "n_layer_target": 4},
    all=_narrow | {
        "d_ff": 96, "d_ff_target": 64, "n_head": 6, "n_kv_head": 3, "n_kv_head_target": 2,
        "d_model": 36, "d_model_target": 32, "n_layer": 5, "n_layer_target": 4, "prune_end": 0.2,
    },
    scratch=_scratch,
    scratch_flops=_scratch | {"max_steps": 1127},
)  # fmt: skip
