"""How fast a config trains here, and what bounds it: python -m tools.bench CONFIG [--key=value ...]

A step here is a bare one, on random tokens, without a teacher: forward, backward, update. What is
compared takes turns; the median of five turns counts. --compile=on adds compiled steps. On a CPU,
the step is also timed beside a busy process, on one thread and on all that torch takes. With
--nanogpt FOLDER, a clone of nanoGPT, its step is timed instead, beside one of ours of its size."""

import gc
import os
import runpy
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from copy import copy
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from statistics import median

import torch
from torch.utils.benchmark import Timer

from data.command import command
from model import GPT, GPTConfig
from run.config import Config, load_config, micro_batch
from run.cost import GPUS, Plan, card_of, flops_per_token, memory_of
from run.forward import Forward
from run.machine import Machine
from run.optimizer import make_optimizers
from tools import expanded, load_plan
from tools.plan import GPT2_VOCABULARY


class Step:
    """A training step of a shape, eager or compiled ("off" or "on")."""

    def __init__(self, c: Config, shape: GPTConfig, machine: Machine, compile: str = "off"):
        torch.manual_seed(1)
        self.model = GPT(shape).to(machine.device)
        self.optimizers = make_optimizers(self.model, c)
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


def nanogpt_step(file: Path, ours: Step) -> Step:
    """The same step, but with the model and the AdamW of nanoGPT's model.py."""
    nanogpt, shape, device = runpy.run_path(str(file)), ours.model.config, ours.batch.device
    size = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.d_model}
    size |= {"block_size": shape.context_length, "vocab_size": shape.vocab_size, "bias": False}
    step = copy(ours)
    with redirect_stdout(None):  # it prints its parameters
        step.model = nanogpt["GPT"](nanogpt["GPTConfig"](**size)).to(device)
        adamw = step.model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)
    step.optimizers, step.forward = [adamw], copy(ours.forward)
    model = torch.compile(step.model) if ours.forward.compiled else step.model
    step.forward.wrapped = lambda tokens, targets: model(tokens, targets)[1]  # (logits, loss)
    return step


def race(calls: list, repeats: int) -> list[float]:
    """Median seconds of each call, of `repeats` turns of half a second, or longer for one call."""
    how = {"stmt": "call()", "num_threads": torch.get_num_threads()}
    timers = [Timer(globals={"call": call}, **how) for call in calls]
    turns = [[t.blocked_autorange(min_run_time=0.5) for t in timers] for _ in range(repeats)]
    return [median(turn.median for turn in of_call) for of_call in zip(*turns)]


def peak_flops(machine: Machine) -> float:
    """FLOP/s of the card by its maker, or else of a large matrix product here."""
    if card := card_of(machine.device):
        return GPUS[card][0]
    n = 8192 if machine.device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=machine.device, dtype=machine.dtype)
    return 2 * n**3 / race([lambda: a @ b], 3)[0]


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


@contextmanager
def busy_process() -> Iterator[None]:
    """In it, another program keeps a core busy, for ten minutes at most."""
    code = "import time; end = time.time() + 600\nwhile time.time() < end: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def by_threads(step: Step) -> Iterator[tuple[str, str]]:
    """Tokens a second on one thread and on all, alone and beside a busy process."""
    tokens, most = step.batch[0].numel(), torch.get_num_threads()
    for threads in dict.fromkeys((1, most)):
        torch.set_num_threads(threads)
        (alone,) = race([step], 3)
        with busy_process():
            (beside,) = race([step], 3)
        speeds = f"{tokens / alone:,.0f}; {tokens / beside:,.0f} (ratio {alone / beside:.2f})"
        yield f"tokens/s on {threads} of {most} threads, alone; beside a busy process", speeds
    torch.set_num_threads(most)


def measure(c: Config, plan: Plan) -> Iterator[tuple[str, str]]:
    """What was measured, and the result, as they come."""
    machine, full = Machine(c), plan.shape(1)
    c = replace(c, dtype=machine.dtype_name)
    for compile, how in (("off", "eager"), ("on", "compiled"))[: 1 + (c.compile == "on")]:
        so = replace(c, compile=compile)
        planned = sum(memory_of(so, full, micro_batch(c, ranks=1)).values()) / 2**20
        peak = peak_memory(so, full, machine) / 2**20
        yield f"peak memory, {how}", f"{peak:.0f} MiB; planned {planned:.0f} MiB"
    steps = [Step(c, shape, machine) for shape in (full, plan.final)]
    if c.compile == "on":
        steps.append(Step(c, full, machine, "on"))
    wide, slim, *compiled = race(steps, 5)
    tokens, limit = steps[0].batch[0].numel(), peak_flops(machine)
    flops = flops_per_token(full) * tokens
    yield "step of a micro batch", f"{wide * 1e3:.1f} ms, {tokens / wide:,.0f} tokens/s"
    yield "its share of the peak", f"{flops / wide / limit:.0%} of {limit:.3g} FLOP/s"
    for t in compiled:
        yield "compiled step", f"{wide / t:.2f} times as fast, {flops / t / limit:.0%} of the peak"
    if plan.final != full:
        fewer = 1 - flops_per_token(plan.final) / flops_per_token(full)
        yield "the final shape", f"{1 - slim / wide:.0%} less time, {fewer:.0%} fewer FLOPs"
    if machine.device.type == "cpu":
        yield from by_threads(steps[0])


def measure_nanogpt(file: Path, c: Config, shape: GPTConfig) -> Iterator[tuple[str, str]]:
    """The same of nanoGPT, and of our shape with as many layers, heads, channels and parameters."""
    machine = Machine(c)
    c = replace(c, dtype=machine.dtype_name)
    heads = {"n_kv_head": shape.n_head, "queries_per_kv": 1}
    d_ff = 8 * round(shape.d_model / 3)  # of three matrices; nanoGPT has two of 4 * d_model
    shape = replace(shape, **heads, head_dim=shape.d_model // shape.n_head, d_ff=d_ff)
    for compile, how in (("off", "eager"), ("on", "compiled"))[: 1 + (c.compile == "on")]:
        ours = Step(c, shape, machine, compile)
        steps = {"nanoGPT": nanogpt_step(file, ours), "ours": ours}
        for (name, step), seconds in zip(steps.items(), race([*steps.values()], 5)):
            count = sum(p.numel() for p in step.model.parameters())
            yield f"{name}, {how}, {c.dtype}", f"{seconds * 1e3:.1f} ms, {count:,} parameters"


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)  # --key=value is a knob
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--nanogpt", type=expanded, metavar="FOLDER")
    args, knobs = parser.parse_known_args(argv)
    c, plan = load_plan(load_config(args.config, knobs), missing=GPT2_VOCABULARY)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| what | here |\n| --- | --- |")
    nanogpt = args.nanogpt and measure_nanogpt(args.nanogpt / "model.py", c, plan.shape(1))
    for what, result in nanogpt or measure(c, plan):
        print(f"| {what} | {result} |", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
