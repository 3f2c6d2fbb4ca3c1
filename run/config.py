"""Every knob of a run, and what is refused before anything starts. How a config is read:
run/read_config.py.
"""

import math
import os
from dataclasses import dataclass

from model import UNITS
from prune import CRITERIA
from run import UserError


@dataclass
class Config:
    # The run
    out_dir: str = ""  # the run owns this folder; empty: out/ and the config file's name
    resume: bool = False  # go on from out_dir's checkpoint; start afresh where there is none
    overwrite: bool = False  # replace the run that out_dir holds
    seed: int = 1  # of the initial weights and of the order of the data
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # of the matrix products: auto, float32 or bfloat16
    compile: str = "auto"  # auto, on or off. On a CPU, auto compiles only long runs
    data_dir: str = "data/sotu"  # made by data.prepare; the shipped corpus is made on first use
    init_from: str = ""  # weights and shape to start from: a checkpoint.pt or a Hugging Face folder
    # Length
    max_steps: int = 1000  # the horizon of the schedule; the whole budget: enlarged, prune, recover
    batch_size: int = 32  # sequences per step, over all ranks and micro batches
    micro_batch_size: int = 0  # sequences per rank in one forward pass; 0: all of the rank's share
    context_length: int = 128  # tokens per sequence
    recompute: bool = False  # activations in the backward pass: a third more work, less memory
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
    # Prune
    d_ff_target: int = 0  # FFN neurons per layer at the end; 0: not pruned
    n_kv_head_target: int = 0  # key-value heads per layer at the end; 0: not pruned
    d_model_target: int = 0  # channels of the residual stream at the end; 0: not pruned
    n_layer_target: int = 0  # layers at the end; 0: not pruned
    criterion: str = "sensitivity"  # sensitivity, magnitude, activation or random
    score_beta: float = 0.85  # scores are averaged over about 1 / (1 - score_beta) steps
    prune_schedule: str = "cubic"  # cubic, or oneshot (all at prune_start)
    prune_start: float = 0.5  # the window, as fractions of max_steps: enlarged until here,
    prune_end: float = 0.75  # at the target from here on
    prune_every: int = 20  # steps between prunes
    round_to: int = 16  # pruned d_ff and d_model are multiples of it: hardware likes 8 to 128
    # Look
    eval_every: int = 250  # steps between validations
    eval_tokens: int = 1_000_000  # validate on the first so many tokens of the split
    save_every: int = 250  # steps between checkpoints; the last step is always saved
    log_every: int = 10  # steps between lines of the log
    wandb_project: str = ""  # the log's numbers also as a run of this project at Weights & Biases
    stop_after: int = 0  # save and stop after this step, to be resumed later; 0: run to the end


# Knobs that a checkpoint does not hold.
NOT_SAVED = {"out_dir", "resume", "overwrite", "stop_after", "wandb_project"}
CHOICES = {
    "device": ("auto", "cpu", "cuda", "mps"),
    "dtype": ("auto", "float32", "bfloat16"),
    "compile": ("auto", "on", "off"),
    "optimizer": ("muon", "adamw"),
    "criterion": CRITERIA,
    "prune_schedule": ("cubic", "oneshot"),
}
POSITIVE = """max_steps batch_size context_length learning_rate n_layer d_model n_head n_kv_head
    d_ff prune_every round_to round_vocab_to eval_every eval_tokens save_every log_every"""


def prune_targets(c: Config) -> dict[str, tuple[int, int, int]]:
    """The kinds of unit that the run prunes -> (at first, at the end, grid of the widths between).

    Counts (n_...) have no grid; widths (d_...) lie on round_to.
    """
    targets = {}
    for kind in UNITS:
        full, target = getattr(c, kind), getattr(c, f"{kind}_target")
        if 0 < target < full:
            targets[kind] = (full, target, c.round_to if kind.startswith("d_") else 1)
    return targets


def shown(value: object) -> str:
    """A value of any kind, short enough for a line."""
    try:
        text = repr(value)
    except Exception:  # thousands of digits, or an object that cannot say what it is
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 200 else text[:200] + "..."


