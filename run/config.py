"""Every knob of a run, how a config is read (a file or the folder of a run, then the command line),
and what is refused before anything starts. A config may start with `from configs.idea import *`."""

import ast
import contextlib
import difflib
import json
import math
import os
import runpy
import types
from dataclasses import dataclass, replace
from pathlib import Path

from data.command import UserError
from model import KINDS, GPTConfig
from prune import CRITERIA
from schedule import Schedule


@dataclass
class Config:
    # The run
    out_dir: str = ""  # the run owns this folder; empty: out/ and the config file's name
    resume: bool = False  # go on from out_dir's checkpoint; start afresh where nothing was saved
    changed: bool = False  # with resume: other RESCUE knobs (run/config.py), as after a divergence
    overwrite: bool = False  # replace the run that out_dir holds
    seed: int = 1  # of the initial weights and of the order of the data
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # of the matrix products: auto, float32, bfloat16 or float16
    compile: str = "auto"  # auto, on or off. On a CPU, auto compiles only long runs
    data_dir: str = "data/sotu"  # made by data.prepare; the shipped corpus is made on first use
    init_from: str = ""  # to start from: a run, a checkpoint.pt or a Hugging Face folder
    # Length
    max_steps: int = 1000  # the horizon of the schedule; the whole budget: enlarged, prune, recover
    batch_size: int = 32  # sequences per step, over all ranks and micro batches
    micro_batch_size: int = 0  # sequences per rank in one forward pass; 0: all of the rank's share
    context_length: int = 128  # tokens per sequence
    recompute: str = "none"  # in the backward pass, for memory: none, cheap (no products) or all
    # Optimizer
    optimizer: str = "muon"  # of the blocks' matrices: muon or adamw; of the rest: adamw
    learning_rate: float = 8e-3  # the peak
    min_lr_fraction: float = 0.1  # the last step has this fraction of the peak
    warmup_steps: int = 50  # linear, from 0 to the peak
    lr_restart: bool = False  # at prune_start: fresh optimizer, warm-up and cosine again (naive)
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # on the norm of all gradients; 0: off
    # Model, enlarged
    n_layer: int = 4
    d_model: int = 64
    n_head: int = 4  # query heads
    n_kv_head: int = 2  # key-value heads; each serves n_head / n_kv_head query heads
    head_dim: int = 0  # 0: d_model / n_head
    d_ff: int = 512  # FFN neurons per layer
    tie_embeddings: bool = True  # one matrix reads tokens in and writes logits out
    round_vocab_to: int = 1  # pad the vocabulary with tokens that never come: GPUs like 64 or 128
    # Teacher
    teacher: str = ""  # to learn from, too: a run, a checkpoint.pt or a Hugging Face folder
    teacher_weight: float = 0.5  # of the teacher's distribution; the token that came has the rest
    # Prune
    d_ff_target: int = 0  # FFN neurons per layer at the end; 0: not pruned
    n_kv_head_target: int = 0  # key-value heads per layer at the end; 0: not pruned
    d_model_target: int = 0  # channels of the residual stream at the end; 0: not pruned
    n_layer_target: int = 0  # layers at the end; 0: not pruned
    criterion: str = "sensitivity"  # sensitivity, magnitude or random (prune.py)
    score_beta: float = 0.85  # scores are averaged over about 1 / (1 - score_beta) steps
    prune_schedule: str = "cubic"  # cubic, or oneshot: the window closes as it opens
    prune_start: float = 0.1  # the prune window opens when this fraction of max_steps is done
    prune_end: float = 0.35  # and closes here, with the last prune
    prune_every: int = 20  # steps from its opening to the first prune, and to each next one
    round_to: int = 16  # pruned d_ff and d_model are multiples of it: hardware likes 8 to 128
    # Look
    eval_every: int = 250  # steps between validations
    eval_tokens: int = 1_000_000  # validate on the first so many tokens of the split
    save_every: int = 250  # steps between checkpoints; the last step is always saved
    keep: int = 1  # how many checkpoints; all but the last have their step in the name
    log_every: int = 10  # steps between lines of the log
    stop_after: int = 0  # save and stop after this step, to be resumed later; 0: run to the end


