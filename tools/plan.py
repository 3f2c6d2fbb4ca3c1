"""What a run will need: python -m tools.plan CONFIG --gpus 8 --gpu h100 [--key=value ...]

Of each phase, from shapes alone; and of the final shape from scratch. Hours and cost are of all
work: training, what is computed again (`recompute`), and the products of Muon, which each GPU does
on its own. Where the data is not there yet, GPT-2's vocabulary is assumed."""

from argparse import ArgumentParser

from data import command
from model import GPTConfig
from run import cost
from run.config import Config, check_ranks, load_config, micro_batch
from run.out_dir import compact
from tools import load_plan, number, positive

# The makers' figures: dense bfloat16 FLOP/s, bytes of memory
GPUS = {"a100": (312e12, 80e9), "h100": (989e12, 80e9), "h200": (989e12, 141e9)}
GPUS |= {"4090": (165e12, 24e9)}
GPT2_VOCABULARY = 50_257
PRICE = 2.0  # dollars per GPU and hour


def describe(c: Config, plan: cost.Plan, gpus: int, gpu: str, mfu: float) -> str:
    """A table in Markdown. Raises UserError where the batch does not divide."""
    check_ranks(c, gpus)
    peak, capacity = GPUS[gpu]
    room = 0.9 * capacity  # the rest: CUDA, NCCL and gaps
    tokens, last = plan.tokens_per_step, c.max_steps
    work = {  # FLOPs of a step, on all GPUs together
        "training FLOPs": lambda shape: tokens * cost.flops_per_token(shape),
        "teacher FLOPs": lambda shape: tokens * plan.teacher_flops,
        "recompute FLOPs": lambda shape: tokens * cost.block_flops(shape) if c.recompute else 0,
        "Muon FLOPs": lambda shape: gpus * cost.muon_flops(shape) if c.optimizer == "muon" else 0,
    }

    def row(name: str, first: int, end: int, flops: list[int], shape: GPTConfig) -> str:
        hours = sum(flops) / (gpus * peak * mfu) / 3600
        need = sum(cost.memory_of(c, shape, micro_batch(c, gpus), plan.teacher).values())
        way = cost.knobs_that_fit(c, shape, plan.teacher, room, gpus) or "not one sequence fits"
        rate = plan.schedule.rate_share(first, end - 1)
        cells = [name, compact(cost.n_parameters(shape)), compact((end - first) * tokens)]
        cells += [f"{rate:.0%}", *(f"{x:.3g}" for x in flops), f"{hours:,.4g}"]
        cells += [f"${hours * gpus * PRICE:,.0f}", f"{need / 2**30:.1f}"]
        return f"| {' | '.join(cells)} | {'yes' if need <= room else f'no; {way}'} |\n"

    heads = ["phase", "parameters", "tokens", "learning rate", *work]
    heads += ["hours", "cost", "GiB per rank", "fits"]
    table = f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}\n"
    firsts = sorted({1, *(plan.schedule.window or ())})
    for first, after in zip(firsts, [*firsts[1:], last + 1]):
        flops = [plan.total(of, after - 1) - plan.total(of, first - 1) for of in work.values()]
        table += row(plan.schedule.phase(first), first, after, flops, plan.shape(first))
    table += row("the run", 1, last + 1, [plan.total(of) for of in work.values()], plan.shape(1))
    ratio = plan.flops() / (last * tokens * cost.flops_per_token(plan.final))
    plan = cost.Plan(c, plan.enlarged.vocab_size)  # scratch learns from no teacher
    scratch = [last * of(plan.final) for of in work.values()]
    table += row("scratch, same tokens", 1, last + 1, scratch, plan.final)
    text = f"{gpus} x {gpu} at {mfu:.0%} of {peak:.3g} FLOP/s and ${PRICE:g} per GPU and hour; "
    text += f"vocabulary of {plan.enlarged.vocab_size:,}\n\n{table}\n"
    text += f"Training FLOPs, with the teacher's: {ratio:.2f} times those of scratch on the same "
    return text + f"tokens. With max_steps={round(last * ratio)}, scratch has as many."


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.allow_abbrev = False  # what is no option is a knob
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--gpus", type=positive, default=8)
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    share = "assumed share of the GPU's peak, with all work counted (HFU)"
    parser.add_argument("--mfu", type=number(float, 0.001, 1), default=0.4, help=share)
    args, knobs = parser.parse_known_args(argv)
    c, plan = load_plan(load_config(args.config, knobs), missing=GPT2_VOCABULARY)
    print(describe(c, plan, args.gpus, args.gpu, args.mfu))


if __name__ == "__main__":
    raise SystemExit(main())