def check_config(c: Config, shape_known: bool = True) -> None:
    """Refuse a value that no run could use. Raises UserError with the key, the value, the remedy.

    shape_known: False where the model's shape comes from `init_from` and is not read yet.
    """

    def need(ok: bool, key: str, remedy: str) -> None:
        if not ok:
            raise UserError(f"{key}={shown(getattr(c, key))}: {remedy}")

    for key, value in vars(c).items():
        if isinstance(value, float):
            need(math.isfinite(value), key, "must be finite")
        if type(value) in (int, float):
            need(0 <= value < 2**62, key, "must lie between 0 and 2**62")
        if isinstance(value, str):
            plain = value.isprintable() and value == value.strip()
            need(plain, key, "must have no control character, and no blank at its ends")
            need(max(map(len, value.split(os.sep))) < 256, key, "is too long")
    need(c.data_dir != "", "data_dir", "must be a folder that data.prepare made")
    need(not (c.resume and c.overwrite), "overwrite", "contradicts resume=True; give one of them")
    for key in POSITIVE.split():
        need(getattr(c, key) > 0, key, "must be greater than 0")
    for key in ("beta1", "beta2", "score_beta"):
        need(getattr(c, key) < 1, key, "must be less than 1")
    for key in ("learning_rate", "min_lr_fraction"):
        need(getattr(c, key) <= 1, key, "must be at most 1")
    need(c.round_vocab_to <= 65_536, "round_vocab_to", "must be at most 65536")
    decayed = f"must be at most 1 / learning_rate = {1 / c.learning_rate:.3g}, or weights turn over"
    need(c.weight_decay * c.learning_rate <= 1, "weight_decay", decayed)
    for key, choices in CHOICES.items():
        need(getattr(c, key) in choices, key, f"must be one of {', '.join(choices)}")
    need(c.n_head % c.n_kv_head == 0, "n_kv_head", f"must divide n_head={c.n_head}")
    need(c.head_dim or c.d_model % c.n_head == 0, "n_head", f"must divide d_model={c.d_model}")
    need(c.head_dim % 2 == 0, "head_dim", "must be even")
    even = f"must be an even number times n_head={c.n_head}, or head_dim be set"
    need(c.head_dim or c.d_model // c.n_head % 2 == 0, "d_model", even)
    need(c.stop_after < c.max_steps, "stop_after", f"must come before max_steps={c.max_steps}")
    check_ranks(c, int(os.environ.get("WORLD_SIZE", 1)))
    if shape_known:
        check_prunes(c, need)


def micro_batch(c: Config, ranks: int) -> int:
    """Sequences of a rank in one forward pass."""
    return c.micro_batch_size or math.ceil(c.batch_size / ranks)


def check_ranks(c: Config, ranks: int) -> None:
    """Refuse a batch that so many ranks cannot share out evenly. Raises UserError."""
    share = c.batch_size // ranks
    if c.batch_size % ranks:
        raise UserError(f"batch_size={c.batch_size}: must divide by the {ranks} ranks")
    if share % micro_batch(c, ranks):
        what = f"must divide the {share} sequences of each of {ranks} ranks"
        raise UserError(f"micro_batch_size={c.micro_batch_size}: {what}")


def check_prunes(c: Config, need) -> None:
    targets = prune_targets(c)
    for kind in UNITS:
        full, target = getattr(c, kind), getattr(c, f"{kind}_target")
        need(target <= full, f"{kind}_target", f"is more than {kind}={full}")
    for kind, (_, target, grid) in targets.items():
        near = max(1, round(target / grid)) * grid
        remedy = f"must be a multiple of round_to={grid}; the nearest is {near}"
        need(target % grid == 0, f"{kind}_target", remedy)
    width = c.d_model_target or c.d_model
    n_head = (c.n_kv_head_target or c.n_kv_head) * (c.n_head // c.n_kv_head)
    remedies = {
        "d_model": f"must be a multiple of the {n_head} query heads at the end",
        "n_kv_head": f"leaves {n_head} query heads; they must divide d_model={width}",
    }
    for kind, remedy in remedies.items():
        fits = kind not in targets or width % n_head == 0
        need(fits, f"{kind}_target", f"{remedy}, or transformers cannot load the model")
    if not targets:
        need(not c.lr_restart, "lr_restart", "restarts at the prune, and no target is set")
        return
    need(0 < c.prune_start < 1, "prune_start", "must lie between 0 and 1")
    if c.prune_schedule != "oneshot":
        window = f"must lie between prune_start={c.prune_start} and 1"
        need(c.prune_start < c.prune_end < 1, "prune_end", window)
    memory = round(1 / (1 - c.score_beta))
    within = f"averages over {memory} steps, more than max_steps={c.max_steps}"
    need(memory <= c.max_steps, "score_beta", within)
