"""Every knob of a run, and all that follows from the knobs before step 1.

A config file is a Python file of assignments, such as configs/idea.py; it may start with `from
configs.idea import *`. `load_config` reads one, `check_config` refuses what no run could use, and
`make_plan` says what the run will do: its schedule, its shapes, its FLOPs.
"""

import ast
import contextlib
import difflib
import errno
import importlib.util
import json
import math
import os
import re
import runpy
import types
from bisect import bisect_right
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_type_hints

from model import GPTConfig
from prune import CRITERIA
from schedule import Schedule

# --------------------------------------------------------------------------------------------------
# Knobs
# --------------------------------------------------------------------------------------------------


@dataclass
class Config:
    # The run
    out_dir: str = ""  # the run owns this folder; empty: out/ and the config file's name
    resume: bool = False  # go on from out_dir's checkpoint; start afresh where there is none
    overwrite: bool = False  # replace the run that out_dir holds
    seed: int = 1  # of the initial weights and of the order of the data
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # of the matrix products: auto, float32, bfloat16 or float16
    compile: str = "auto"  # auto, on or off. On a CPU, auto compiles only long runs
    data_dir: str = "data/sotu"  # made by data.prepare; the shipped corpus is made on first use
    init_from: str = ""  # weights and shape to start from: a checkpoint.pt or a Hugging Face folder
    # Length
    max_steps: int = 1000  # the horizon of the schedule; the whole budget: enlarged, prune, recover
    match_flops: str = ""  # make max_steps so long that the FLOPs equal those of this config
    batch_size: int = 32  # sequences per step, over all ranks and micro batches
    micro_batch_size: int = 0  # sequences per rank in one forward pass; 0: all of the rank's share
    context_length: int = 128  # tokens per sequence
    recompute: bool = False  # activations in the backward pass: a third more work, less memory
    shard_optimizer: bool = False  # a rank holds moments of only its share of the weights (ZeRO-1)
    rank_timeout: int = 600  # seconds that a rank waits for the others before it gives up
    # Optimizer
    learning_rate: float = 8e-3  # the peak
    min_lr_fraction: float = 0.1  # the last step has this fraction of the peak
    warmup_steps: int = 50  # linear, from 0 to the peak
    lr_restart: bool = False  # the naive pipeline: at the prune, warm up and decay a second time
    restart_fraction: float = 1.0  # ... to this fraction of the peak
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # on the norm of all gradients; 0: off
    on_nonfinite: str = "stop"  # or skip: go on without a step whose loss is not finite, 50 at most
    # Model, enlarged
    n_layer: int = 4
    d_model: int = 64
    n_head: int = 4  # query heads
    n_kv_head: int = 2  # key-value heads; each serves n_head / n_kv_head query heads
    head_dim: int = 0  # 0: d_model / n_head
    d_ff: int = 512  # FFN neurons per layer
    tie_embeddings: bool = True  # one matrix reads tokens in and writes logits out
    round_vocab_to: int = 1  # pad the vocabulary with tokens that never come: GPUs like 64 or 128
    # Prune
    d_ff_target: int = 0  # FFN neurons per layer at the end; 0: not pruned
    n_kv_head_target: int = 0  # KV groups per layer at the end; 0: not pruned
    criterion: str = "sensitivity"  # sensitivity, activation, magnitude or random
    score_beta: float = 0.85  # scores are averaged over about 1 / (1 - score_beta) steps
    scope: str = "layer"  # layer: the same width everywhere; global: layers compete
    layer_floor: float = 0.25  # scope=global: no layer falls below this fraction of the target
    prune_schedule: str = "cubic"  # cubic, linear or oneshot (all at prune_start)
    prune_start: float = 0.5  # the window, as fractions of max_steps: enlarged until here,
    prune_end: float = 0.75  # at the target from here on
    prune_every: int = 20  # steps between prunes
    round_to: int = 16  # FFN widths are multiples of it: hardware likes 8 to 128
    # Look
    eval_every: int = 250  # steps between validations
    eval_tokens: int = 1_000_000  # validate on the first so many tokens of the split
    save_every: int = 250  # steps between checkpoints; the last step is always saved
    log_every: int = 10  # steps between lines of the log
    tensorboard: bool = False  # the log's numbers also as TensorBoard events in out_dir
    wandb_project: str = ""  # ... and as a run of this project at Weights & Biases
    stop_after: int = 0  # save and stop after this step, to be resumed later; 0: run to the end


