"""The knobs of a run, and how they are read: a config file first, then the command
line.

A config file is a Python file of assignments. It may start with
`from configs.idea import *`. Names that start with an underscore are its own.
"""

import ast
import difflib
import json
import math
import os
import runpy
import types
from dataclasses import dataclass, fields, replace
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from data.command import UserError
from model import KINDS, GPTConfig
from prune import CRITERIA
from schedule import Schedule


@dataclass
class Config:
    # The run
    out_dir: str = ""  # the folder of this run; empty: out/ and the config file's name
    resume: bool = False  # continue from the checkpoint in out_dir, if there is one
    overwrite: bool = False  # replace the run that is in out_dir
    seed: int = 1  # for the initial weights and the order of the data
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # of matrix products: auto, float32, bfloat16 or float16
    compile: str = "auto"  # auto, on or off. On a CPU, auto compiles only long runs
    data_dir: str = "data/sotu"  # made by data.prepare; the shipped corpus on first use
    init_from: str = ""  # start from these weights: a run's folder or a checkpoint.pt
    # Length
    max_steps: int = 1000  # the whole budget: enlarged, pruning and recovery
    batch_size: int = 32  # sequences per step, summed over ranks and micro-batches
    micro_batch_size: int = 0  # sequences per rank and forward pass; 0: all of a rank's
    context_length: int = 128  # tokens per sequence
    recompute: str = "none"  # in the backward pass, to save memory: none, cheap or all
    # Optimizer
    optimizer: str = "muon"  # muon for the matrices inside the blocks, or adamw for all
    learning_rate: float = 8e-3  # the peak
    min_lr_fraction: float = 0.1  # the last step uses this fraction of the peak
    warmup_steps: int = 50  # linear, from 0 to the peak
    lr_restart: bool = False  # naive arm: fresh optimizer and cosine at prune_start
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # the largest norm of all gradients together; 0: off
    # The enlarged model
    n_layer: int = 4
    d_model: int = 64
    n_head: int = 4  # query heads
    n_kv_head: int = 2  # key-value heads; each serves n_head / n_kv_head query heads
    head_dim: int = 0  # 0: d_model / n_head
    d_ff: int = 512  # FFN neurons per layer
    tie_embeddings: bool = True  # one matrix for the input and the output
    round_vocab_to: int = 1  # pad the vocabulary to a multiple: GPUs like 64 or 128
    # Teacher
    teacher: str = ""  # also learn from this model: a run's folder or a checkpoint.pt
    teacher_weight: float = 0.5  # of its distribution; the next token has the rest
    # Pruning
    d_ff_target: int = 0  # FFN neurons per layer at the end; 0: never pruned
    n_kv_head_target: int = 0  # key-value heads per layer at the end
    d_model_target: int = 0  # channels of the residual stream at the end
    n_layer_target: int = 0  # layers at the end
    criterion: str = "sensitivity"  # sensitivity, magnitude or random: see prune.py
    score_beta: float = 0.85  # scores are averaged over about 1 / (1 - beta) steps
    prune_schedule: str = "cubic"  # cubic or oneshot
    prune_start: float = 0.1  # the first part of the run trains the enlarged model
    prune_end: float = 0.35  # from here on, the small model recovers
    prune_every: int = 20  # steps between two prunes
    round_to: int = 16  # pruned widths are multiples of this: hardware likes 8 to 128
    # Output
    eval_every: int = 250  # steps between validations
    eval_tokens: int = 1_000_000  # validate on the first so many tokens
    save_every: int = 250  # steps between checkpoints; the last step is always saved
    log_every: int = 10  # steps between lines of the log
    stop_after: int = 0  # save and stop after this step; 0: run to the end
    wandb_project: str = ""  # also log to this project of Weights & Biases


