"""How fast a config trains here, and what bounds it: python -m tools.bench CONFIG [--key=value ...]

A step here is a bare one, on random tokens, without a teacher: forward, backward, update. What is
compared takes turns; the median of --repeats turns counts. --compile=on adds compiled steps."""

import gc
import os
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from statistics import median

import torch

from data import command
from model import GPT, GPTConfig
from prune import Pruner
from run.config import Config, load_config, micro_batch
from run.cost import GPUS, Plan, card_of, flops_per_token, memory_of
from run.forward import Forward
from run.machine import Machine
from run.optimizer import make_optimizers
from tools import load_plan, positive
from tools.plan import GPT2_VOCABULARY


class Step:
    """A training step of a shape, eager or compiled ("off" or "on")."""

    def __init__(self, c: Config, shape: GPTConfig, machine: Machine, compile: str = "off"):
        torch.manual_seed(1)
        self.model = GPT(shape).to(machine.device)
        self.optimizers = make_optimizers(self.model, c, machine.dtype)
        c, plan = replace(c, compile=compile), Plan(c, shape.vocab_size)
        self.forward = Forward(self.model, c, plan, machine)
        size = 2, micro_batch(c, ranks=1), c.context_length  # tokens, targets
        self.batch = torch.randint(shape.vocab_size, size, device=machine.device)

    def __call__(self, micro_batches: int = 1) -> None:
        for _ in range(micro_batches):
            self.forward(*self.batch).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def seconds_of(call: Callable[[], object], n: int = 1) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
    wait()
    began = time.perf_counter()
    for _ in range(n):
        call()
    wait()
    return (time.perf_counter() - began) / n


def race(calls: list, repeats: int) -> list[float]:
    """Median seconds of each call, of `repeats` turns, of half a second or one call."""
    for call in calls:
        call()  # the first one is slow
    turns = [max(1, round(0.5 / seconds_of(call))) for call in calls]
    rounds = [[seconds_of(call, n) for call, n in zip(calls, turns)] for _ in range(repeats)]
    return [median(times) for times in zip(*rounds)]


def matmul_peak(machine: Machine) -> float:
    """FLOP/s of a large matrix product: what this machine can do at most."""
    n = 8192 if machine.device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=machine.device, dtype=machine.dtype)
    return 2 * n**3 / race([lambda: a @ b], 3)[0]


def share(speed: float, limit: float, device: torch.device) -> str:
    """`speed` as a share of `limit`, and of the card's peak by its maker: the MFU. In FLOP/s."""
    text = f"{speed / limit:.0%} of {limit:.3g} FLOP/s"
    if card := card_of(device):
        text += f"; MFU {speed / GPUS[card][0]:.0%} ({card})"
    return text


def peak_memory(c: Config, shape: GPTConfig, machine: Machine) -> int:
    """Bytes that tensors take at the peak of two steps of two micro batches each, from nothing."""

    def steps() -> None:
        step = Step(c, shape, machine, c.compile)
        step(micro_batches=2), step(micro_batches=2)

    gc.collect()  # or what was there before counts when it goes
    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        steps()
        return torch.cuda.max_memory_allocated()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks to stderr
    with torch.profiler.profile(profile_memory=True) as profile:
        steps()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(accumulate(e.nbytes() for e in changes))


def measure(c: Config, plan: Plan, repeats: int) -> Iterator[tuple[str, str]]:
    """What was measured, and the result, as they come."""
    machine, full = Machine(c), plan.shape(1)
    c, device = replace(c, dtype=machine.dtype_name), machine.device
    for compile in ("off", "on")[: 1 + (c.compile == "on")]:
        so = replace(c, compile=compile)
        planned = sum(memory_of(so, full, micro_batch(c, ranks=1)).values()) / 2**20
        what = "peak memory, compiled" if compile == "on" else "peak memory"
        peak = peak_memory(so, full, machine) / 2**20
        yield what, f"{peak:.0f} MiB; planned {planned:.0f} MiB"
    wide, slim = (Step(c, shape, machine) for shape in (full, plan.final))
    t_wide, t_slim = race([wide, slim], repeats)
    limit, tokens = matmul_peak(machine), wide.batch[0].numel()
    flops = flops_per_token(full) * tokens
    yield "step of a micro batch", f"{t_wide * 1e3:.1f} ms, {tokens / t_wide:,.0f} tokens/s"
    yield "its share of matrix products", share(flops / t_wide, limit, device)
    if plan.final != full:
        fewer = 1 - flops_per_token(plan.final) / flops_per_token(full)
        yield "the final shape", f"{1 - t_slim / t_wide:.0%} less time, {fewer:.0%} fewer FLOPs"
    if c.compile == "on":
        began = time.perf_counter()
        compiled = Step(c, full, machine, "on")
        yield "compiling, once", f"{time.perf_counter() - began:.1f} s"
        t_wide, t = race([wide, compiled], repeats)
        faster = f"{t_wide / t:.2f} times as fast; its share: "
        yield "compiled step", faster + share(flops / t, limit, device)
    if steps := plan.schedule.prune_steps():
        kind, width = next(iter(plan.schedule.new_widths(steps[0]).items()))
        pruner = Pruner("magnitude", c.score_beta, [kind], c.seed)
        pruner.score(wide.model)
        t = seconds_of(lambda: pruner.prune(wide.model, wide.optimizers, kind, width))
        t_step = t_wide * c.batch_size / micro_batch(c, ranks=1)
        yield "a prune alone", f"{t / t_step:.2f} steps of the whole batch"


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.allow_abbrev = False  # what is no option is a knob
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--repeats", type=positive, default=5)
    args, knobs = parser.parse_known_args(argv)
    c, plan = load_plan(load_config(args.config, knobs), missing=GPT2_VOCABULARY)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| what | here |\n| --- | --- |")
    for what, result in measure(c, plan, args.repeats):
        print(f"| {what} | {result} |", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
