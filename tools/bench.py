"""How fast a config trains here, and what bounds it: python -m tools.bench CONFIG [--key=value ...]

Everything is measured in one run and compared as ratios, from the medians of interleaved repeats:
the loop against its bare step (forward, backward, optimizer), enlarged against sliced, precisions,
compiled against eager, scoring, pruning, memory. --profile FILE writes a trace of some steps for
chrome://tracing. --plan measures nothing and says what the run needs on given GPUs (tools/plan.py).
"""

import argparse
import contextlib
import copy
import dataclasses
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from data import DataError
from data.loader import TokenDataset
from model import GPT, GPTConfig
from prune import prune, update_scores
from run.checkpoint import CheckpointError, read_log
from run.config import Config, ConfigError, make_plan, model_config, padded_vocab, prune_targets
from run.machine import Ranks, Stop, choose_device, choose_dtype, keep_memory
from tools.plan import GPUS, config_with_data, describe_plan, memory_of, planned
from train import evaluate, make_optimizer, train


class Step:
    """One bare training step of a shape: forward, backward, AdamW. Tokens are random."""

    def __init__(
        self, c: Config, shape: GPTConfig, device: torch.device, dtype: torch.dtype, compiled=False
    ):
        torch.manual_seed(1)
        self.model = GPT(shape).to(device)
        self.model.recompute = c.recompute
        names = {name for name, _ in self.model.named_parameters()}
        self.optimizer = make_optimizer(self.model, c, names)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.device, self.dtype = device, dtype
        size = (c.micro_batch_size or c.batch_size, c.context_length + 1)
        tokens = torch.randint(shape.vocab_size, size, device=device)
        self.x, self.y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def gradients(self) -> None:
        with self.autocast():
            loss = self.forward(self.x, self.y)
        loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        self.gradients()
        self.update()


class ScoredStep(Step):
    """The same with the units' sensitivity scored, as in the prune window."""

    scores: dict = {}

    def __call__(self) -> None:
        self.gradients()
        groups = [g for g in self.model.groups() if g.kind == "d_ff"]
        update_scores(self.scores, self.model, groups, "sensitivity", 0.85, {}, None)
        self.update()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call, n: int = 1) -> float:
    synchronize()
    began = time.perf_counter()
    for _ in range(n):
        call()
    synchronize()
    return (time.perf_counter() - began) / n