CHOICES = {
    "device": ("auto", "cpu", "cuda", "mps"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "compile": ("auto", "on", "off"),
    "recompute": ("none", "cheap", "all"),
    "optimizer": ("muon", "adamw"),
    "criterion": tuple(CRITERIA),
}
POSITIVE = (
    *("max_steps", "batch_size", "context_length", "round_vocab_to"),
    *("n_layer", "d_model", "n_head", "n_kv_head", "d_ff"),
    *("eval_every", "eval_tokens", "save_every", "log_every"),
)
PATHS = ("out_dir", "data_dir", "init_from", "teacher")
ONE_CALL = ("out_dir", "resume", "overwrite", "stop_after")  # no part of a checkpoint
# --shorter=N is no knob of a run: it divides these knobs by N
LENGTHS = ("max_steps", "warmup_steps", "prune_every", "eval_every", "save_every")
TYPES = {field.name: field.type for field in fields(Config)}


def load_config(path: str, arguments=()) -> tuple[Config, dict]:
    """Read a config file, or the folder of a run, and then --key=value arguments.

    Returns the config, and the knobs that the arguments set. Raises UserError.
    """
    config = Config(out_dir=f"out/{Path(path).stem}")
    for key, value in read_file(path).items():
        set_knob(config, path, key, value)
    given = []
    shorter = 1
    for argument in arguments:
        key, value = parse_argument(argument)
        if key == "shorter":
            shorter = value
        else:
            set_knob(config, "command line", key, value)
            given.append(key)
    if shorter != 1:
        if os.path.isdir(path):
            raise UserError("shorter: the lengths of a run are fixed; give --max_steps")
        shorten(config, shorter)
        given += [*LENGTHS, "log_every"]
    check_config(config)
    return config, {key: getattr(config, key) for key in given}


def read_file(path: str) -> dict:
    """The knobs that a config file assigns, or those of the run in a folder."""
    if os.path.isdir(path):
        try:
            knobs = json.loads(Path(path, "config.json").read_bytes())
            knobs["max_steps"]  # a Hugging Face folder has a config.json, too
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{path}: no config.json of a run in this folder"
            ) from error
        for key in ONE_CALL:
            knobs.pop(key, None)
        return knobs | {"out_dir": str(Path(path))}
    if not (path.endswith(".py") and os.path.isfile(path)):
        folder = Path(path).absolute().parent
        raise UserError(f"{path}: no config file (*.py) or run's folder in {folder}")
    try:
        names = runpy.run_path(path)
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    knobs = {}
    for key, value in names.items():
        is_code = callable(value) or isinstance(value, types.ModuleType)
        if not key.startswith("_") and not is_code:
            knobs[key] = value
    return knobs


def parse_argument(argument: str) -> tuple[str, object]:
    """--max_steps=3 -> ("max_steps", 3). A bool alone, such as --resume, is true."""
    key, equals, text = argument.removeprefix("--").partition("=")
    kind = TYPES.get(key)
    complete = equals or kind is bool
    if not argument.startswith("--") or (not complete and kind):
        raise UserError(f"command line: {argument!r} is not of the form --key=value")
    if kind is str:
        return key, text
    if not equals or text.lower() in ("true", "false"):
        return key, text.lower() != "false"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if key == "shorter" and (type(value) is not int or value < 1):
        raise UserError(f"shorter={text}: must be 1, 2, 3, ...")
    return key, value


def set_knob(config: Config, where: str, key: str, value: object) -> None:
    """Set one knob. Raises a UserError that names it."""
    if key not in TYPES:
        nearest = difflib.get_close_matches(key.lower(), TYPES, n=1, cutoff=0)[0]
        raise UserError(f"{where}: unknown key {key!r}; the nearest is {nearest!r}")
    kind = TYPES[key]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        name = kind.__name__
        raise UserError(f"{where}: {key}={value!r} is not of type {name}; see --help")
    if key in PATHS:
        value = os.path.expanduser(value)
    setattr(config, key, value)


