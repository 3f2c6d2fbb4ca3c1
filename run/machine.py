"""What a run computes on: device, precision and memory, and the processes that train together. And
how they stop: by a signal, or by an error in one line."""

import ctypes
import datetime
import math
import os
import platform
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from time import sleep

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.command import UserError
from run.config import Config, micro_batch, need, of_torchrun
from run.cost import Plan, memory_of

WAIT = datetime.timedelta(minutes=30)  # for another rank: a save or a validation may take long
# Those that exist. USR1: the warning of a batch system; BREAK: Ctrl-Break on Windows
SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK")]
GRACE = 0.5  # seconds
# Training FLOPs of a step below which it has one thread of a CPU. From 1e9 to 1e10, two cores make
# a step 1.3 to 1.6 times as fast, but 2.6 to 10 times slower where another program takes one of
# them, and below this, a run takes minutes anyway (tools.bench compares the two)
FEW_FLOPS = 4e9
# Files with the limit of a container's memory, by cgroups of version 2 and 1
LIMITS = [Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory/memory.limit_in_bytes")]
NO_MEMORY = MemoryError, torch.OutOfMemoryError  # a CPU or MPS raises others
RESCUED = "try a lower --learning_rate, with --resume --changed from the last checkpoint"


class Machine:
    """Device, precision, and the processes that train together: one, unless torchrun started more.
    Where one of them dies, the others end after WAIT at the latest: with gloo by a RuntimeError,
    with NCCL by its watchdog. Raises UserError where the device fails."""

    def __init__(self, c: Config):
        self.device = choose_device(c)
        self.dtype = choose_dtype(c, self.device)
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        # In float16, small gradients would be 0: the loss is scaled up, and gradients down again
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.rank, self.ranks = of_torchrun("RANK", 0), of_torchrun("WORLD_SIZE", 1)
        self.launched = "WORLD_SIZE" in os.environ  # by torchrun; also where it starts one process
        if self.launched:
            self.join()

    def join(self) -> None:
        # Import this before the group exists. If torch does so later, default arguments there keep
        # the group, and gloo's threads, until the interpreter ends, which then may crash
        from torch.distributed import nn as late  # noqa: F401

        store, rank, size = next(dist.rendezvous("env://", timeout=WAIT))
        # torchrun keeps its store when it starts dead ranks again, with their old addresses
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if self.device.type == "cuda" and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=WAIT)

    def choose_threads(self, flops: int) -> None:
        """Compute on one thread where a step has FEW_FLOPS, unless the environment says how many:
        the same digits on any number of cores. flops: of a step in training."""
        said = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys()
        if self.device.type == "cpu" and flops < FEW_FLOPS and not said:
            torch.set_num_threads(1)

    def autocast(self) -> torch.autocast:
        """In it, matrix products have the run's precision. Weights and moments are float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def send(self, x: Tensor) -> Tensor:
        """x, from the CPU, on the device. The CPU goes on while pinned memory is copied."""
        x = x.pin_memory() if self.device.type == "cuda" else x
        return x.to(self.device, non_blocking=True)

    def hardware(self) -> str:
        """The name of the GPU, or of the CPU as far as its system tells."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        linux = Path("/proc/cpuinfo")
        name = linux.exists() and re.search("model name.*: (.*)", linux.read_text())
        return name[1] if name else platform.processor() or platform.machine()

    def from_rank_0(self, mask: Tensor) -> Tensor:
        """Overwrite the mask with that of rank 0."""
        if self.launched:
            dist.broadcast(mask, src=0)
        return mask

    def average(self, x: Tensor) -> Tensor:
        """The average of x over the ranks."""
        if self.launched:
            x = x.to(self.device)  # NCCL averages on the GPU only
            dist.all_reduce(x)
            x /= self.ranks
        return x

    def average_numbers(self, *numbers: Tensor | float) -> list[float]:
        """The average of each number over the ranks, with one wait for the device."""
        x = [n if isinstance(n, Tensor) else torch.full((), n, device=self.device) for n in numbers]
        return self.average(torch.stack(x)).tolist()

    def check_same(self, model: nn.Module) -> None:
        """Raises UserError where the ranks hold different weights."""
        bits = [p.detach().contiguous().view(torch.int32).sum() for p in model.parameters()]
        if self.entries_that_differ(torch.stack(bits).tolist()):
            raise UserError("ranks hold different weights; --resume goes on from the last save", 1)

    def entries_that_differ(self, x: list) -> list:
        """The entries of x that are not the same on all ranks. Waits for all of them."""
        everyone = [x] * self.ranks
        if self.launched:
            dist.all_gather_object(everyone, x)
        return [mine for mine, *of_all in zip(x, *everyone) if of_all != [mine] * self.ranks]


