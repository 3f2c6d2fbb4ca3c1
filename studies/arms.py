# The arms of README.md's big table, beside configs/idea.py and its small models:
#
#     python -m tools.compare studies/arms.py:TABLE --seeds 5 --out studies/mine
#
# A TABLE is named after its text and its tokens for each final parameter. A name
# without a size means 58k final parameters. An arm is configs/idea.py with these
# changes.
#
# Three settings need no table. The speeches with 36 or 71 tokens are the configs with
# --learning_rate=3.2e-2 and --shorter=4 or --shorter=2. The dictionary with 142 tokens
# is the configs with --learning_rate=2.26e-2 and the knobs of `_dictionary`.

base = "configs/idea.py"


def _three(idea: dict, small_width: int, small_rate: float, flops_steps: int) -> dict:
    """IDEA, and the small model at its own rate, on IDEA's tokens and on its FLOPs."""
    small = dict(idea)
    small["d_ff"] = small_width
    small["d_ff_target"] = 0
    small["learning_rate"] = small_rate
    longer = small | {"max_steps": flops_steps}
    return {"idea": idea, "scratch": small, "scratch_flops": longer}


def _length(steps: int, warmup: int, prune_every: int) -> dict:
    return {"max_steps": steps, "warmup_steps": warmup, "prune_every": prune_every}


def _window(start: float, end: float) -> dict:
    return {"prune_start": start, "prune_end": end}


_dictionary = {"data_dir": "data/gcide", "dtype": "float32", "eval_every": 50000}

# 58k final parameters. speeches_18 needs --shorter=8.
speeches_18 = _three({"learning_rate": 3.2e-2}, 96, 4.5e-2, 4321)

_idea = _dictionary | _length(1000, 25, 25) | {"learning_rate": 3.2e-2}
dictionary_36 = _three(_idea, 96, 4.5e-2, 1080)

_idea = _dictionary | _length(16000, 400, 400) | _window(0.25, 0.5)
_idea |= {"learning_rate": 1.13e-2}
dictionary_568 = _three(_idea, 96, 1.13e-2, 18283)

# As many tokens as in the paper, at the rate and in the window of dictionary_568
_idea = _idea | _length(43240, 1080, 1080)
dictionary_1540 = _three(_idea, 96, 1.13e-2, 49410)

# 58k with AdamW, from the start by width, on the speeches with 570 tokens
_idea = _length(16000, 400, 400) | {
    "optimizer": "adamw",
    "learning_rate": 1.13e-2,
    "dtype": "float32",
    "eval_every": 20000,
    "save_every": 1000,
}
window_late = _three(_idea | _window(0.5, 0.75), 96, 5.6e-3, 19950)
window_when = _three(_idea | _window(0.1, 0.35), 96, 5.6e-3, 17283)

# 263k with 36 tokens. FFNs start 8 d_model wide and end 3 d_model wide. Warm-up and
# prunes take the same fractions of the run as in dictionary_36.
_idea = (
    _dictionary
    | _length(2320, 58, 58)
    | {
        "n_layer": 4,
        "d_model": 64,
        "d_ff": 512,
        "d_ff_target": 192,
        "batch_size": 32,
        "learning_rate": 1.6e-2,
    }
)
dictionary_36_250k = _three(_idea, 192, 2.26e-2, 2638)

# The same with AdamW, from the start by width. In runs.csv, `idea_low` is IDEA at the
# rate 1.13e-2.
_adamw = _idea | {"optimizer": "adamw", "learning_rate": 3.2e-2}
dictionary_36_250k_adamw = _three(_adamw, 192, 1.6e-2, 2638)

# The same with AdamW and a warm-up of 10% of each run, from the start by width. Seeds
# 81 to 90 are for two claims. The small model ends above IDEA on the same tokens. IDEA
# with a warm-up of 2.5% (`idea_short`) ends above IDEA with 10%.
_warm = _adamw | {"learning_rate": 2.26e-2, "warmup_steps": 232}
_idea_short = {"learning_rate": 1.13e-2, "warmup_steps": 58}
_small_short = {"learning_rate": 1.6e-2, "warmup_steps": 58}
_small_flops = {"learning_rate": 2.26e-2, "warmup_steps": 264}
warmup_10_250k = _three(_warm, 192, 3.2e-2, 2638)
warmup_10_250k["scratch_flops"] |= _small_flops
warmup_10_250k["idea_short"] = _warm | _idea_short
warmup_10_250k["scratch_short"] = warmup_10_250k["scratch"] | _small_short

# 467k with 36 tokens
_idea = (
    _idea
    | _length(4080, 102, 102)
    | {"n_layer": 5, "d_model": 80, "d_ff": 640, "d_ff_target": 240}
)
dictionary_36_500k = _three(_idea, 240, 1.13e-2, 4704)

