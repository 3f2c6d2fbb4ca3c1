"""How fast a config trains here: python -m tools.bench CONFIG [--key=value ...]

Starts train.py several times, and kills each run after a few seconds of steps. A step
is one micro-batch, without a teacher, and no step prunes. The table compares the
enlarged shape with the final one, eager steps with compiled ones (--compile=on), and on
a CPU one thread with all, alone and beside a busy process. Whatever is compared takes
turns, and the median turn counts. If the data is not there yet, the shipped corpus
stands in, with as many tokens in the vocabulary.

--nanogpt=FOLDER, a clone of nanoGPT, compares its model with ours of the same size.
Both take bare steps with AdamW in this process, on random tokens.
"""

import math
import os
import runpy
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch.utils.benchmark import Timer

from configs import Config, load_config, split_batch
from data.command import UserError, command
from model import GPT, compile_blocks, peak_flops, tune_cpu
from tools import expanded, read_log
from tools.plan import GPT2_VOCABULARY, Plan, constant_shape, load_plan

TRAIN = Path(__file__).parent.parent / "train.py"
TURNS = 3  # runs of each variant
SECONDS = 3.0  # of training in a run, or longer for STEPS steps
STEPS = 6
NEVER = 10**6  # steps. Each run is killed long before
BARE_RUN = {
    "max_steps": NEVER,
    "warmup_steps": 0,
    "stop_after": 0,
    "log_every": 1,
    "eval_every": NEVER,
    "save_every": NEVER,
    "eval_tokens": 1,
    "init_from": "",
    "teacher": "",
    "wandb_project": "",
}
COMPILING_FAILED = ("compiling failed", "python train.py CONFIG --compile=on says why")


# What train.py does


@dataclass
class Variant:
    """What one run of train.py is like."""

    arguments: list[str]  # the config file and its knobs
    threads: int = 0  # 0: as many as train.py takes
    beside_busy_process: bool = False


def take_turns(variants: dict[str, Variant]) -> dict[str, tuple[float, str]]:
    """Tokens per second of each variant, the median of its turns, and its `compute`,
    such as "cpu, float32, compiled"."""
    speeds = {name: [] for name in variants}
    compute = {}
    for _ in range(TURNS):
        for name, variant in variants.items():
            speed, compute[name] = time_run(variant)
            speeds[name].append(speed)
    return {name: (median(speeds[name]), compute[name]) for name in variants}


