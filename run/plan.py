"""The whole run before step 1: its schedule, its shapes, its FLOPs, the memory that it needs."""

import math
from bisect import bisect_right
from dataclasses import dataclass, replace

import torch

from model import UNITS, GPTConfig
from run import UserError
from run.config import Config, check_config, micro_batch, prune_targets
from schedule import Schedule


def padded_vocab(c: Config, vocab_size: int) -> int:
    return math.ceil(vocab_size / c.round_vocab_to) * c.round_vocab_to


def enlarged_shape(c: Config, vocab_size: int) -> GPTConfig:
    return GPTConfig(
        vocab_size=vocab_size,
        context_length=c.context_length,
        head_dim=c.head_dim or c.d_model // c.n_head,
        queries_per_kv=c.n_head // c.n_kv_head,
        tie_embeddings=c.tie_embeddings,
        **{kind: getattr(c, kind) for kind in UNITS},  # the widths that can be pruned
    )


def block_weights(shape: GPTConfig) -> int:
    """Weights of the matrices of all blocks."""
    attention = 2 * (shape.n_head + shape.n_kv_head) * shape.head_dim  # q, o; k, v
    return shape.n_layer * shape.d_model * (attention + 3 * shape.d_ff)  # gate, up, down


def n_parameters(shape: GPTConfig) -> int:
    embeddings = shape.vocab_size * shape.d_model * (1 if shape.tie_embeddings else 2)
    norms = (2 * shape.n_layer + 1) * shape.d_model
    return embeddings + norms + block_weights(shape)


def flops_per_token(shape: GPTConfig) -> int:
    """FLOPs of one training token: forward plus backward, and the backward counts twice.

    Each weight of a matrix costs 2 FLOPs forward (multiply, add). Attention adds two products of
    (T, head_dim) with (T, T) per query head, counted in full as `FlopCounterMode` does, although
    half of it is masked. Norms, rotary embeddings and softmax are left out, as is customary.
    """
    attention = 2 * 2 * shape.context_length * shape.head_dim * shape.n_head * shape.n_layer
    weights = block_weights(shape) + shape.vocab_size * shape.d_model
    return 3 * (2 * weights + attention)


