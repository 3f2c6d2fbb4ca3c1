"""What a run will need: python -m tools.plan CONFIG --gpus=8 --gpu=h100 [--KEY=VALUE]

The table has a row for each phase, one for the whole run, and one for the final shape
trained from scratch. All numbers follow from shapes; nothing is measured. Hours and
memory are those of compiled steps in bfloat16: a step computes its products at a share
of the GPU's peak, and then moves its bytes. What GPUs send each other is left out.
If the data is not there yet, the plan assumes GPT-2's vocabulary.
"""

import math
from argparse import ArgumentParser
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from configs import (
    CHOICES,
    Config,
    compact,
    enlarged_shape,
    load_config,
    make_schedule,
    split_batch,
    take_shape,
)
from data.command import UserError, command
from data.loader import TokenDataset
from model import KINDS, PEAK_FLOPS, GPTConfig, load_checkpoint
from tools import positive

GPT2_VOCABULARY = 50_257
PRICE = 2.0  # dollars per GPU and hour
PEAK_SHARE = 0.75  # of a GPU's FLOP/s, which large products reach
BANDWIDTH_SHARE = 0.8  # of its bytes/s, which large copies reach
RESERVE = 6e9  # bytes for CUDA's context, NCCL's buffers and gaps between tensors


class Gpu(NamedTuple):
    """What the makers state, and the memory that CUDA finds."""

    flops: float  # FLOP/s in bfloat16
    bandwidth: float  # bytes/s
    memory: float  # bytes


GPUS = {
    "4090": Gpu(PEAK_FLOPS["rtx 4090"], 1.01e12, 25e9),
    "a100": Gpu(PEAK_FLOPS["a100"], 2.04e12, 85e9),
    "h100": Gpu(PEAK_FLOPS["h100"], 3.35e12, 85e9),
    "h100 pcie": Gpu(PEAK_FLOPS["h100 pcie"], 2.04e12, 85e9),
    "h200": Gpu(PEAK_FLOPS["h200"], 4.8e12, 150e9),
}


class Plan:
    """What a run will do.

    - `enlarged`, `final`: the shapes of the model in the first and in the last step
    - `teacher`: the teacher's shape, or None
    - `teacher_flops`: FLOPs of the teacher for one token, a forward pass

    vocab_size: that of the data. Raises UserError if the knobs make no schedule.
    """

    def __init__(
        self, config: Config, vocab_size: int, teacher: GPTConfig | None = None
    ):
        self.config = config
        self.schedule = make_schedule(config)
        self.enlarged = enlarged_shape(config, vocab_size)
        self.final = self.shape(config.max_steps)
        self.tokens_per_step = config.batch_size * config.context_length
        self.teacher = None
        self.teacher_flops = 0
        if teacher:
            self.teacher = replace(teacher, context_length=config.context_length)
            self.teacher_flops = self.teacher.flops_per_token() // 3

    def shape(self, step: int) -> GPTConfig:
        """The shape of the model during a step."""
        schedule = self.schedule
        widths = {kind: schedule.width(step, kind) for kind in schedule.widths}
        return replace(self.enlarged, **widths)

    def stretches(self, first: int, last: int) -> list[tuple[int, GPTConfig]]:
        """The steps from first to last as (number of steps, shape), in order."""
        starts = [first]
        for step in self.schedule.prune_steps():
            if first < step <= last:
                starts.append(step)
        stretches = []
        for start, end in pairwise([*starts, last + 1]):
            stretches.append((end - start, self.shape(start)))
        return stretches

    def flops(self, steps: int = 0) -> int:
        """FLOPs of the first steps, or of the whole run, with the teacher's."""
        total = 0
        for n_steps, shape in self.stretches(1, steps or self.config.max_steps):
            flops_per_token = shape.flops_per_token() + self.teacher_flops
            total += n_steps * self.tokens_per_step * flops_per_token
        return total