class ConfigError(Exception):
    """One line for a person: which key, what is wrong with it, what to do."""


# --------------------------------------------------------------------------------------------------
# Load and check
# --------------------------------------------------------------------------------------------------


PATHS = ("out_dir", "data_dir", "init_from", "match_flops")
# What --shorter divides: the run and all that is counted in its steps.
LENGTHS = ("max_steps", "warmup_steps", "prune_every", "eval_every", "save_every", "log_every")


def shown(value: object) -> str:
    """A value of any kind, short enough for a line."""
    try:
        text = repr(value)
    except Exception:  # thousands of digits, or an object that cannot say what it is
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 200 else text[:200] + "..."


def set_key(values: dict, key: str, value: object, where: str) -> None:
    hints = get_type_hints(Config)
    if key not in hints:
        near = difflib.get_close_matches(key.lower(), hints, n=1)
        hint = f"the nearest is '{near[0]}' (all: --help)" if near else "--help lists all"
        raise ConfigError(f"{where}: unknown key {shown(key)}; {hint}")
    if hints[key] is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) is not hints[key]:
        kind = hints[key].__name__
        raise ConfigError(f"{where}: {key}={shown(value)} is not of type {kind}; see --help")
    values[key] = value


def run_file(path: str) -> dict[str, object]:
    """What a config file assigns. Names that start with an underscore, modules and functions are
    its own business."""
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: no such config file; the shipped ones are in configs/")
    try:
        names = runpy.run_path(path)
    except BaseException as error:  # sys.exit() too: a config has no say in how the run ends
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{path}: {what}") from error

    def own(value: object) -> bool:
        return isinstance(value, types.ModuleType) or callable(value)

    hints = get_type_hints(Config)
    return {k: v for k, v in names.items() if k[:1] != "_" and (k in hints or not own(v))}


def read_run(folder: str) -> dict[str, object]:
    """The knobs of the run in this folder, but for what was said to one call only, and for
    match_flops: max_steps is what it came to."""
    path = Path(folder, "config.json")
    try:
        values = json.loads(path.read_bytes())
        values["max_steps"]  # a Hugging Face folder has a config.json, too
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        what = "not a run's folder (no config.json of train.py); give that, or a config file"
        raise ConfigError(f"{folder}: {what}") from error
    of_the_call = ("resume", "overwrite", "stop_after", "match_flops")
    kept = {key: value for key, value in values.items() if key not in of_the_call}
    return kept | {"out_dir": str(Path(folder))}


