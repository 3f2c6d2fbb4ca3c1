"""What a run will need: python -m tools.bench CONFIG --plan --gpus 8 --gpu h100

From shapes alone, per phase: parameters, FLOPs, memory of a rank, hours and cost. The activations
are counted by running one and two layers on fake tensors, which have shapes and no memory.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from data.loader import TokenDataset
from data.prepare import prepare_shipped
from model import GPT, GPTConfig
from run.checkpoint import load_checkpoint
from run.config import (
    Config,
    ConfigError,
    Plan,
    check_ranks,
    load_config,
    make_plan,
    match_flops,
    padded_vocab,
    take_shape,
)
from run.llama import read_shape, weight_shapes
from run.machine import share_out
from run.report import compact

# Makers' figures: dense bfloat16 FLOP/s, bytes of memory.
GPUS = {
    "a100": (312e12, 80e9),
    "h100": (989e12, 80e9),
    "h200": (989e12, 141e9),
    "b200": (2250e12, 192e9),
    "4090": (165e12, 24e9),
}


def config_with_data(path: str, knobs: list[str]) -> Config:
    c = load_config(path, knobs)
    if c.data_dir == Config.data_dir and not Path(c.data_dir).exists():
        prepare_shipped(c.data_dir)
    return c


def planned(path: str, knobs: list[str], gpus: int) -> tuple[Config, int]:
    """The config as train.py would run it on so many GPUs, and its vocabulary; where its data is
    not here yet, that of GPT-2."""
    c = config_with_data(path, knobs)
    there = (Path(c.data_dir) / "meta.json").exists()
    own = TokenDataset(c.data_dir, "train", 1).vocab_size if there else 50257
    vocab_size = padded_vocab(c, own)
    if c.init_from:
        initial = Path(c.init_from)
        folder = initial.is_dir()
        shape = read_shape(initial) if folder else load_checkpoint(initial)["model_config"]
        vocab_size = shape.vocab_size
        c = take_shape(c, {"model_config": shape}, vocab_size)
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus}: must be at least 1")
    check_ranks(c, gpus)
    return match_flops(c, vocab_size), vocab_size


@dataclass
class Memory:
    """Bytes of a rank at its peak, in the backward pass or just before it."""

    weights: int
    gradients: int
    moments: int
    casts: int  # weights in the lower precision, kept from the forward to the backward pass
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def saved_bytes(shape: GPTConfig, n_layer: int, batch: int, recompute: bool, dtype) -> int:
    """Bytes that the forward pass keeps for the backward pass, parameters apart. As on a CPU, where
    attention is in float32: a GPU needs a little less.
    """
    shape = replace(shape, d_ff=shape.d_ff[:1] * n_layer, n_kv_head=shape.n_kv_head[:1] * n_layer)
    held = {}  # storages, kept alive so that none is counted for another that was freed
    with FakeTensorMode():
        model = GPT(shape)
        model.recompute = recompute
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                held[storage._cdata] = storage
            return x

        tokens = torch.zeros(batch, shape.context_length, dtype=torch.long)
        lower = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), lower:
            model(tokens, tokens)
        return sum(storage.nbytes() for storage in held.values())


def memory_of(
    shape: GPTConfig, micro_batch: int, recompute: bool, dtype: torch.dtype, ranks: int, shard: bool
) -> Memory:
    """saved = constant + per layer + per sequence + per layer and sequence: four small forward
    passes give the four. With `recompute` a block's own activations exist for one block at a time.
    """
    one = {(n, b): saved_bytes(shape, n, b, False, dtype) for n in (1, 2) for b in (1, 2)}
    per_both = one[2, 2] - one[2, 1] - one[1, 2] + one[1, 1]
    per_layer = one[2, 1] - one[1, 1] - per_both
    per_sequence = one[1, 2] - one[1, 1] - per_both
    constant = one[1, 1] - per_layer - per_sequence - per_both
    n_parameters, n_layer = shape.n_parameters(), shape.n_layer
    largest = n_parameters  # of the ranks' shares of the moments
    if shard:
        sizes = {name: math.prod(size) for name, size in weight_shapes(shape).items()}
        shares = [0] * ranks
        for name, rank in share_out(sizes, ranks).items():
            shares[rank] += sizes[name]
        largest = max(shares)
    activations = per_both * n_layer
    casts = constant + per_layer * n_layer
    if recompute:
        kept = 4 * shape.context_length * shape.d_model  # a block's input, float32
        activations, casts = kept * n_layer + per_both, constant + per_layer
    # The backward pass of the loss holds its gradient in float32 and in the lower precision.
    size = 4 if dtype == torch.float32 else 6
    logits = size * shape.context_length * shape.vocab_size
    return Memory(
        weights=4 * n_parameters,
        gradients=4 * n_parameters,
        moments=8 * largest,
        casts=casts,
        activations=micro_batch * (activations + per_sequence),
        logits=micro_batch * logits,
    )


def phases(plan: Plan) -> dict[str, tuple[GPTConfig, int, float]]:
    """Phase -> (its widest shape, steps, FLOPs per token on average)."""
    found, step = {}, 0
    for shape, steps in plan.shapes:
        name = plan.schedule.phase(step + 1)
        widest, n, flops = found.get(name, (shape, 0, 0.0))
        found[name] = (widest, n + steps, flops + steps * shape.flops_per_token())
        step += steps
    return {name: (shape, n, flops / n) for name, (shape, n, flops) in found.items()}


def describe_plan(
    c: Config, vocab_size: int, dtype: torch.dtype, gpus: int, gpu: str, mfu: float, price: float
) -> str:
    """The whole answer as text. price: of one GPU for an hour, in dollars."""
    peak, capacity = GPUS[gpu]
    room = 0.92 * capacity  # the rest: CUDA itself, NCCL, fragmentation
    share = c.batch_size // gpus
    micro_batch = c.micro_batch_size or share
    tokens_per_step = c.batch_size * c.context_length
    plan = make_plan(c, vocab_size)
    final = plan.shapes[-1][0]
    scratch = replace(c, d_ff=final.d_ff[0], d_ff_target=0, n_kv_head_target=0)
    scratch = replace(
        scratch, n_kv_head=final.n_kv_head[0], n_head=final.n_kv_head[0] * final.queries_per_kv,
        head_dim=final.head_dim, lr_restart=False,
    )  # fmt: skip
    lines = [
        f"{gpus} x {gpu}, {str(dtype).removeprefix('torch.')}, vocabulary {vocab_size:,}, "
        f"micro batches of {micro_batch} x "
        f"{c.context_length} tokens, recompute={c.recompute}, "
        f"shard_optimizer={c.shard_optimizer}; at {mfu:.0%} of {peak:.3g} FLOP/s and "
        f"${price:g} per GPU and hour",
        "",
        "| phase | parameters | tokens | FLOPs | hours | cost | GiB per rank | fits |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    total = 0.0
    stretches = {
        **phases(plan),
        "scratch, same tokens": phases(make_plan(scratch, vocab_size))["train"],
    }
    for name, (shape, steps, per_token) in stretches.items():
        flops = per_token * steps * tokens_per_step
        hours = flops / (gpus * peak * mfu) / 3600
        if name in ("enlarged", "prune", "recover", "train"):
            total += flops

        need = partial(memory_of, shape, dtype=dtype, ranks=gpus, shard=c.shard_optimizer)
        sizes = [need(n, c.recompute).total for n in (1, 2)]
        room_for = 1 + (room - sizes[0]) // (sizes[1] - sizes[0])  # sequences
        memory = sizes[0] + (micro_batch - 1) * (sizes[1] - sizes[0])
        fits = "yes"
        if memory > room:
            divisors = [n for n in range(1, share + 1) if share % n == 0 and n <= room_for]
            best = divisors[-1] if divisors else 0
            fits = f"no; --micro_batch_size={best}" if best else "no, not one sequence"
            if not best and not c.recompute and need(1, True).total <= room:
                fits = "no; --recompute"
        lines.append(
            f"| {name} | {compact(shape.n_parameters())} | {compact(steps * tokens_per_step)} "
            f"| {flops:.3g} | {hours:,.4g} | ${hours * gpus * price:,.0f} "
            f"| {memory / 2**30:.1f} | {fits} |"
        )
    hours = total / (gpus * peak * mfu) / 3600
    base = phases(make_plan(scratch, vocab_size))["train"]
    ratio = total / (base[1] * base[2] * tokens_per_step)
    lines += [
        f"| the run | | {compact(c.max_steps * tokens_per_step)} | {total:.3g} | {hours:,.4g} "
        f"| ${hours * gpus * price:,.0f} | | |",
        "",
        f"FLOPs: {ratio:.2f} times those of scratch on the same tokens; scratch with the same "
        f"FLOPs trains on {compact(ratio * c.max_steps * tokens_per_step)} tokens.",
    ]
    widest = plan.shapes[0][0]
    need = memory_of(widest, micro_batch, c.recompute, dtype, gpus, c.shard_optimizer)
    if c.recompute:
        lines.append("The MFU counts the model's FLOPs; recomputing runs a third more.")
    parts = ", ".join(f"{key} {value / 2**30:.1f}" for key, value in vars(need).items())
    lines.append(f"GiB of a rank at the widest shape: {parts}.")
    assert math.isclose(total, plan.flops, rel_tol=1e-9)
    return "\n".join(lines)
