"""What a run costs, known before step 1: parameters, FLOPs, memory."""

from dataclasses import dataclass, replace

import torch

from model import GPTConfig
from run import UserError
from run.config import Config, enlarged_shape, micro_batch
from schedule import Schedule, make_schedule


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


def memory_of(c: Config, shape: GPTConfig, sequences: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of a process's tensors at the peak of a step of several micro batches, within 25%. With
    one micro batch it is less, by the size of the gradients at most. dtype: of the matrix products.
    On a CPU, bfloat16 takes more: attention is written out there (model.py).
    """
    e, lower, n = dtype.itemsize, dtype != torch.float32, n_parameters(shape)
    tokens = sequences * shape.context_length
    # What the backward pass needs of a block. Two norms: input and normalized input in float32,
    # and the output, of which autocast makes a copy for each of the five matrices that read it
    norms = (2 * 2 * 4 + (5 if lower else 2) * e) * shape.d_model
    attention = 5 * e * shape.n_head * shape.head_dim  # q, k, v, the output, its copy for o
    ffn = 4 * e * shape.d_ff  # gate, up, silu(gate), and the product that down reads
    block = tokens * (norms + attention + ffn)
    logits = 12 * tokens * shape.vocab_size  # log-softmax and two gradients, all in float32
    gradients = tokens * 2 * e * shape.d_ff  # of the FFN's inner activations
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
    the activations that `memory_of` counts. Raises UserError."""
    dtype, rows = getattr(torch, c.dtype), micro_batch(c, ranks)
    memory = memory_of(c, enlarged_shape(c, vocab_size), rows, dtype)
    need = sum(memory.values()) - (memory["activations"] + memory["passing"]) / 2
    if need > available:
        what = f"{need / 2**30:,.0f} GiB of memory; {device} has {available / 2**30:,.0f} GiB"
        way = f"a smaller model, or less than --micro_batch_size={rows}"
        raise UserError(f"the run needs {what}; try {way}")


@dataclass(frozen=True)
class Plan:
    """What a run will do."""

    schedule: Schedule
    tokens_per_step: int
    enlarged: GPTConfig

    def shape(self, step: int) -> GPTConfig:
        """The shape of the model during `step`."""
        widths = {kind: self.schedule.width(step, kind) for kind in self.schedule.widths}
        return replace(self.enlarged, **widths)

    @property
    def final(self) -> GPTConfig:
        return self.shape(self.schedule.max_steps)

    def flops(self, steps: int | None = None) -> int:
        """Training FLOPs of the first `steps` steps, or of the whole run."""
        last = self.schedule.max_steps if steps is None else steps
        starts = [1, *(step for step in self.schedule.prune_steps() if step <= last)]  # of a shape
        total = 0
        for start, after in zip(starts, [*starts[1:], last + 1]):
            total += (after - start) * flops_per_token(self.shape(start))
        return total * self.tokens_per_step


def make_plan(c: Config, vocab_size: int) -> Plan:
    """vocab_size: that of the data."""
    tokens_per_step = c.batch_size * c.context_length
    return Plan(make_schedule(c), tokens_per_step, enlarged_shape(c, vocab_size))