PATHS = ("out_dir", "data_dir", "init_from", "teacher")
NOT_SAVED = {"out_dir", "resume", "changed", "overwrite", "stop_after"}  # in a checkpoint
# A resumed run may give other values: training differs by rounding at most. Data and teacher may
# only have moved, and init_from only if its place is gone: OutDir.load_checkpoint refuses all else
MAY_CHANGE = NOT_SAVED | {"device", "compile", "init_from", "micro_batch_size", "recompute"}
MAY_CHANGE |= {"eval_every", "eval_tokens", "save_every", "keep", "log_every", "teacher"}
MAY_CHANGE |= {"data_dir"}
# With --changed, these may differ, too. Another seed draws other batches
RESCUE = {"learning_rate", "min_lr_fraction", "warmup_steps", "grad_clip", "weight_decay"}
RESCUE |= {"beta1", "beta2", "seed"}
OF_ONE_RUN = NOT_SAVED | {"seed", "device", "compile"}  # may differ in an arm of tools.compare
CHOICES = {
    "device": ("auto", "cpu", "cuda", "mps"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "compile": ("auto", "on", "off"),
    "recompute": ("none", "cheap", "all"),
    "optimizer": ("muon", "adamw"),
    "criterion": CRITERIA,
}
POSITIVE = """batch_size context_length n_layer d_model n_head n_kv_head d_ff round_vocab_to
    eval_every eval_tokens save_every keep log_every max_steps"""  # Schedule checks others
SHAPE = ("n_head", "head_dim", "tie_embeddings", *KINDS)  # the knobs of a model's shape


def need(ok: object, c: Config, key: str, remedy: str) -> None:
    """Raises UserError, which blames this knob, unless `ok`."""
    if not ok:
        raise UserError(f"{key}={getattr(c, key)!r}: {remedy}")


def check_config(c: Config, shape_known: bool = True) -> None:
    """Refuse a value that no run could use. Raises UserError. shape_known: False where the shape of
    the model comes from `init_from` and is not read yet."""
    for key, value in vars(c).items():
        if type(value) in (int, float):
            need(0 <= value < 2**63, c, key, "must be 0 or more, and less than 2^63")
            need(value > 0 or key not in POSITIVE.split(), c, key, "must be greater than 0")
    for key in ("beta1", "beta2"):
        need(getattr(c, key) < 1, c, key, "must be less than 1")
    need(c.teacher_weight <= 1, c, "teacher_weight", "must be at most 1")
    for key, known in CHOICES.items():
        need(getattr(c, key) in known, c, key, "must be one of " + ", ".join(known))
    need(c.n_head % c.n_kv_head == 0, c, "n_kv_head", f"must divide n_head={c.n_head}")
    even = f"must be even; 0 is d_model / n_head = {c.d_model / c.n_head:g}"
    need((c.head_dim or c.d_model / c.n_head) % 2 == 0, c, "head_dim", even)
    need(not (c.resume and c.overwrite), c, "overwrite", "contradicts resume")
    need(c.resume or not c.changed, c, "changed", "goes with --resume")
    check_ranks(c, of_torchrun("WORLD_SIZE", 1))
    need(c.stop_after < c.max_steps, c, "stop_after", f"must come before max_steps={c.max_steps}")
    try:
        if shape_known:
            Schedule(c)
    except ValueError as error:
        raise UserError(str(error)) from error


def of_torchrun(name: str, default: int) -> int:
    """A number that torchrun sets in the environment."""
    return int(os.environ.get(name, default))


def micro_batch(c: Config, ranks: int) -> int:
    """Sequences of a rank in one forward pass."""
    return c.micro_batch_size or math.ceil(c.batch_size / ranks)


def check_ranks(c: Config, ranks: int) -> None:
    """Refuse a batch that so many ranks cannot share out evenly. Raises UserError."""
    share, rest = divmod(c.batch_size, ranks)
    need(rest == 0, c, "batch_size", f"must divide by the {ranks} ranks")
    need(share % micro_batch(c, ranks) == 0, c, "micro_batch_size", f"must divide a rank's {share}")


def check_vocabulary(c: Config, key: str, shape: GPTConfig, vocab_size: int) -> None:
    """Refuse the model that this knob names where its vocabulary is not the run's."""
    size = enlarged_shape(c, vocab_size).vocab_size
    what = f"its vocabulary has {shape.vocab_size} entries, that of the run {size}"
    need(shape.vocab_size == size, c, key, f"{what}; --round_vocab_to pads it")


def enlarged_shape(c: Config, vocab_size: int) -> GPTConfig:
    """The shape of the model before its first prune. vocab_size: that of the data."""
    return GPTConfig(
        vocab_size=math.ceil(vocab_size / c.round_vocab_to) * c.round_vocab_to,
        context_length=c.context_length,
        head_dim=c.head_dim or c.d_model // c.n_head,
        queries_per_kv=c.n_head // c.n_kv_head,
        tie_embeddings=c.tie_embeddings,
        **{kind: getattr(c, kind) for kind in KINDS},
    )


def take_shape(c: Config, shape: GPTConfig, vocab_size: int) -> Config:
    """The config with the shape of `init_from`. vocab_size: that of the data. Raises UserError."""
    check_vocabulary(c, "init_from", shape, vocab_size)
    c = replace(c, **{key: getattr(shape, key) for key in SHAPE})
    check_config(c)
    return c


# --shorter=N is no knob of a run: it divides these of its knobs by N
LENGTHS = ("max_steps", "warmup_steps", "prune_every", "eval_every", "save_every")
TYPES = Config.__annotations__ | {"shorter": int}


def read_file(path: str) -> dict:
    """The names that a config file assigns, or the config.json of a run's folder. Names that start
    with an underscore, modules and functions are the file's own business."""
    if os.path.isdir(path):
        try:
            values = json.loads(Path(path, "config.json").read_bytes())
            values["max_steps"]  # or LookupError: a Hugging Face folder has a config.json, too
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path}: not a run's folder (no config.json of train.py)") from error
        saved = {key: value for key, value in values.items() if key not in NOT_SAVED}
        return saved | {"out_dir": str(Path(path))}
    # Only *.py: a checkpoint is a zip, and runpy would run what is in one
    if not (path.endswith(".py") and os.path.isfile(path)):
        where = f"looked in {Path(path).absolute().parent}"
        raise UserError(f"{path}: no config (*.py), no run's folder; {where}")
    try:
        names = runpy.run_path(path)
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    own = {k for k, v in names.items() if callable(v) or isinstance(v, types.ModuleType)}
    return {k: v for k, v in names.items() if not k.startswith("_") and k not in own}