def load_plan(config: Config, missing: int = 0) -> tuple[Config, Plan]:
    """The config as train.py would run it, and its plan.

    missing: the vocabulary to assume if the data is not there yet. If it is 0, missing
    data raises UserError, as weights do that cannot be read.
    """
    teacher = None
    if config.teacher:
        teacher = load_checkpoint(config.teacher)["model_config"]
    if config.init_from:
        shape = load_checkpoint(config.init_from)["model_config"]
        take_shape(config, shape)
        return config, Plan(config, shape.vocab_size, teacher)
    try:
        data = TokenDataset(config.data_dir, "train", config.context_length)
        vocab_size = data.vocab_size
    except UserError:
        is_there = Path(config.data_dir, "meta.json").exists()
        if is_there or not missing:
            raise
        vocab_size = missing
    return config, Plan(config, vocab_size, teacher)


def constant_shape(shape: GPTConfig) -> dict:
    """The knobs of a run that has this shape from start to end."""
    knobs = {"n_head": shape.n_head, "head_dim": shape.head_dim, "lr_restart": False}
    for kind in KINDS:
        knobs[kind] = getattr(shape, kind)
        knobs[f"{kind}_target"] = 0
    return knobs


def block_matrices(shape: GPTConfig) -> list[tuple[int, int]]:
    """The sides of each matrix in a block, the shorter side first."""
    q_width = shape.n_head * shape.head_dim
    kv_width = shape.n_kv_head * shape.head_dim
    widths = [q_width, q_width, kv_width, kv_width]  # q, o; k, v
    widths += [shape.d_ff] * 3  # gate, up, down
    sides = []
    for width in widths:
        shorter = min(shape.d_model, width)
        longer = max(shape.d_model, width)
        sides.append((shorter, longer))
    return sides


def block_flops(shape: GPTConfig) -> int:
    """FLOPs for one token in the forward pass of all blocks."""
    unembedding = 2 * shape.vocab_size * shape.d_model
    return shape.flops_per_token() // 3 - unembedding


def muon_flops(shape: GPTConfig) -> int:
    """FLOPs of Muon's products in a step.

    Each of five iterations multiplies an (n, m) matrix x by its transpose, the (n, n)
    result by itself, and that by x.
    """
    flops = 0
    for n, m in block_matrices(shape):
        flops += 5 * 2 * n * n * (m + n + m)
    return shape.n_layer * flops


def memory_of(
    config: Config, shape: GPTConfig, rows: int, teacher: GPTConfig | None = None
) -> int:
    """Bytes of a rank's tensors at the peak of a step, within 25%.

    rows: sequences in a micro-batch. The step has several micro-batches. With one, it
    takes less, by the size of the gradients at most. dtype="auto" counts as bfloat16,
    compile="auto" as eager. Two things are left out: Muon's products, which matter if
    batches are tiny, and attention in bfloat16 on a CPU, which model.py writes out.
    """
    compiled = config.compile == "on"
    number = 2  # bytes of a number in a product
    cast = 2  # bytes of a weight's copy in bfloat16
    if config.dtype == "float32":
        number = 4
        cast = 0
    tokens = rows * shape.context_length
    d_model = shape.d_model
    d_ff = shape.d_ff
    q_width = shape.n_head * shape.head_dim
    kv_width = shape.n_kv_head * shape.head_dim

    # What the backward pass needs, for each token and block
    full = 2 * 4 * d_model  # inputs of the norms, in float32
    full += 2 * number * d_model  # outputs of the norms
    full += 4 * number * q_width  # q, k and v repeated, and the output
    full += 3 * number * d_ff  # gate, up and their product
    if not compiled:
        full += 2 * 4 * d_model  # x / rms
        full += number * q_width  # the input of o
        full += number * d_ff  # silu(gate)
        full += 3 * cast * d_model  # outputs of the norms again, for k, v and up
    # What recompute=cheap keeps: results of products and of attention
    products = 2 * q_width + 2 * kv_width + d_model + 2 * d_ff
    if not compiled:
        products += d_model  # of down
    kept = 4 * d_model  # the input of a block
    if config.recompute == "none":
        kept = full
    elif config.recompute == "cheap":
        kept += number * products

    # What comes and goes. The peak is in a block or in the head
    n_params = shape.n_params()
    block_weights = shape.block_weights()
    in_block = tokens * (full - kept)  # what is computed again
    in_block += tokens * 2 * number * d_ff  # two gradients in the FFN
    if compiled:
        # Gradients of weights in both types; one gradient of the logits
        in_block += (4 + cast) * block_weights // shape.n_layer
        in_head = tokens * number * shape.vocab_size
        in_head += (4 + cast) * shape.vocab_size * d_model
    else:
        # Log-softmax and two gradients, in float32
        in_head = tokens * 3 * 4 * shape.vocab_size

    total = 4 * n_params  # weights
    total += 4 * n_params  # gradients
    total += 8 * n_params  # two moments of AdamW
    if config.optimizer == "muon":
        total -= 4 * block_weights  # Muon has one moment
    if not compiled:
        total += cast * n_params
    elif config.recompute == "none":
        total += cast * block_weights
    if teacher:
        total += 4 * teacher.n_params() + 4 * tokens * shape.vocab_size
    activations = tokens * kept * shape.n_layer
    return total + activations + max(in_block, in_head)