def choose_device(c: Config) -> torch.device:
    """The device, set up so that training on it is fast. Raises UserError as Machine does."""
    found = {"cpu": True, "cuda": torch.cuda.is_available()}
    found["mps"] = torch.backends.mps.is_available()
    kind = ("cuda" if found["cuda"] else "cpu") if c.device == "auto" else c.device
    need(found[kind], c, "device", "this torch finds none; try --device=auto")
    # MPS has no float64 (for `average`); its bfloat16 attention sees later tokens (pytorch #195910)
    if kind == "mps" and ("WORLD_SIZE" in os.environ or c.dtype not in ("auto", "float32")):
        raise UserError("device='mps': works without torchrun, and in float32 only")
    if kind == "cuda":
        here, gpus = of_torchrun("LOCAL_RANK", 0), torch.cuda.device_count()
        need(here < gpus, c, "device", f"local rank {here}, but {gpus} GPUs are here")
        torch.cuda.set_device(here)
        torch.set_float32_matmul_precision("high")  # TF32 for what is not in a lower precision
    # glibc would return every large tensor to the system and get it back page by page, which is a
    # third of a step at small shapes: let it keep what is freed (mallopt(3))
    if kind == "cpu" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no allocation by mmap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: no return of the heap's end
    return torch.device(kind)


def check_memory(c: Config, plan: Plan, step: int, machine: Machine) -> None:
    """Refuse a run that would exceed the free memory of the GPU, or else all memory of the machine
    or container: UserError. To be lenient, half of the activations of this step count."""
    device = machine.device
    if device.type == "cuda":  # what this process holds is free for it
        memory = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    else:
        try:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError):  # not every system has it, or knows these names
            return
        for limit in LIMITS:
            with suppress(OSError, ValueError):  # there is none, or it is "max"
                memory = min(memory, int(limit.read_text()))
        memory //= of_torchrun("LOCAL_WORLD_SIZE", 1)  # the ranks here share it
    rows = micro_batch(c, machine.ranks)
    planned = memory_of(c, plan.shape(step), rows, plan.teacher)
    least, memory = (sum(planned.values()) - planned["activations"] / 2) / 2**30, memory / 2**30
    if least > memory:
        what = f"{least:,.1f} GiB a rank are too much for {device.type}, which has {memory:,.1f}"
        raise UserError(f"{what}; try a smaller micro_batch_size than {rows}, or --recompute=all")


def choose_dtype(c: Config, device: torch.device) -> torch.dtype:
    """The precision of the matrix products. "auto": bfloat16 where the hardware multiplies it, or
    else float16 on CUDA (a T4 multiplies it eight times as fast as float32, by its maker)."""
    if c.dtype != "auto":
        return getattr(torch, c.dtype)
    native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        ampere = torch.cuda.get_device_capability()[0] >= 8
        return torch.bfloat16 if ampere else torch.float16
    return torch.bfloat16 if native else torch.float32


class Stop:
    """From now on a signal asks for a stop at the step's end; a second one ends the process at
    once. `signal`: the number of the first; 0 before it. What comes within GRACE of the first
    counts as the first: a terminal and torchrun may each send a signal for the same stop."""

    def __init__(self):
        self.signal = 0
        for number in SIGNALS:
            signal.signal(number, self.ask)

    def ask(self, number: int, frame) -> None:
        self.signal = number
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        sleep(GRACE)
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)


def check_finite(where: str, **numbers: float) -> None:
    """Raises UserError where the run has diverged: a number is not finite."""
    if not math.isfinite(sum(numbers.values())):
        what = ", ".join(f"{name} {number:.3g}" for name, number in numbers.items())
        raise UserError(f"{where}: {what}: not finite; {RESCUED}", 1)


def print_error(error: Exception, c: Config | None) -> int:
    """Print an error in one line, and return the exit code. A bug is raised again. c: None while
    the config is read, when all ranks of a machine have the same error; then one of them speaks."""
    rank, ranks = of_torchrun("RANK", 0), of_torchrun("WORLD_SIZE", 1)
    line, code = " ".join(str(error).split()), 1
    if isinstance(error, UserError):
        code = error.code
    elif c and isinstance(error, NO_MEMORY):
        line = f"out of memory; try a smaller --micro_batch_size than {micro_batch(c, ranks)}"
    elif ranks > 1 and (isinstance(error, dist.DistError) or "gloo" in line):  # it has no class
        line = f"another rank no longer answers; --resume goes on from the last checkpoint ({line})"
    elif not isinstance(error, OSError):
        raise error
    if c or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{f'rank {rank}: ' if rank else ''}error: {line}", file=sys.stderr)
    return code