def load_config(path: str, overrides: list[str] = ()) -> Config:
    """Read a config file or a run's folder and apply `--key=value` overrides. `--shorter=N` makes
    the run N times shorter: it divides LENGTHS of the command line, too. Raises UserError."""
    given = [(path, key, value) for key, value in read_file(path).items()]
    for argument in overrides:
        key, equals, value = argument.removeprefix("--").partition("=")
        kind = TYPES.get(key)
        if not argument.startswith("--") or not (equals or kind in (bool, None)):
            raise UserError(f"command line: {argument!r} is not of the form --key=value")
        if kind is bool:
            value = value.capitalize() if equals else "True"
        if kind is not str:
            with contextlib.suppress(Exception):  # then it is a text, and of the wrong type
                value = ast.literal_eval(value)
        given.append(("command line", key, value))
    values = vars(Config()) | {"shorter": 1}
    for where, key, value in given:
        if key not in TYPES:
            (near,) = difflib.get_close_matches(key.lower(), TYPES, n=1, cutoff=0)
            way = f"the nearest is {near!r}; a name of a config's own starts with _"
            raise UserError(f"{where}: unknown key {key!r} = {value!r}; {way}")
        kind = TYPES[key]
        if type(value) is not kind and (kind, type(value)) != (float, int):
            raise UserError(f"{where}: {key}={value!r} is not of type {kind.__name__}; see --help")
        values[key] = kind(value)
    shorter = values.pop("shorter")
    if shorter < 1:
        raise UserError(f"shorter={shorter}: must be 1, 2, 3, ...")
    values["out_dir"] = values["out_dir"] or f"out/{Path(path).stem}"
    values |= {key: os.path.expanduser(values[key]) for key in PATHS}
    for key in LENGTHS:  # 0 stays 0, and 1 is the least of all others
        values[key] = max(min(1, values[key]), values[key] // shorter)
    if shorter > 1:  # at least 20 lines in the log
        values["log_every"] = min(values["log_every"], max(1, values["max_steps"] // 20))
    c = Config(**values)
    check_config(c, shape_known=not c.init_from)
    return c