def step_seconds(plan: Plan, shape: GPTConfig, n_gpus: int, gpu: Gpu) -> float:
    """Seconds of a compiled step in bfloat16, for its FLOPs and then for its bytes."""
    config = plan.config
    tokens = plan.tokens_per_step // n_gpus
    _, n_micro_batches = split_batch(config, n_gpus)
    recomputes = config.recompute != "none"
    passes = 3  # forward, and twice that backward
    if config.recompute == "all":
        passes = 4

    flops_per_token = shape.flops_per_token() + plan.teacher_flops
    flops_per_token += (passes - 3) * block_flops(shape)
    flops = tokens * flops_per_token
    if config.optimizer == "muon":  # each rank computes all of it
        flops += muon_flops(shape)

    # Bytes that are moved for a token
    sides = sum(n + m for n, m in block_matrices(shape))
    of_token = 2 * passes * shape.n_layer * sides  # operands of products in blocks
    of_token += 2 * 3 * (shape.d_model + shape.vocab_size)  # and in the head
    of_token += 8 * shape.vocab_size  # cross-entropy
    # SwiGLU reads two numbers and writes one. Norms, rotation and residual: 33 bytes
    elementwise = 6 * shape.d_ff + 33 * shape.d_model
    of_token += (3 + recomputes) * shape.n_layer * elementwise
    # For a weight, in each micro-batch: its cast, its reads by products, and its
    # gradient, which is cast and added. In each step: gradient norm, clip and AdamW
    of_weight = n_micro_batches * (6 * (1 + recomputes) + 2 * passes + 18) + 44
    moved = tokens * of_token + of_weight * shape.n_params()

    compute_seconds = flops / (PEAK_SHARE * gpu.flops)
    return compute_seconds + moved / (BANDWIDTH_SHARE * gpu.bandwidth)