def time_run(variant: Variant) -> tuple[float, str]:
    """Tokens per second in the median step of a run, and its `compute`.

    Raises UserError if train.py does.
    """
    environment = dict(os.environ)
    if variant.threads:
        environment["OMP_NUM_THREADS"] = str(variant.threads)
    neighbor = busy_process if variant.beside_busy_process else nullcontext
    with TemporaryDirectory() as folder, neighbor():
        out_dir = Path(folder, "run")
        output = Path(folder, "output.txt")
        call = [sys.executable, TRAIN, *variant.arguments, f"--out_dir={out_dir}"]
        with open(output, "wb") as file:
            process = subprocess.Popen(call, stdout=file, stderr=file, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                log = read_log(out_dir)
                steps = [event for event in log if event["event"] == "step"]
                if is_enough(steps):
                    # The first step also has torch's preparations
                    speed = median(event["tokens_per_second"] for event in steps[1:])
                    return speed, log[0]["compute"]
        finally:
            process.kill()
            process.wait()
        lines = output.read_text(errors="replace").split("\n")
        message = "\n".join(lines[-2:]).strip().removeprefix("error: ")
        raise UserError(f"train.py: {message}")


def is_enough(steps: list[dict]) -> bool:
    if len(steps) < STEPS:
        return False
    return steps[-1]["seconds"] - steps[0]["seconds"] >= SECONDS


@contextmanager
def busy_process() -> Iterator[None]:
    """Inside, another program keeps a core busy, for ten minutes at most."""
    code = "import time; end = time.time() + 600\nwhile time.time() < end: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(
    path: str, knobs: list[str], config: Config, plan: Plan
) -> Iterator[tuple[str, str]]:
    """What was measured, and the result, as they come."""
    micro_batch_size, _ = split_batch(config, 1)
    bare = BARE_RUN | {"batch_size": micro_batch_size}
    if not Path(config.data_dir).is_dir():
        bare["data_dir"] = Config.data_dir
        bare["round_vocab_to"] = plan.enlarged.vocab_size

    def run_of(shape, compile="off", **others):
        all_knobs = bare | constant_shape(shape) | {"compile": compile}
        ours = [f"--{key}={value}" for key, value in all_knobs.items()]
        return Variant([path, *knobs, *ours], **others)

    is_pruned = plan.final != plan.enlarged
    variants = {"eager": run_of(plan.enlarged)}
    if is_pruned:
        variants["final"] = run_of(plan.final)
    if config.compile == "on":
        variants["compiled"] = run_of(plan.enlarged, "on")
    results = take_turns(variants)

    speed, compute = results["eager"]
    device_name, dtype_name, _ = compute.split(", ")
    tokens = micro_batch_size * config.context_length
    flops_per_token = plan.enlarged.flops_per_token()
    peak = measured_peak(torch.device(device_name), getattr(torch, dtype_name))
    share = f"{speed * flops_per_token / peak:.0%}"
    yield "step", f"{tokens / speed * 1e3:.1f} ms, {speed:,.0f} tokens/s, {compute}"
    yield "its share of the peak", f"{share} of {peak:.3g} FLOP/s"
    if config.compile == "on":
        fast, compute = results["compiled"]
        share = f"{fast * flops_per_token / peak:.0%}"
        row = ("compiled", f"{fast / speed:.2f} times as fast, {share} of the peak")
        yield row if compute.endswith("compiled") else COMPILING_FAILED
    if is_pruned:
        less_time = 1 - speed / results["final"][0]
        fewer_flops = 1 - plan.final.flops_per_token() / flops_per_token
        saved = f"{less_time:.0%} less time, {fewer_flops:.0%} fewer FLOPs"
        yield "the final shape", saved
    if device_name == "cpu":
        yield from by_threads(variants["eager"])


def by_threads(eager: Variant) -> Iterator[tuple[str, str]]:
    """Tokens per second on one thread and on all, alone and beside a busy process."""
    most = torch.get_num_threads()
    variants = {}
    for threads in {1, most}:
        alone = replace(eager, threads=threads)
        variants[f"{threads} alone"] = alone
        variants[f"{threads} beside"] = replace(alone, beside_busy_process=True)
    results = take_turns(variants)
    for threads in sorted({1, most}):
        alone, _ = results[f"{threads} alone"]
        beside, _ = results[f"{threads} beside"]
        speeds = f"{alone:,.0f}; {beside:,.0f} (ratio {beside / alone:.2f})"
        name = f"tokens/s on {threads} of {most} threads, alone; beside a busy process"
        yield name, speeds


# What this process computes itself