def race(calls: list, repeats: int, least: float = 0.5) -> list[float]:
    """Median seconds of each call. They take turns, so that what else the machine does hits all
    alike; each is warmed up first, and a turn lasts at least `least` seconds.
    """
    for call in calls:
        call()
    turns = [max(1, round(least / seconds_of(call))) for call in calls]
    rounds = [[seconds_of(call, n) for call, n in zip(calls, turns)] for _ in range(repeats)]
    return [median(times) for times in zip(*rounds)]


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few large matrix products: what this machine can do at most."""
    best = 0.0
    for n in (4096, 8192) if device.type == "cuda" else (512, 1024, 2048):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        best = max(best, 2 * n**3 / race([lambda a=a, b=b: a @ b], 3, 0.2)[0])
    return best


def loop_seconds(c: Config, out_dir: str, steps: int) -> float:
    """Seconds of a step in train.py's own loop, over the second half of its first `steps`, which is
    even. The log tells."""
    every = steps // 2
    c = dataclasses.replace(
        c, out_dir=out_dir, overwrite=True, stop_after=steps, log_every=every,
        eval_every=10**9, save_every=10**9, compile="off",
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), Stop() as stop:
        train(c, stop)
    first, last = (e["seconds"] for e in read_log(Path(out_dir)) if e["event"] == "step")
    return (last - first) / every


def startup_seconds(path: str, knobs: list[str], out_dir: str) -> float:
    """Seconds from the command to the end of the first step, in a process of its own."""
    root = Path(__file__).parent.parent
    knobs = [*knobs, f"--out_dir={out_dir}", "--overwrite", "--stop_after=1", "--compile=off"]
    began = time.perf_counter()
    command = [sys.executable, str(root / "train.py"), path, *knobs]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def resident() -> int:
    """Bytes of memory that this process holds (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_memory(step: Step) -> int:
    """Bytes that two steps take at their peak, weights and moments included."""
    if step.device.type == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    import resource

    step()
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prune_seconds(step: Step, width: int, c: Config, data: TokenDataset, ranks: Ranks) -> float:
    """Seconds of one prune, with the two losses around it, on a copy that has moments too."""
    model, optimizer = copy.deepcopy((step.model, step.optimizer))
    assert optimizer.state
    scores = {g.name: torch.rand(g.width, device=step.device) for g in model.groups()}
    tokens, rows = c.batch_size * c.context_length, c.micro_batch_size or c.batch_size

    def once() -> None:
        evaluate(model, data, tokens, rows, step.autocast, ranks)
        prune(model, optimizer, scores, "d_ff", width, "layer", c.round_to, 1)
        evaluate(model, data, tokens, rows, step.autocast, ranks)

    return seconds_of(once)


def measure(path: str, knobs: list[str], repeats: int, with_compile: bool) -> list[tuple]:
    """Rows (what, measured, target)."""
    c = config_with_data(path, knobs)
    keep_memory()
    data = TokenDataset(c.data_dir, "train", c.context_length)
    val = TokenDataset(c.data_dir, "val", c.context_length)
    vocab_size, device = padded_vocab(c, data.vocab_size), choose_device(c)
    dtype, ranks = choose_dtype(c, device), Ranks(device)
    plan = make_plan(c, vocab_size)
    full, final = model_config(c, vocab_size), plan.shapes[-1][0]
    if "d_ff" not in prune_targets(c):
        raise ConfigError(f"{path}: prunes no neurons, so there is nothing to compare")
    grid = prune_targets(c)["d_ff"][2]
    tokens = (c.micro_batch_size or c.batch_size) * c.context_length
    rows = []

    def flops(shape: GPTConfig) -> int:
        return shape.flops_per_token() * tokens

    # Memory first: the operating system only tells the highest so far. What libraries take at their
    # first use is not the shape's: a step of a tiny one comes before
    tiny = dataclasses.replace(full, vocab_size=64, context_length=16, d_ff=[8], n_kv_head=[1])
    short = dataclasses.replace(c, batch_size=1, micro_batch_size=1, context_length=16)
    Step(short, tiny, device, dtype)()
    tells = device.type == "cuda" or sys.platform == "linux"
    before = resident() if tells and device.type == "cpu" else 0
    wide = Step(c, full, device, dtype)
    if tells:
        peak = peak_memory(wide) - before
        micro_batch = c.micro_batch_size or c.batch_size
        expected = memory_of(full, micro_batch, c.recompute, dtype, 1, False).total
        rows.append(("peak memory, MiB; planned / measured",
                     f"{peak / 2**20:.0f}; {expected / peak:.2f}", "0.8 to 1.25"))  # fmt: skip

    slim = Step(c, final, device, dtype)
    scored = ScoredStep(c, full, device, dtype)
    other_dtype = torch.float32 if dtype != torch.float32 else torch.bfloat16
    other = Step(c, full, device, other_dtype)
    t_wide, t_slim, t_scored, t_other = race([wide, slim, scored, other], repeats)
    del slim, scored, other  # several times the model's memory
    rows.append(("enlarged step, ms; tokens/s", f"{t_wide * 1e3:.1f}; {tokens / t_wide:,.0f}", ""))
    saved, possible = 1 - t_slim / t_wide, 1 - flops(final) / flops(full)
    rows.append(("time saved by slicing / FLOPs saved",
                 f"{saved:.2f} / {possible:.2f} = {saved / possible:.2f}", ">= 0.9"))  # fmt: skip
    rows.append(("step with scoring / without", f"{t_scored / t_wide:.3f}", "<= 1.03"))
    names = [str(d).removeprefix("torch.") for d in (other_dtype, dtype)]
    rows.append((f"{names[0]} step / {names[1]} step", f"{t_other / t_wide:.2f}",
                 ">= 2.5 where AMX is" if dtype == torch.bfloat16 else ""))  # fmt: skip

    times = [prune_seconds(wide, full.d_ff[0] - grid, c, val, ranks) for _ in range(repeats)]
    t_prune = median(times)
    rows.append(("a prune, in steps", f"{t_prune / t_wide:.2f}", "<= 2"))
    # A shape between the two takes a time between theirs, by its FLOPs
    narrower = [(flops(full) - flops(s)) / (flops(full) - flops(final)) for s, _ in plan.shapes]
    steps_of_shape = [n * (c.batch_size * c.context_length // tokens) for _, n in plan.shapes]
    t_run = sum(n * (t_wide - x * (t_wide - t_slim)) for n, x in zip(steps_of_shape, narrower))
    n_scored = sum(map(plan.schedule.scoring, range(1, c.max_steps + 1)))
    n_prunes = len(plan.shapes) - 1
    shares = n_scored * (t_scored - t_wide) / t_run, n_prunes * t_prune / t_run
    rows.append((f"of the run: scoring ({n_scored} steps); {n_prunes} prunes",
                 "{:.2%}; {:.2%}".format(*shares), ""))  # fmt: skip

    unscored = next(s for s in range(1, c.max_steps + 1) if plan.schedule.scoring(s)) - 1
    steps = min(max(4, round(3 / t_wide)), unscored) // 2 * 2
    if not c.micro_batch_size and steps >= 4:  # fewer plain steps tell nothing
        with tempfile.TemporaryDirectory() as folder:
            ratios = []
            for _ in range(repeats):
                loop = loop_seconds(c, folder, steps)
                ratios.append(loop / seconds_of(wide, steps // 2))
            rows.append(("the loop's step / bare step", f"{median(ratios):.3f}", "<= 1.03"))
            start = median(startup_seconds(path, knobs, folder) for _ in range(min(3, repeats)))
            rows.append(("start to the end of step 1, s", f"{start:.1f}", "<= 6"))

    peaks = {d: matmul_peak(device, d) for d in (torch.float32, dtype)}
    for d, value in peaks.items():
        rows.append((f"matrix products, {str(d).removeprefix('torch.')}, FLOP/s",
                     f"{value:.3g}", ""))  # fmt: skip
    rows.append(
        ("enlarged, eager: share of that", f"{flops(full) / t_wide / peaks[dtype]:.0%}", "")
    )
    if with_compile:
        torch._dynamo.reset()
        compiled = Step(c, full, device, dtype, compiled=True)
        first = seconds_of(compiled)
        t_wide, t_compiled = race([wide, compiled], repeats)
        rows.append(("compiling, s", f"{first:.1f}", ""))
        saved = t_run * (1 - t_compiled / t_wide)
        rows.append((f"of the run: compiling {n_prunes + 1} shapes; saved by it",
                     f"{(n_prunes + 1) * first / t_run:.1%}; {saved / t_run:.1%}", ""))  # fmt: skip
        rows.append(("eager step / compiled step", f"{t_wide / t_compiled:.2f}", ""))
        share = flops(full) / t_compiled / peaks[dtype]
        rows.append(("enlarged, compiled: share of the matrix products", f"{share:.0%}", ">= 60%"))
    return rows


def profile(path: str, knobs: list[str], to: Path) -> str:
    """Write a trace of three steps; returns the operations that take longest."""
    c = config_with_data(path, knobs)
    keep_memory()
    device = choose_device(c)
    vocab_size = padded_vocab(c, TokenDataset(c.data_dir, "train", c.context_length).vocab_size)
    step = Step(c, model_config(c, vocab_size), device, choose_dtype(c, device))
    step()
    with torch.profiler.profile() as found:
        for _ in range(3):
            step()
    found.export_chrome_trace(str(to))
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return found.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=40)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--with_compile", action="store_true", help="also compile: half a minute")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write a trace, no table")
    parser.add_argument("--plan", action="store_true", help="measure nothing: say what it needs")
    parser.add_argument("--gpus", type=int, default=8, help="of the plan")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="of the plan")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the GPU's peak, assumed")
    parser.add_argument("--price", type=float, default=2.0, help="dollars per GPU and hour")
    args, knobs = parser.parse_known_args(argv)
    try:
        if args.plan:
            c, vocab_size = planned(args.config, knobs, args.gpus)
            dtype = torch.bfloat16 if c.dtype == "auto" else getattr(torch, c.dtype)
            assumed = (args.gpus, args.gpu, args.mfu, args.price)
            print(describe_plan(c, vocab_size, dtype, *assumed))
        elif args.profile:
            print(profile(args.config, knobs, args.profile))
        else:
            rows = measure(args.config, knobs, args.repeats, args.with_compile)
            print(f"torch {torch.__version__}, threads: {torch.get_num_threads()}")
            print("| what | measured | target |\n| --- | --- | --- |")
            for row in rows:
                print("| " + " | ".join(row) + " |")
    except (ConfigError, DataError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
