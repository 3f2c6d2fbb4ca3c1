"""What a run costs, known before step 1: parameters, FLOPs, memory; and what cards can do."""

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch

from model import GPTConfig
from run.config import Config, enlarged_shape
from schedule import Schedule

# The makers' figures, dense bfloat16 FLOP/s and bytes/s of memory; and bytes that CUDA finds there
GPUS = {"a100": (312e12, 2.04e12, 85e9), "h200": (989e12, 4.8e12, 150e9)}
GPUS |= {"h100 pcie": (756e12, 2.04e12, 85e9), "h100": (989e12, 3.35e12, 85e9)}
GPUS |= {"4090": (165e12, 1.01e12, 25e9)}


def card_of(device: torch.device) -> str:
    """The key in GPUS of this device; "" if it is not there. A laptop's 4090 is another chip."""
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else ""
    known = (key for key in GPUS if re.search(rf"\b{key}\b", name))  # no RTX A1000
    return "" if "laptop" in name else next(known, "")


def block_matrices(shape: GPTConfig) -> list[tuple[int, int]]:
    """The sides of each matrix of a block, the shorter one first."""
    q, kv = shape.n_head * shape.head_dim, shape.n_kv_head * shape.head_dim
    others = (q, q, kv, kv, *3 * [shape.d_ff])  # q, o; k, v; gate, up, down
    return [(min(shape.d_model, side), max(shape.d_model, side)) for side in others]


def block_weights(shape: GPTConfig) -> int:
    """Weights of the matrices of all blocks."""
    return shape.n_layer * sum(n * m for n, m in block_matrices(shape))


def n_parameters(shape: GPTConfig) -> int:
    embeddings = shape.vocab_size * shape.d_model * (1 if shape.tie_embeddings else 2)
    norms = (2 * shape.n_layer + 1) * shape.d_model
    return embeddings + norms + block_weights(shape)


def block_flops(shape: GPTConfig) -> int:
    """FLOPs of one token in the forward pass of all blocks. Each weight of a matrix costs 2 FLOPs
    (multiply, add). Attention adds two products of T x T x head_dim per query head,
    counted in full as `FlopCounterMode` does, although half of it is masked. Norms, rotary
    embeddings and softmax are left out, as is customary."""
    attention = 2 * 2 * shape.context_length * shape.head_dim * shape.n_head * shape.n_layer
    return 2 * block_weights(shape) + attention


def flops_per_token(shape: GPTConfig) -> int:
    """Training FLOPs of one token: forward plus backward, and the backward counts twice. What is
    computed again (`recompute`) does not count, nor does the optimizer."""
    return 3 * (block_flops(shape) + 2 * shape.vocab_size * shape.d_model)


def muon_flops(shape: GPTConfig) -> int:
    """FLOPs of Muon's products in a step. Each of five iterations multiplies an (n, m) matrix x by
    its transpose, the (n, n) result by itself, and that by x."""
    return shape.n_layer * sum(5 * 2 * n * n * (m + n + m) for n, m in block_matrices(shape))


def memory_of(c: Config, shape: GPTConfig, rows: int, teacher: GPTConfig | None = None) -> dict:
    """Bytes of a process's tensors, by what they hold, at the peak of a step of several micro
    batches of `rows` sequences, within 25%. With one it is less, by the gradients' size at most. An
    "auto" counts as bfloat16, or as not compiled. Left out are Muon's products, which matter where
    batches are tiny, and attention in bfloat16 on a CPU, which model.py writes out."""
    compiled, n, blocks = c.compile == "on", n_parameters(shape), block_weights(shape)
    e, cast = (4, 0) if c.dtype == "float32" else (2, 2)  # of a number in a product; of its cast
    tokens, d_model, d_ff = rows * shape.context_length, shape.d_model, shape.d_ff
    q, kv = shape.n_head * shape.head_dim, shape.n_kv_head * shape.head_dim

    # What the backward pass needs of a block and token
    norms = 2 * 4 * d_model + 2 * e * d_model  # inputs, in float32; outputs
    attention = 4 * e * q  # q, k and v repeated, output
    ffn = 3 * e * d_ff  # gate, up, product
    eager = 2 * 4 * d_model + e * q + e * d_ff  # x / rms; o's input; silu(gate)
    eager += 3 * cast * d_model  # norms' outputs again, for k, v, up
    full = norms + attention + ffn + (0 if compiled else eager)
    # "cheap" keeps products instead: q and what attention gives; k, v; o, down if eager; gate, up
    products = e * (2 * q + 2 * kv + (1 if compiled else 2) * d_model + 2 * d_ff)
    kept = {"none": full, "cheap": 4 * d_model + products, "all": 4 * d_model}[c.recompute]

    # What comes and goes in a block, or in the head
    block = tokens * (full - kept)  # what is computed again
    block += tokens * 2 * e * d_ff  # two gradients in its FFN
    head = tokens * 12 * shape.vocab_size  # log-softmax and two gradients in float32
    casts = cast * n  # of the weights
    if compiled:
        block += (4 + cast) * blocks // shape.n_layer  # gradients of weights, in both types
        head = tokens * e * shape.vocab_size  # one gradient of a logit
        head += (4 + cast) * shape.vocab_size * d_model
        casts = cast * blocks if c.recompute == "none" else 0
    return {
        "weights": 4 * n,
        "gradients": 4 * n,
        "moments": 8 * n - (4 * blocks if c.optimizer == "muon" else 0),  # it has one
        "casts": casts,
        "teacher": 4 * (n_parameters(teacher) + tokens * shape.vocab_size) if teacher else 0,
        "activations": tokens * kept * shape.n_layer + max(block, head),
    }


class Plan:
    """What a run will do. vocab_size: that of the data. teacher: its shape, for any context.
    `teacher_flops`: of one token in its forward pass. `final`: the shape at the end."""

    def __init__(self, c: Config, vocab_size: int, teacher: GPTConfig | None = None):
        self.schedule, self.enlarged = Schedule(c), enlarged_shape(c, vocab_size)
        self.tokens_per_step = c.batch_size * c.context_length
        self.teacher = teacher and replace(teacher, context_length=c.context_length)
        self.teacher_flops = flops_per_token(self.teacher) // 3 if self.teacher else 0
        self.starts = [1, *self.schedule.prune_steps()]  # the steps from which each shape holds
        self.final = self.shape(self.schedule.max_steps)

    def shape(self, step: int) -> GPTConfig:
        """The shape of the model during `step`."""
        widths = {kind: self.schedule.width(step, kind) for kind in self.schedule.widths}
        return replace(self.enlarged, **widths)

    def total(self, of_step: Callable[[GPTConfig], int], steps: int | None = None) -> int:
        """of_step(shape) summed over the first `steps` steps, or the whole run."""
        last = self.schedule.max_steps if steps is None else steps
        edges = [*(start for start in self.starts if start <= last), last + 1]
        return sum((end - start) * of_step(self.shape(start)) for start, end in pairwise(edges))

    def token_flops(self, shape: GPTConfig) -> int:
        """FLOPs of one token: of training, and of the teacher."""
        return flops_per_token(shape) + self.teacher_flops

    def flops(self, steps: int | None = None) -> int:
        """FLOPs of the first `steps` steps, or of the whole run."""
        return self.total(self.token_flops, steps) * self.tokens_per_step