def load_config(path: str, overrides: list[str] = ()) -> Config:
    """The knobs in a config file or a run's folder, with `--key=value` overrides, and with
    `--shorter=N` N times shorter. Raises ConfigError."""
    values, hints, shorter = {}, get_type_hints(Config), 1
    for key, value in (read_run(path) if os.path.isdir(path) else run_file(path)).items():
        set_key(values, key, value, path)
    for argument in overrides:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            raise ConfigError(f"command line: {shown(argument)} is not of the form --key=value")
        if key == "shorter":  # no knob: what a run keeps of it are the lengths
            if not re.fullmatch("[1-9][0-9]{0,17}", text):
                raise ConfigError(f"command line: shorter={shown(text)}: must be 1, 2, 3, ...")
            shorter = int(text)
            continue
        kind = hints.get(key)
        if kind is bool:
            text = text.capitalize() if equals else "True"
        elif not equals and kind:
            raise ConfigError(f"command line: --{key} needs a value, as in --{key}=VALUE")
        value = text
        if kind is not str:
            with contextlib.suppress(Exception):  # then it is a text, and of the wrong type
                value = ast.literal_eval(text)
        set_key(values, key, value, "command line")
    for key in LENGTHS:
        full = values.get(key, getattr(Config, key))
        values[key] = max(min(1, full), full // shorter)
    values["out_dir"] = values.get("out_dir") or f"out/{Path(path).stem}"
    values |= {key: os.path.expanduser(values[key]) for key in PATHS if key in values}
    config, later = Config(**values), {}
    if config.init_from:  # the shape is not known yet: take_shape checks the rest
        later = {"d_ff_target": 0, "n_kv_head_target": 0, "lr_restart": False}
    check_config(replace(config, **later))
    if config.match_flops:  # its prunes, but for what the command line says of them
        given = {argument.removeprefix("--").partition("=")[0] for argument in overrides}
        other = matched(config.match_flops, shorter)
        config = replace(config, **{key: getattr(other, key) for key in PRUNES - given})
    return config


def check_config(c: Config) -> None:
    """Refuse a value that no run could use. Raises ConfigError with the key, the value, the
    remedy."""

    def need(ok: bool, key: str, remedy: str) -> None:
        if not ok:
            raise ConfigError(f"{key}={shown(getattr(c, key))}: {remedy}")

    for key, value in vars(c).items():
        if isinstance(value, float):
            need(math.isfinite(value), key, "must be finite")
        if type(value) in (int, float):
            need(0 <= value < 2**62, key, "must lie between 0 and 2**62")
        if isinstance(value, str):
            plain = value.isprintable() and value == value.strip()
            need(plain, key, "must have no control character, and no blank at its ends")
    for key in PATHS:
        try:
            os.stat(getattr(c, key))
        except OSError as error:  # most need not exist
            need(error.errno != errno.ENAMETOOLONG, key, "is too long for a path")
    need(c.data_dir != "", "data_dir", "must be a folder that data.prepare made")
    need(not (c.resume and c.overwrite), "overwrite", "contradicts resume=True; give one of them")
    for key in [
        "max_steps",
        "batch_size",
        "context_length",
        "learning_rate",
        "n_layer",
        "d_model",
        "n_head",
        "n_kv_head",
        "d_ff",
        "prune_every",
        "round_to",
        "round_vocab_to",
        "eval_every",
        "eval_tokens",
        "save_every",
        "log_every",
        "rank_timeout",
    ]:
        need(getattr(c, key) > 0, key, "must be greater than 0")
    for key in ("beta1", "beta2", "score_beta"):
        need(getattr(c, key) < 1, key, "must be less than 1")
    need(c.round_vocab_to <= 4096, "round_vocab_to", "must be at most 4096")
    for key in ("learning_rate", "min_lr_fraction", "restart_fraction", "layer_floor"):
        need(getattr(c, key) <= 1, key, "must be at most 1")
    climbs = f"must not lie below the floor, min_lr_fraction={c.min_lr_fraction}"
    need(c.restart_fraction >= c.min_lr_fraction, "restart_fraction", climbs)
    decayed = f"must be at most 1 / learning_rate = {1 / c.learning_rate:.3g}, or weights turn over"
    need(c.weight_decay * c.learning_rate <= 1, "weight_decay", decayed)
    for key, choices in {
        "device": ("auto", "cpu", "cuda", "mps"),
        "dtype": ("auto", "float32", "bfloat16", "float16"),
        "compile": ("auto", "on", "off"),
        "criterion": tuple(CRITERIA),
        "scope": ("layer", "global"),
        "on_nonfinite": ("stop", "skip"),
        "prune_schedule": ("cubic", "linear", "oneshot"),
    }.items():
        need(getattr(c, key) in choices, key, f"must be one of {', '.join(choices)}")
    need(c.n_head % c.n_kv_head == 0, "n_kv_head", f"must divide n_head={c.n_head}")
    need(c.head_dim or c.d_model % c.n_head == 0, "n_head", f"must divide d_model={c.d_model}")
    need(c.head_dim % 2 == 0, "head_dim", "must be even")
    even = f"must be an even number times n_head={c.n_head}, or head_dim be set"
    need(c.head_dim or c.d_model // c.n_head % 2 == 0, "d_model", even)
    need(c.d_ff_target <= c.d_ff, "d_ff_target", f"is wider than the model, d_ff={c.d_ff}")
    need(
        c.n_kv_head_target <= c.n_kv_head,
        "n_kv_head_target",
        f"is wider than the model, n_kv_head={c.n_kv_head}",
    )
    near = max(1, round(c.d_ff_target / c.round_to)) * c.round_to
    on_grid = c.d_ff_target in (0, c.d_ff) or c.d_ff_target % c.round_to == 0
    need(
        on_grid,
        "d_ff_target",
        f"must be a multiple of round_to={c.round_to}; the nearest is {near}",
    )
    if prune_targets(c):
        need(0 < c.prune_start < 1, "prune_start", "must lie between 0 and 1")
        if c.prune_schedule != "oneshot":
            window = f"must lie between prune_start={c.prune_start} and 1"
            need(c.prune_start < c.prune_end < 1, "prune_end", window)
        memory = round(1 / (1 - c.score_beta))
        within = f"averages over {memory} steps, more than max_steps={c.max_steps}"
        need(memory <= c.max_steps, "score_beta", within)
    else:
        need(not c.lr_restart, "lr_restart", "restarts at the prune, and no target is set")
    need(c.stop_after < c.max_steps, "stop_after", f"must come before max_steps={c.max_steps}")
    for key, package in {"tensorboard": "tensorboard", "wandb_project": "wandb"}.items():
        spec = importlib.util.find_spec(package) if getattr(c, key) else None
        there = not getattr(c, key) or (spec and spec.origin)  # a folder of that name has no origin
        need(there, key, f"needs a package that is missing: pip install {package}")
    check_ranks(c, 1)


def check_ranks(c: Config, ranks: int) -> None:
    """Refuse a batch that so many ranks cannot share out evenly. Raises ConfigError."""
    share = c.batch_size // ranks
    if c.batch_size % ranks:
        raise ConfigError(f"batch_size={c.batch_size}: must divide by the {ranks} ranks")
    if share % (c.micro_batch_size or share):
        what = f"must divide the {share} sequences of each of {ranks} ranks"
        raise ConfigError(f"micro_batch_size={c.micro_batch_size}: {what}")


# --------------------------------------------------------------------------------------------------
# Plan: everything that is known before step 1
# --------------------------------------------------------------------------------------------------


def prune_targets(c: Config) -> dict[str, tuple[int, int, int]]:
    """Which widths change in this run: kind of group -> (full, target, grid)."""
    targets = {
        "d_ff": (c.d_ff, c.d_ff_target or c.d_ff, c.round_to),
        "n_kv_head": (c.n_kv_head, c.n_kv_head_target or c.n_kv_head, 1),
    }
    return {kind: t for kind, t in targets.items() if t[1] < t[0]}


def padded_vocab(c: Config, vocab_size: int) -> int:
    return -(-vocab_size // c.round_vocab_to) * c.round_vocab_to


def lowest_width(c: Config, target: int, grid: int) -> int:
    """The narrowest that scope="global" makes a layer: `layer_floor` of the target, on the grid."""
    return max(1, math.ceil(c.layer_floor * target / grid)) * grid


def model_config(
    c: Config, vocab_size: int, schedule: Schedule | None = None, step: int = 0
) -> GPTConfig:
    """The enlarged shape; with a schedule the one during `step`, as if layers were equally wide."""
    widths = {"d_ff": c.d_ff, "n_kv_head": c.n_kv_head}
    if schedule:
        widths |= {kind: schedule.width(step, *t) for kind, t in prune_targets(c).items()}
    return GPTConfig(
        vocab_size=vocab_size,
        context_length=c.context_length,
        d_model=c.d_model,
        head_dim=c.head_dim or c.d_model // c.n_head,
        queries_per_kv=c.n_head // c.n_kv_head,
        n_kv_head=[widths["n_kv_head"]] * c.n_layer,
        d_ff=[widths["d_ff"]] * c.n_layer,
        tie_embeddings=c.tie_embeddings,
    )


def least_memory(c: Config, vocab_size: int) -> int:
    """Bytes that a rank needs at the very least, whatever torch saves by fusing."""
    one, two = (model_config(replace(c, n_layer=n), vocab_size).n_parameters() for n in (1, 2))
    parameters = one + (c.n_layer - 1) * (two - one)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    share = c.batch_size // ranks * c.context_length  # tokens
    micro_batch = min(c.micro_batch_size * c.context_length or share, share)
    width = c.d_model if c.recompute else c.d_model + c.d_ff
    per_token = 4 * c.n_layer * width + 4 * vocab_size  # activations and logits
    # Weight, gradient and two moments in float32; two int64 per token of the batch.
    moments = 8 * parameters // (ranks if c.shard_optimizer else 1)
    return 8 * parameters + moments + 16 * share + micro_batch * per_token


def check_memory(c: Config, vocab_size: int, available: int) -> None:
    """Refuse what cannot fit into `available` bytes. Raises ConfigError with the key to blame: the
    one whose default would bring the need down the most.
    """
    needed = least_memory(c, vocab_size)
    if needed > available:
        keys = ("d_model", "n_layer", "d_ff", "head_dim", "n_head", "n_kv_head", "batch_size")
        keys += ("context_length", "micro_batch_size")
        by_default = {k: replace(c, **{k: getattr(Config, k)}) for k in keys}
        key = min(keys, key=lambda k: least_memory(by_default[k], vocab_size))
        raise ConfigError(
            f"{key}={getattr(c, key)}: the run needs at least {needed / 2**30:,.0f} GiB of memory; "
            f"there are {available / 2**30:,.0f} GiB"
        )


def make_schedule(c: Config) -> Schedule:
    """The config's schedule, in steps. Raises ConfigError where a run of max_steps has no room for
    it."""
    window = None
    if prune_targets(c):
        oneshot = c.prune_schedule == "oneshot"
        first = round(c.prune_start * c.max_steps) + 1
        last = first if oneshot else round(c.prune_end * c.max_steps) + 1
        if not 1 < first <= last <= c.max_steps or (first == last and not oneshot):
            raise ConfigError(
                f"max_steps={c.max_steps}: too few for the window from prune_start={c.prune_start}"
                + ("" if oneshot else f" to prune_end={c.prune_end}")
            )
        window = (first, last)
    schedule = Schedule(
        max_steps=c.max_steps,
        peak=c.learning_rate,
        min_lr_fraction=c.min_lr_fraction,
        warmup_steps=c.warmup_steps,
        lr_restart=c.lr_restart,
        restart_fraction=c.restart_fraction,
        prune_schedule=c.prune_schedule,
        window=window,
        prune_every=c.prune_every,
        score_steps=math.ceil(5 / (1 - c.score_beta)),  # what came before them is 1%
    )
    shortest = c.max_steps
    if c.lr_restart:
        shortest = min(window[0] - 1, c.max_steps - window[0] + 1)
    if c.warmup_steps >= shortest:
        raise ConfigError(
            f"warmup_steps={c.warmup_steps}: must be less than the {shortest} steps it opens, of "
            f"max_steps={c.max_steps}"
        )
    return schedule


@dataclass
class Plan:
    """What a run will do: its schedule, and the steps spent at each shape."""

    schedule: Schedule
    shapes: list[tuple[GPTConfig, int]]  # (shape, steps), in order
    flops: int  # training FLOPs of the whole run
    enlarged_flops: int  # of the same steps without pruning


def make_plan(c: Config, vocab_size: int) -> Plan:
    schedule, targets = make_schedule(c), prune_targets(c).values()
    tokens_per_step = c.batch_size * c.context_length

    def removed(step: int) -> int:  # never falls, so each shape is one stretch of steps
        return -sum(schedule.width(step, *target) for target in targets)

    shapes, done = [], 0
    while done < c.max_steps:
        shape = model_config(c, vocab_size, schedule, done + 1)
        steps = range(c.max_steps + 1)
        last = bisect_right(steps, removed(done + 1), lo=done + 1, key=removed) - 1
        shapes.append((shape, last - done))
        done = last
    flops = sum(shape.flops_per_token() * steps for shape, steps in shapes) * tokens_per_step
    enlarged = model_config(c, vocab_size).flops_per_token() * c.max_steps * tokens_per_step
    return Plan(schedule, shapes, flops, enlarged)


def matched(path: str, shorter: int = 1) -> Config:
    """The config that `match_flops` names. Raises ConfigError."""
    here = path if os.path.isfile(path) else str(Path(__file__).parent.parent / path)
    try:
        return load_config(here, ["--match_flops=", f"--shorter={shorter}"])
    except ConfigError as error:
        raise ConfigError(f"match_flops={path!r}: {error}") from error


# What a run that prunes may have different from the run of its final shape.
ENLARGED = ("n_head", "n_kv_head", "head_dim", "d_ff", "d_ff_target", "n_kv_head_target")
PRUNES = {"prune_schedule", "prune_start", "prune_end", "prune_every", "round_to"}


def match_flops(c: Config, vocab_size: int) -> Config:
    """With `match_flops`, the config whose max_steps cost what c's would with the enlarged shape
    of that other config, and with its prunes (`load_config` gave them to c).
    """
    if not c.match_flops:
        return c
    if prune_targets(c):
        raise ConfigError(f"match_flops={c.match_flops!r}: works for runs that do not prune")
    other = matched(c.match_flops)
    other = replace(c, **{key: getattr(other, key) for key in ENLARGED})
    try:
        check_config(other)
        flops = make_plan(other, vocab_size).flops
    except ConfigError as error:
        raise ConfigError(f"match_flops={c.match_flops!r}: {error}") from error
    per_step = model_config(c, vocab_size).flops_per_token() * c.batch_size * c.context_length
    c = replace(c, max_steps=round(flops / per_step))
    check_config(c)
    return c


SHAPE = ("n_layer", "d_model", "n_head", "n_kv_head", "head_dim", "d_ff", "tie_embeddings")


def take_shape(c: Config, initial: dict, vocab_size: int) -> Config:
    """The config with the model knobs of the model in `init_from`. Raises ConfigError."""
    shape = initial["model_config"]
    if len(set(shape.d_ff)) > 1 or len(set(shape.n_kv_head)) > 1:
        raise ConfigError(f"init_from={c.init_from!r}: its layers are not equally wide")
    if shape.vocab_size != padded_vocab(c, vocab_size):
        grids = range(1, 4097)  # it may be padded on another grid
        fits = [n for n in grids if -(-vocab_size // n) * n == shape.vocab_size]
        raise ConfigError(
            f"init_from={c.init_from!r}: its vocabulary has {shape.vocab_size} entries, "
            f"that of data_dir={c.data_dir!r} has {vocab_size}"
            + (f"; --round_vocab_to={fits[0]} pads it so" if fits else "")
        )
    shape.context_length = c.context_length
    knobs = {key: getattr(shape, key) for key in ("n_layer", "d_model", "head_dim")}
    knobs |= {"n_kv_head": shape.n_kv_head[0], "d_ff": shape.d_ff[0]}
    knobs |= {"n_head": shape.n_kv_head[0] * shape.queries_per_kv}
    c = replace(c, **knobs, tie_embeddings=shape.tie_embeddings)
    check_config(c)
    return c