def divisors(n: int) -> list[int]:
    """All divisors, the largest first."""
    found = set()
    for d in range(1, math.isqrt(n) + 1):
        if n % d == 0:
            found |= {d, n // d}
    return sorted(found, reverse=True)


def knobs_that_fit(plan: Plan, shape: GPTConfig, n_gpus: int, room: float) -> str:
    """The least `recompute` whose step fits into `room` bytes, and the largest
    micro-batch."""
    modes = CHOICES["recompute"]
    least = modes.index(plan.config.recompute)
    for recompute in modes[least:]:
        config = replace(plan.config, recompute=recompute)
        for rows in divisors(config.batch_size // n_gpus):
            if memory_of(config, shape, rows, plan.teacher) <= room:
                return f"--micro_batch_size={rows} --recompute={recompute}"
    return "not one sequence fits"


HEADS = (
    *("phase", "parameters", "tokens", "learning rate", "training FLOPs"),
    *("teacher FLOPs", "hours", "MFU", "cost", "GiB per rank", "fits"),
)


def row(
    name: str, plan: Plan, first: int, last: int, n_gpus: int, gpu: Gpu
) -> list[str]:
    """The cells of the table for the steps from first to last."""
    training_flops = 0
    seconds = 0.0
    for n_steps, shape in plan.stretches(first, last):
        flops = plan.tokens_per_step * shape.flops_per_token()
        training_flops += n_steps * flops
        seconds += n_steps * step_seconds(plan, shape, n_gpus, gpu)
    tokens = (last + 1 - first) * plan.tokens_per_step
    teacher_flops = tokens * plan.teacher_flops
    mfu = (training_flops + teacher_flops) / (n_gpus * gpu.flops * seconds)
    hours = seconds / 3600

    shape = plan.shape(first)  # the largest of these steps
    rows, _ = split_batch(plan.config, n_gpus)
    memory = memory_of(plan.config, shape, rows, plan.teacher)
    room = gpu.memory - RESERVE
    fits = "yes"
    if memory > room:
        fits = f"no; {knobs_that_fit(plan, shape, n_gpus, room)}"
    return [
        name,
        compact(shape.n_params()),
        compact(tokens),
        f"{plan.schedule.rate_share(first, last):.0%}",
        f"{training_flops:.3g}",
        f"{teacher_flops:.3g}",
        f"{hours:,.4g}",
        f"{mfu:.0%}",
        f"${hours * n_gpus * PRICE:,.0f}",
        f"{memory / 2**30:.1f}",
        fits,
    ]


def describe(plan: Plan, n_gpus: int, gpu_name: str) -> str:
    """The plan as a table in Markdown. Raises UserError if the GPUs do not divide the
    batch."""
    gpu = GPUS[gpu_name]
    last = plan.config.max_steps
    vocab_size = plan.enlarged.vocab_size
    knobs = constant_shape(plan.final)
    # Scratch learns from no teacher
    scratch = Plan(replace(plan.config, **knobs), vocab_size)

    rows = [HEADS, ["---"] * len(HEADS)]
    window = plan.schedule.window or ()
    starts = sorted({1, *window})
    for first, end in pairwise([*starts, last + 1]):
        phase = plan.schedule.phase(first)
        rows.append(row(phase, plan, first, end - 1, n_gpus, gpu))
    rows.append(row("the run", plan, 1, last, n_gpus, gpu))
    rows.append(row("scratch, same tokens", scratch, 1, last, n_gpus, gpu))

    ratio = plan.flops() / scratch.flops()
    lines = [
        f"{n_gpus} x {gpu_name} at ${PRICE:g} per GPU and hour. "
        "Time is computed for compiled steps in bfloat16, "
        f"at {PEAK_SHARE:.0%} of {gpu.flops:.3g} FLOP/s "
        f"and {BANDWIDTH_SHARE:.0%} of {gpu.bandwidth:.3g} bytes/s; "
        f"vocabulary of {vocab_size:,}",
        "",
    ]
    for cells in rows:
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines.append(
        f"Training FLOPs, with the teacher's: {ratio:.2f} times "
        "those of scratch on the same tokens. "
        f"With max_steps={round(last * ratio)}, scratch has as many."
    )
    return "\n".join(lines)


@command
def main(argv: list[str]) -> None:
    # Without abbreviations, because --key=value is a knob
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--gpus", type=positive, default=8)
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    args, knobs = parser.parse_known_args(argv)
    config, _ = load_config(args.config, knobs)
    if config.compile == "auto":
        config.compile = "on"
    _, plan = load_plan(config, missing=GPT2_VOCABULARY)
    print(describe(plan, args.gpus, args.gpu))


if __name__ == "__main__":
    raise SystemExit(main())
