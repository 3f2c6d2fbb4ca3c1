"""What a run will need: python -m tools.plan CONFIG --gpus 8 --gpu h100 [--key=value ...]

Of each phase, from shapes alone: parameters, tokens, work in FLOPs, hours, cost, memory of a rank;
and what the final shape costs from scratch. Hours and cost are of all work: training, what is
computed again (`recompute`), and the products of Muon, which each GPU does on its own. Where the
data is not there yet, GPT-2's vocabulary is assumed.
"""

import argparse
import sys
from dataclasses import replace

import torch

from model import GPTConfig
from run import UserError
from run.config import Config, check_ranks, micro_batch
from run.cost import Plan, block_flops, flops_per_token, memory_of, muon_flops, n_parameters
from run.read_config import load_config
from run.report import compact
from tools import command, number, positive
from tools.load import load_plan

# The makers' figures: dense bfloat16 FLOP/s, bytes of memory.
GPUS = {
    "a100": (312e12, 80e9),
    "h100": (989e12, 80e9),
    "h200": (989e12, 141e9),
    "4090": (165e12, 24e9),
}

MOST_SEQUENCES = 1_000_000  # `fit` tries every way to share them out
GPT2_VOCABULARY = 50_257  # of text that is not prepared yet


def fit(c: Config, plan: Plan, shape: GPTConfig, gpus: int, room: float) -> tuple[int, str]:
    """Bytes of a rank, and whether they fit into `room`; if not, what to try."""
    dtype = torch.bfloat16 if c.dtype == "auto" else getattr(torch, c.dtype)
    share = c.batch_size // gpus
    sizes = [n for n in range(1, share + 1) if share % n == 0]
    need = {n: sum(memory_of(c, shape, n, dtype, plan.teacher).values()) for n in sizes}
    wanted = need[micro_batch(c, gpus)]
    fitting = [f"--micro_batch_size={n}" for n in need if need[n] <= room]
    last = "not one sequence fits" if c.recompute else "--recompute"
    return wanted, "yes" if wanted <= room else f"no; {[last, *fitting][-1]}"


def describe(c: Config, plan: Plan, gpus: int, gpu: str, mfu: float, price: float) -> str:
    """The answer in Markdown. Raises UserError where the batch does not divide, or is absurd."""
    check_ranks(c, gpus)
    if c.batch_size > MOST_SEQUENCES:
        raise UserError(f"batch_size={c.batch_size}: a plan has at most {MOST_SEQUENCES:,}")
    peak, capacity = GPUS[gpu]
    tokens, last = plan.tokens_per_step, c.max_steps
    taught = {"teacher FLOPs": lambda shape: tokens * plan.teacher_flops} if plan.teacher else {}
    work = {  # FLOPs of a step, on all GPUs together
        "training FLOPs": lambda shape: tokens * flops_per_token(shape),
        **taught,
        "recompute FLOPs": lambda shape: tokens * block_flops(shape) if c.recompute else 0,
        "Muon FLOPs": lambda shape: gpus * muon_flops(shape) if c.optimizer == "muon" else 0,
    }

    def row(name: str, steps: int, flops: list[int], shape: GPTConfig) -> str:
        hours = sum(flops) / (gpus * peak * mfu) / 3600
        need, fits = fit(c, plan, shape, gpus, 0.9 * capacity)  # the rest: CUDA, NCCL and gaps
        cells = [name, compact(n_parameters(shape)), compact(steps * tokens)]
        cells += [*(f"{x:.3g}" for x in flops), f"{hours:,.4g}", f"${hours * gpus * price:,.0f}"]
        return f"| {' | '.join(cells)} | {need / 2**30:.1f} | {fits} |\n"

    heads = ["phase", "parameters", "tokens", *work, "hours", "cost", "GiB per rank", "fits"]
    table = f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}\n"
    firsts = sorted({1, *(plan.schedule.window or ())})
    for first, after in zip(firsts, [*firsts[1:], last + 1]):
        flops = [plan.total(of, after - 1) - plan.total(of, first - 1) for of in work.values()]
        table += row(plan.schedule.phase(first), after - first, flops, plan.shape(first))
    table += row("the run", last, [plan.total(of) for of in work.values()], plan.shape(1))
    flops, plan = plan.flops(), replace(plan, teacher=None)  # scratch learns from no teacher
    scratch = [last * of(plan.final) for of in work.values()]
    ratio = flops / scratch[0]
    table += row("scratch, same tokens", last, scratch, plan.final)
    what = "Training FLOPs" + (", with the teacher's" if taught else "")
    return (
        f"{gpus} x {gpu} at {mfu:.0%} of {peak:.3g} FLOP/s and ${price:g} per GPU and hour; "
        f"vocabulary of {plan.enlarged.vocab_size:,}\n\n{table}\n"
        f"{what}: {ratio:.2f} times those of scratch on the same tokens. With "
        f"max_steps={round(last * ratio)}, scratch has as many."
    )


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--gpus", type=positive, default=8)
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    share = "assumed share of the GPU's peak, with all work counted (known as HFU)"
    parser.add_argument("--mfu", type=number(float, 0.001, 1), default=0.4, help=share)
    price = "dollars per GPU and hour"
    parser.add_argument("--price", type=number(float, 0, 1e6), default=2.0, help=price)
    args, knobs = parser.parse_known_args(argv)
    c, plan = load_plan(load_config(args.config, knobs), missing=GPT2_VOCABULARY)
    print(describe(c, plan, args.gpus, args.gpu, args.mfu, args.price))


if __name__ == "__main__":
    sys.exit(main())