# 250k final parameters
_idea = _length(1000, 50, 20) | {
    "n_layer": 4,
    "d_model": 64,
    "d_ff": 512,
    "d_ff_target": 176,
    "batch_size": 32,
    "eval_every": 250,
    "save_every": 250,
    "log_every": 10,
}
speeches_16_250k = _three(_idea, 176, 2.26e-2, 1146)

_longer = _idea | _length(4000, 200, 80) | {"save_every": 2000}
speeches_65_250k = _three(_longer, 176, 2.26e-2, 4584)

_longer = _longer | _length(8700, 435, 174) | {"eval_every": 2000}
speeches_142_250k = _three(_longer | {"save_every": 250}, 176, 2.26e-2, 9971)

# This rate was not searched. It is about a third of the rate for 16 tokens, because the
# best rate at 58k fell by as much from 18 tokens to 568.
_longer = _idea | _dictionary | _length(34800, 870, 696) | _window(0.25, 0.5)
_longer |= {"learning_rate": 8e-3}
dictionary_568_250k = _three(_longer, 176, 8e-3, 44155)

# Another shape, with 70k final parameters and 59 tokens for each
_narrow = _idea | {
    "d_model": 32,
    "head_dim": 8,
    "round_to": 4,
    "d_ff": 256,
    "d_ff_target": 64,
    "learning_rate": 6.4e-2,
}
speeches_59_70k = _three(_narrow, 64, 1.28e-1, 1127)


# Does IDEA's lead rise with the tokens for each final parameter? These arms have 58k
# parameters, the speeches and the start by width. Seeds 71 to 80 are for the claim that
# the slope of the lead over log2 of the tokens is above 0.
#
# For most lengths, the small model's rate was searched on IDEA's FLOPs, and serves on
# IDEA's tokens, too. At 142, both were searched, in the study `start`. (From the usual
# start, that study found 1.6e-2 for IDEA and 3.2e-2 for both small models.) The rate
# for 36 lies between the rates for 18 and 71.
def _rising(
    steps: int,
    flops_steps: int,
    idea_rate: float,
    small_rate: float,
    optimizer: str = "",
) -> dict:
    idea = _length(steps, steps // 40, steps // 40)
    idea |= {"learning_rate": idea_rate, "dtype": "float32"}
    idea |= {"eval_every": 10000, "save_every": 500}
    if optimizer:
        idea["optimizer"] = optimizer
    return _three(idea, 96, small_rate, flops_steps)


rising_18 = _rising(500, 540, 6.4e-2, 6.4e-2)
rising_36 = _rising(1000, 1080, 4.5e-2, 4.5e-2)
rising_71 = _rising(2000, 2160, 3.2e-2, 3.2e-2)
rising_142 = _rising(4000, 4321, 2.26e-2, 2.26e-2)
rising_142["scratch"] |= {"learning_rate": 3.2e-2}
rising_285 = _rising(8000, 8642, 1.13e-2, 1.6e-2)

rising_18_adamw = _rising(500, 540, 1.6e-2, 1.13e-2, "adamw")
rising_36_adamw = _rising(1000, 1080, 2.26e-2, 2.26e-2, "adamw")
rising_71_adamw = _rising(2000, 2160, 2.26e-2, 2.26e-2, "adamw")
rising_142_adamw = _rising(4000, 4321, 2.26e-2, 2.26e-2, "adamw")
rising_285_adamw = _rising(8000, 8642, 1.13e-2, 8e-3, "adamw")


# The same with a warm-up of 10% of each run. Seeds 81 to 90 are for the claim that the
# slope of the lead on IDEA's FLOPs over log2 of the tokens is above 0. A slope that is
# 0 or below contradicts it. Rates were searched at 18, 71 and 285, on seeds 11 and 12,
# and the rates for 36 and 142 lie between.
def _warm(arms: dict) -> dict:
    warm = {}
    for name in ("idea", "scratch_flops"):
        knobs = arms[name]
        warm[name] = knobs | {"warmup_steps": knobs["max_steps"] // 10}
    return warm


rising_18_adamw_warm = _warm(_rising(500, 540, 2.26e-2, 1.6e-2, "adamw"))
rising_36_adamw_warm = _warm(_rising(1000, 1080, 2.26e-2, 2.26e-2, "adamw"))
rising_71_adamw_warm = _warm(_rising(2000, 2160, 2.26e-2, 4.5e-2, "adamw"))
rising_142_adamw_warm = _warm(_rising(4000, 4321, 1.6e-2, 2.26e-2, "adamw"))
rising_285_adamw_warm = _warm(_rising(8000, 8642, 1.13e-2, 1.6e-2, "adamw"))