def shorten(config: Config, times: int) -> None:
    """Divide the lengths by `times`. Zero stays zero, and one is the least of
    others."""
    for key in LENGTHS:
        length = getattr(config, key)
        setattr(config, key, max(min(1, length), length // times))
    for_20_lines = max(1, config.max_steps // 20)
    config.log_every = min(config.log_every, for_20_lines)


def require(condition: object, config: Config, key: str, remedy: str) -> None:
    """Raises a UserError that blames this knob, unless the condition holds."""
    if not condition:
        raise UserError(f"{key}={getattr(config, key)!r}: {remedy}")


def check_config(config: Config) -> None:
    """Refuse a value that no run could use. Raises UserError."""
    for key, value in vars(config).items():
        if type(value) in (int, float):
            in_range = 0 <= value < 2**63
            require(in_range, config, key, "must be 0 or more, and less than 2^63")
        if key in POSITIVE:
            require(value > 0, config, key, "must be greater than 0")
        if key in CHOICES:
            known = CHOICES[key]
            require(value in known, config, key, "must be one of " + ", ".join(known))
    require(config.beta1 < 1, config, "beta1", "must be less than 1")
    require(config.beta2 < 1, config, "beta2", "must be less than 1")
    require(config.teacher_weight <= 1, config, "teacher_weight", "must be at most 1")
    remedy = f"must divide n_head={config.n_head}"
    require(config.n_head % config.n_kv_head == 0, config, "n_kv_head", remedy)
    quotient = config.d_model / config.n_head
    is_even = (config.head_dim or quotient) % 2 == 0
    remedy = f"must be even; 0 is d_model / n_head = {quotient:g}"
    require(is_even, config, "head_dim", remedy)
    require(
        not (config.resume and config.overwrite),
        config,
        "overwrite",
        "contradicts resume",
    )
    own_files = (Path(config.out_dir), Path(config.out_dir, "checkpoint.pt"))
    for key in ("init_from", "teacher"):
        is_own = Path(getattr(config, key)) in own_files
        require(
            not is_own, config, key, "this run would overwrite it: it is in out_dir"
        )
    remedy = f"must come before max_steps={config.max_steps}"
    require(config.stop_after < config.max_steps, config, "stop_after", remedy)
    if not config.init_from:  # else the widths are those of other weights
        make_schedule(config)


def make_schedule(config: Config) -> Schedule:
    """The schedule of a run. Raises UserError if the knobs do not make one."""
    try:
        return Schedule(config)
    except ValueError as error:
        raise UserError(str(error)) from error


def enlarged_shape(config: Config, vocab_size: int) -> GPTConfig:
    """The shape of the model before its first prune. vocab_size: that of the data."""
    multiple = config.round_vocab_to
    return GPTConfig(
        vocab_size=math.ceil(vocab_size / multiple) * multiple,
        context_length=config.context_length,
        n_layer=config.n_layer,
        d_model=config.d_model,
        head_dim=config.head_dim or config.d_model // config.n_head,
        queries_per_kv=config.n_head // config.n_kv_head,
        n_kv_head=config.n_kv_head,
        d_ff=config.d_ff,
        tie_embeddings=config.tie_embeddings,
    )


def take_shape(config: Config, shape: GPTConfig) -> None:
    """Give the config the shape of a model that exists. Raises UserError."""
    for key in ("n_head", "head_dim", "tie_embeddings", *KINDS):
        setattr(config, key, getattr(shape, key))
    make_schedule(config)


def read_log(out_dir: Path) -> list[dict]:
    """The events of a run so far, in order; [] if there is no log.

    A last line that a kill has cut is left out. Raises UserError if the log is damaged.
    """
    path = out_dir / "log.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}") from error


def open_folder(config: Config) -> FileLock:
    """Make out_dir, and hold it for this process as long as the lock lives.

    Raises UserError if out_dir holds a run that the knobs do not name, or something
    else, or another process.
    """
    out_dir = Path(config.out_dir)
    held = []
    for name in ("config.json", "log.jsonl", "checkpoint.pt"):
        if (out_dir / name).exists():
            held.append(out_dir / name)
    if held and not (config.resume or config.overwrite):
        remedy = "--resume continues it, --overwrite replaces it"
        raise UserError(f"out_dir={out_dir}: holds a run; {remedy}")
    if held:
        read_file(config.out_dir)  # refuses what other programs wrote
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out_dir / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        problem = "another process is running there"
        raise UserError(f"out_dir={out_dir}: {problem}") from None
    except OSError as error:
        problem = f"cannot write there: {error}"
        raise UserError(f"out_dir={out_dir}: {problem}") from error
    return lock


def split_batch(config: Config, world_size: int) -> tuple[int, int]:
    """The sequences in a micro-batch, and how many micro-batches a rank computes in a
    step.

    Raises UserError if ranks or micro-batches do not divide the batch.
    """
    rank_batch_size, rest = divmod(config.batch_size, world_size)
    require(rest == 0, config, "batch_size", f"must divide by the {world_size} ranks")
    micro_batch_size = config.micro_batch_size or rank_batch_size
    n_micro_batches, rest = divmod(rank_batch_size, micro_batch_size)
    remedy = f"must divide a rank's {rank_batch_size} sequences"
    require(rest == 0, config, "micro_batch_size", remedy)
    return micro_batch_size, n_micro_batches


def compact(n: float) -> str:
    """1234567 -> '1.23M'."""
    return tqdm.format_sizeof(n).replace("G", "B")


def describe_run(
    config: Config,
    schedule: Schedule,
    enlarged: GPTConfig,
    flops: float,
    data_tokens: int,
) -> str:
    """Five lines that say what a run will do. flops: in training, over the whole
    run."""
    shape = enlarged
    widths = schedule.segments()[-1][1]
    final = replace(enlarged, **widths)
    tokens = config.max_steps * config.batch_size * config.context_length
    steps = f"{config.max_steps} steps of {config.batch_size} x {config.context_length}"
    sizes = f"{shape.n_layer} layers, d_model {shape.d_model}, d_ff {shape.d_ff}"
    heads = f"{shape.n_head} heads over {shape.n_kv_head} KV heads"
    epochs = f"{tokens / data_tokens:.3g}"
    ratio = f"{tokens / final.n_params():.3g}"
    lines = [
        f"data       {config.data_dir}: {compact(data_tokens)} tokens, {epochs} epochs",
        f"model      {compact(shape.n_params())} parameters: {sizes}, {heads}",
        f"run        {steps}: {compact(tokens)} tokens, {ratio} per final parameter",
    ]
    compute = f"compute    {flops:.3g} training FLOPs"
    prunes = schedule.prune_steps()
    if prunes:
        cuts = []
        for kind, width in schedule.widths.items():
            cuts.append(f"{kind} {width.enlarged} -> {width.target}")
        when = f"in {len(prunes)} prunes, steps {prunes[0]} to {prunes[-1]}"
        if len(prunes) == 1:
            when = f"in one prune, step {prunes[0]}"
        remains = f"{compact(final.n_params())} parameters remain"
        lines.append(f"prune      {', '.join(cuts)} {when}; {remains}")
        more = flops / (tokens * final.flops_per_token()) - 1
        compute += f", {more:.0%} more than the final model's"
    return "\n".join([*lines, compute])


def resumed_config(
    saved: dict, config: Config, given: dict
) -> tuple[Config, list[str]]:
    """The config of a run that continues, and a line for each knob that changes.

    saved: the config in its checkpoint. given: the knobs of the command line, which
    win. Raises UserError.
    """
    result = Config()
    for key, value in saved.items():
        set_knob(result, "checkpoint", key, value)
    changes = []
    for key in ONE_CALL:
        setattr(result, key, getattr(config, key))
    for key, value in given.items():
        before = getattr(result, key)
        is_same = value in ("auto", before)  # the checkpoint has what auto became
        if key not in ONE_CALL and not is_same:
            changes.append(f"{key} {before} -> {value}")
            setattr(result, key, value)
    check_config(result)
    if result.init_from:
        make_schedule(result)  # its shape is known by now
    return result, changes
