"""What a run will need: python -m tools.plan CONFIG --gpus 8 --gpu h100 [--key=value ...]

In each phase, from shapes alone; and the final shape from scratch. Hours and memory are computed
for compiled steps: their products, at a share of the card's peak, and the bytes that they move, but
not what GPUs send each other. Where the data is not there yet, GPT-2's vocabulary is assumed."""

import math
from argparse import ArgumentParser
from dataclasses import replace

from data.command import command
from model import GPTConfig
from run import cost
from run.config import CHOICES, Config, check_ranks, load_config, micro_batch
from run.log import compact
from tools import load_plan, positive

GPT2_VOCABULARY = 50_257
PRICE = 2.0  # dollars per GPU and hour
PRODUCTS, MOVES = 0.75, 0.8  # the shares of a card's FLOP/s and bytes/s that large ones reach
RESERVE = 6e9  # bytes of a card for CUDA's context, NCCL's buffers and the gaps between tensors


def step_seconds(c: Config, plan: cost.Plan, shape: GPTConfig, gpus: int, gpu: str) -> float:
    """Of a compiled step in bfloat16: products take their FLOPs, and all takes its bytes."""
    peak, bandwidth, _ = cost.GPUS[gpu]
    tokens, micro_batches = plan.tokens_per_step / gpus, c.batch_size / gpus / micro_batch(c, gpus)
    again = c.recompute != "none"
    passes = 3 + (c.recompute == "all")  # one forward, two backward
    flops = cost.flops_per_token(shape) + plan.teacher_flops
    flops = tokens * (flops + (passes - 3) * cost.block_flops(shape))
    if c.optimizer == "muon":  # each rank computes all of it
        flops += cost.muon_flops(shape)
    # Bytes of a token: operands of products; cross-entropy; SwiGLU, which reads two numbers and
    # writes one; norms, rotation and residual, 33 a channel
    sides = shape.n_layer * sum(n + m for n, m in cost.block_matrices(shape))
    moved = 2 * passes * sides + 2 * 3 * (shape.d_model + shape.vocab_size) + 8 * shape.vocab_size
    moved += (3 + again) * shape.n_layer * (6 * shape.d_ff + 33 * shape.d_model)
    # Of a weight, in a micro batch: cast, read by products, its gradient cast and added; in a step:
    # gradient norm, clip and AdamW
    of_weight = micro_batches * (6 * (1 + again) + 2 * passes + 18) + 44
    moved = tokens * moved + of_weight * cost.n_parameters(shape)
    return flops / (PRODUCTS * peak) + moved / (MOVES * bandwidth)


def knobs_that_fit(c: Config, plan: cost.Plan, shape: GPTConfig, room: float, gpus: int) -> str:
    """The least `recompute` whose step fits into `room` bytes, and the largest micro batch."""
    share, ways = c.batch_size // gpus, CHOICES["recompute"]
    for recompute in ways[ways.index(c.recompute) :]:
        less = replace(c, recompute=recompute)
        small = [n for n in range(1, math.isqrt(share) + 1) if share % n == 0]
        for n in sorted({*small, *(share // n for n in small)}, reverse=True):
            if sum(cost.memory_of(less, shape, n, plan.teacher).values()) <= room:
                return f"--micro_batch_size={n} --recompute={recompute}"
    return "not one sequence fits"


def describe(c: Config, plan: cost.Plan, gpus: int, gpu: str) -> str:
    """A table in Markdown. Raises UserError where the batch does not divide."""
    check_ranks(c, gpus)
    c = replace(c, compile="on") if c.compile == "auto" else c
    peak, bandwidth, capacity = cost.GPUS[gpu]
    room, tokens, last = capacity - RESERVE, plan.tokens_per_step, c.max_steps
    work = {  # of a step, on all GPUs together
        "training FLOPs": lambda shape: tokens * cost.flops_per_token(shape),
        "teacher FLOPs": lambda shape: tokens * plan.teacher_flops,
        "hours": lambda shape: step_seconds(c, plan, shape, gpus, gpu) / 3600,
    }

    def row(name: str, first: int, end: int, sums: list[float], shape: GPTConfig) -> str:
        *flops, hours = sums
        need = sum(cost.memory_of(c, shape, micro_batch(c, gpus), plan.teacher).values())
        rate = plan.schedule.rate_share(first, end - 1)
        cells = [name, compact(cost.n_parameters(shape)), compact((end - first) * tokens)]
        cells += [f"{rate:.0%}", *(f"{x:.3g}" for x in flops), f"{hours:,.4g}"]
        cells += [f"{sum(flops) / (gpus * peak * hours * 3600):.0%}"]
        cells += [f"${hours * gpus * PRICE:,.0f}", f"{need / 2**30:.1f}"]
        cells += ["yes" if need <= room else f"no; {knobs_that_fit(c, plan, shape, room, gpus)}"]
        return f"| {' | '.join(cells)} |\n"

    heads = ["phase", "parameters", "tokens", "learning rate", *work]
    heads += ["MFU", "cost", "GiB per rank", "fits"]
    table = f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}\n"
    firsts = sorted({1, *(plan.schedule.window or ())})
    for first, after in zip(firsts, [*firsts[1:], last + 1]):
        sums = [plan.total(of, after - 1) - plan.total(of, first - 1) for of in work.values()]
        table += row(plan.schedule.phase(first), first, after, sums, plan.shape(first))
    table += row("the run", 1, last + 1, [plan.total(of) for of in work.values()], plan.shape(1))
    ratio = plan.flops() / (last * tokens * cost.flops_per_token(plan.final))
    plan = cost.Plan(c, plan.enlarged.vocab_size)  # scratch learns from no teacher
    scratch = [last * of(plan.final) for of in work.values()]
    table += row("scratch, same tokens", 1, last + 1, scratch, plan.final)
    text = f"{gpus} x {gpu} at ${PRICE:g} per GPU and hour. Time is computed for compiled steps in "
    text += f"bfloat16, at {PRODUCTS:.0%} of {peak:.3g} FLOP/s and {MOVES:.0%} of {bandwidth:.3g} "
    text += f"bytes/s; vocabulary of {plan.enlarged.vocab_size:,}\n\n{table}\n"
    text += f"Training FLOPs, with the teacher's: {ratio:.2f} times those of scratch on the same "
    return text + f"tokens. With max_steps={round(last * ratio)}, scratch has as many."


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)  # --key=value is a knob
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--gpus", type=positive, default=8)
    parser.add_argument("--gpu", choices=sorted(cost.GPUS), default="h100")
    args, knobs = parser.parse_known_args(argv)
    c, plan = load_plan(load_config(args.config, knobs), missing=GPT2_VOCABULARY)
    print(describe(c, plan, args.gpus, args.gpu))


if __name__ == "__main__":
    raise SystemExit(main())