def memory_of(
    c: Config, shape: GPTConfig, sequences: int, dtype: torch.dtype, device: str
) -> dict[str, int]:
    """Bytes of a process's tensors at the peak of a step of several micro batches, within 25%. With
    one micro batch it is less, by the size of the gradients at most. dtype: of the matrix products.
    device: on a "cpu", attention in bfloat16 is written out (model.py).
    """
    e, lower, n = dtype.itemsize, dtype != torch.float32, n_parameters(shape)
    tokens = sequences * shape.context_length
    # What the backward pass needs of a block. Two norms: input and normalized input in float32,
    # and the output, of which autocast makes a copy for each of the five matrices that read it
    norms = (2 * 2 * 4 + (5 if lower else 2) * e) * shape.d_model
    row = e * shape.n_head * shape.context_length if lower and device == "cpu" else 0
    # q, k, v, the output's copy for o; and the output, or, for each row of scores, their softmax
    attention = (4 if row else 5) * e * shape.n_head * shape.head_dim + row
    ffn = 4 * e * shape.d_ff  # gate, up, silu(gate), and the product that down reads
    block = tokens * (norms + attention + ffn)
    logits = 12 * tokens * shape.vocab_size  # log-softmax and two gradients, all in float32
    # Of the FFN's inner activations; or of the scores, when the FFN has nothing to keep any more
    gradients = tokens * max(2 * e * shape.d_ff, 2 * row - ffn - norms // 2)
    if c.recompute:  # the input of each block is kept; of one block at a time, the rest is there
        kept, passing = 4 * tokens * shape.d_model * shape.n_layer, max(logits, block + gradients)
    else:
        kept, passing = block * shape.n_layer, max(logits, gradients)
    return {
        "weights": 4 * n,
        "gradients": 4 * n,
        "moments": 8 * n - (4 * block_weights(shape) if c.optimizer == "muon" else 0),
        "casts": 2 * n if lower else 0,  # the weights' own
        "activations": kept,
        "passing": passing,
    }


def check_memory(c: Config, vocab_size: int, device: str, available: int, ranks: int) -> None:
    """Refuse what cannot fit into `available` bytes, even if a compiled model keeps only half of
    the activations that `memory_of` counts. Raises UserError with the key to blame: the one whose
    default would bring the need down the most.
    """

    def need(c: Config) -> float:
        dtype = torch.bfloat16 if c.dtype == "bfloat16" else torch.float32
        memory = memory_of(c, enlarged_shape(c, vocab_size), micro_batch(c, ranks), dtype, device)
        passing = 0.5 * (memory.pop("activations") + memory.pop("passing"))
        batch = 16 * c.batch_size * c.context_length // ranks  # its tokens, int64
        return sum(memory.values()) + passing + batch

    if need(c) > available:
        keys = ("d_model", "n_layer", "d_ff", "head_dim", "batch_size", "context_length")
        keys += ("micro_batch_size",)
        key = min(keys, key=lambda key: need(replace(c, **{key: getattr(Config, key)})))
        raise UserError(
            f"{key}={getattr(c, key)}: the run needs at least {need(c) / 2**30:,.0f} GiB of "
            f"memory; there are {available / 2**30:,.0f} GiB"
        )


SHAPE = ("n_head", "head_dim", "tie_embeddings", *UNITS)  # the knobs of a model's shape


def take_shape(c: Config, shape: GPTConfig, vocab_size: int) -> Config:
    """The config with the model knobs of the model in `init_from`. vocab_size: that of the data,
    padded. Raises UserError."""
    if shape.vocab_size != vocab_size:
        raise UserError(
            f"init_from={c.init_from!r}: its vocabulary has {shape.vocab_size} entries, that of "
            f"data_dir={c.data_dir!r} has {vocab_size}; --round_vocab_to pads it"
        )
    c = replace(c, **{key: getattr(shape, key) for key in SHAPE})
    check_config(c)
    return c


def make_schedule(c: Config) -> Schedule:
    """The config's schedule, in steps. Raises UserError where max_steps has no room for it."""
    targets, window, shortest = prune_targets(c), None, c.max_steps
    if targets:
        oneshot = c.prune_schedule == "oneshot"
        first = round(c.prune_start * c.max_steps) + 1
        last = first if oneshot else round(c.prune_end * c.max_steps) + 1
        if not 1 < first <= last <= c.max_steps or (first == last and not oneshot):
            window = f"the window from prune_start={c.prune_start}"
            window += "" if oneshot else f" to prune_end={c.prune_end}"
            raise UserError(f"max_steps={c.max_steps}: too few for {window}")
        window = (first, last)
    if c.lr_restart:
        shortest = min(window[0] - 1, c.max_steps - window[0] + 1)
    if c.warmup_steps >= shortest:
        stage = f"must be less than the {shortest} steps it opens, of max_steps={c.max_steps}"
        raise UserError(f"warmup_steps={c.warmup_steps}: {stage}")
    return Schedule(
        max_steps=c.max_steps,
        peak=c.learning_rate,
        min_lr_fraction=c.min_lr_fraction,
        warmup_steps=c.warmup_steps,
        lr_restart=c.lr_restart,
        prune_schedule=c.prune_schedule,
        window=window,
        prune_every=c.prune_every,
        score_steps=math.ceil(5 / (1 - c.score_beta)),  # earlier steps weigh 1% in all
        widths=targets,
    )


@dataclass
class Plan:
    """What a run will do."""

    schedule: Schedule
    tokens_per_step: int
    enlarged: GPTConfig
    starts: list[int]  # the steps from which each shape holds, 1 the first

    def shape(self, step: int) -> GPTConfig:
        """The shape of the model during `step`."""
        widths = {kind: self.schedule.width(step, kind) for kind in self.schedule.widths}
        return replace(self.enlarged, **widths)

    @property
    def final(self) -> GPTConfig:
        return self.shape(self.schedule.max_steps)

    def flops(self, steps: int | None = None) -> int:
        """Training FLOPs of the first `steps` steps, or of the whole run."""
        steps = self.schedule.max_steps if steps is None else steps
        ends = [*(start - 1 for start in self.starts[1:]), self.schedule.max_steps]
        total = 0
        for start, end in zip(self.starts, ends):
            total += max(0, min(end, steps) - start + 1) * flops_per_token(self.shape(start))
        return total * self.tokens_per_step


def make_plan(c: Config, vocab_size: int) -> Plan:
    """Raises UserError."""
    schedule = make_schedule(c)

    def removed(step: int) -> int:  # never falls, so each shape is one stretch of steps
        return -sum(schedule.width(step, kind) for kind in schedule.widths)

    starts, steps, new = [], range(c.max_steps + 1), 1
    while new <= c.max_steps:
        starts.append(new)
        new = bisect_right(steps, removed(new), lo=new, key=removed)
    return Plan(schedule, c.batch_size * c.context_length, enlarged_shape(c, vocab_size), starts)