def race(calls: list[Callable], turns: int) -> list[float]:
    """Median seconds of each call. A turn takes half a second, or one call."""
    threads = torch.get_num_threads()
    timers = []
    for call in calls:
        timers.append(Timer("call()", globals={"call": call}, num_threads=threads))
    seconds = [[] for _ in calls]
    for _ in range(turns):
        for timer, of_call in zip(timers, seconds):
            of_call.append(timer.blocked_autorange(min_run_time=0.5).median)
    return [median(of_call) for of_call in seconds]


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a known GPU, or else of a large matrix product here."""
    if known := peak_flops(device):
        return known
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    (seconds,) = race([lambda: a @ b], 3)
    return 2 * n**3 / seconds


def bare_step(
    loss_of: Callable,
    optimizer: torch.optim.Optimizer,
    batch: torch.Tensor,
    dtype: torch.dtype,
) -> Callable[[], None]:
    """A training step of either model. batch: inputs and targets, (2, B, T)."""
    mixed = dtype != torch.float32

    def step() -> None:
        with torch.autocast(batch.device.type, dtype, enabled=mixed):
            loss = loss_of(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure_nanogpt(
    file: Path, config: Config, plan: Plan
) -> Iterator[tuple[str, str]]:
    """A step of nanoGPT's model.py, and one of ours with as many layers, heads,
    channels and parameters."""
    has_cuda = torch.cuda.is_available() and config.device != "cpu"
    device = torch.device("cuda" if has_cuda else "cpu")
    if has_cuda:
        torch.set_float32_matmul_precision("high")
    else:
        tune_cpu(math.inf)
    dtype = choose_dtype(config.dtype, device)
    d_model = plan.enlarged.d_model
    shape = replace(
        plan.enlarged,
        n_kv_head=plan.enlarged.n_head,
        queries_per_kv=1,
        head_dim=d_model // plan.enlarged.n_head,
        d_ff=8 * round(d_model / 3),  # of three matrices; nanoGPT has two of 4 d_model
    )
    micro_batch_size, _ = split_batch(config, 1)
    size = (2, micro_batch_size, config.context_length)
    batch = torch.randint(shape.vocab_size, size, device=device)
    nanogpt = runpy.run_path(str(file))
    same_size = nanogpt["GPTConfig"](
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=d_model,
        block_size=shape.context_length,
        vocab_size=shape.vocab_size,
        bias=False,
    )

    for mode in ["eager", "compiled"] if config.compile == "on" else ["eager"]:
        torch.manual_seed(1)
        ours = GPT(shape).to(device)
        if mode == "compiled":
            compile_blocks(ours, plan.schedule.widths)
        matrices = [p for p in ours.parameters() if p.dim() == 2]
        vectors = [p for p in ours.parameters() if p.dim() == 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        adamw = torch.optim.AdamW(
            groups, 1e-3, (0.9, 0.95), weight_decay=0.1, fused=True
        )
        our_step = bare_step(ours, adamw, batch, dtype)
        our_step()  # compiles
        if mode == "compiled" and not ours.compiled:
            yield COMPILING_FAILED
            return

        with redirect_stdout(None):  # nanoGPT prints its parameters
            theirs = nanogpt["GPT"](same_size).to(device)
            adamw = theirs.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)
        forward = torch.compile(theirs) if mode == "compiled" else theirs
        their_step = bare_step(second_result_of(forward), adamw, batch, dtype)
        their_step()

        names = ["nanoGPT", "ours"]
        seconds = race([their_step, our_step], 5)
        for name, model, s in zip(names, [theirs, ours], seconds):
            n_params = sum(p.numel() for p in model.parameters())
            dtype_name = str(dtype).removeprefix("torch.")
            what = f"{name}, {mode}, {dtype_name}"
            yield what, f"{s * 1e3:.1f} ms, {n_params:,} parameters"


def second_result_of(forward: Callable) -> Callable:
    """The loss alone of nanoGPT's (logits, loss)."""
    return lambda tokens, targets: forward(tokens, targets)[1]


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """What train.py takes for this knob."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        ampere = torch.cuda.get_device_capability()[0] >= 8
        return torch.bfloat16 if ampere else torch.float16
    is_fast = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if is_fast else torch.float32


@command
def main(argv: list[str]) -> None:
    # Without abbreviations, because --key=value is a knob
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--nanogpt", type=expanded, metavar="FOLDER")
    args, knobs = parser.parse_known_args(argv)
    config, _ = load_config(args.config, knobs)
    config, plan = load_plan(config, missing=GPT2_VOCABULARY)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| what | here |\n| --- | --- |", flush=True)
    if args.nanogpt:
        rows = measure_nanogpt(args.nanogpt / "model.py", config, plan)
    else:
        rows = measure(args.config, knobs, config, plan)
    for what, result in rows:
        print(f"| {what} | {result} |", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
