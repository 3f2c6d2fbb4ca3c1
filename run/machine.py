"""What a run computes on: device, precision, the ranks that train together, signals to stop."""

import contextlib
import ctypes
import datetime
import os
import platform
import shutil
import signal
import sys
import time
import uuid

import torch
import torch.distributed as dist
from torch import Tensor, nn

from run.config import Config, ConfigError


class TrainingError(Exception):
    """The run cannot go on: at which step, why, what to do."""


def choose_device(c: Config) -> torch.device:
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    kind = c.device if c.device != "auto" else next(k for k, there in available.items() if there)
    if not available[kind]:
        raise ConfigError(f"device={c.device!r}: this torch finds none; try --device=auto")
    if kind == "cuda":
        here, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if here >= gpus:
            raise ConfigError(
                f"device={c.device!r}: local rank {here}, but this machine has {gpus} GPUs"
            )
        torch.cuda.set_device(here)
        torch.set_float32_matmul_precision("high")  # TF32 for what is not in a lower precision
    return torch.device(kind)


def device_memory(device: torch.device) -> int:
    """Bytes of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):  # Windows
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def choose_dtype(c: Config, device: torch.device) -> torch.dtype:
    """Of the matrix products; weights, moments and scores are float32 whatever it is."""
    if c.dtype != "auto":
        return getattr(torch, c.dtype)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability()[0] >= 8
        return torch.bfloat16 if native else torch.float16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device.type == "cpu" and native else torch.float32


def choose_compile(c: Config, device: torch.device, flops_per_shape: float) -> bool:
    """On a CPU, compiling a shape takes half a minute and makes its steps 1.3 times faster: it pays
    from about 3e13 FLOPs per shape (measured on two cores, d_model 64 and 256).
    """
    has_compiler = any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))
    if c.compile == "on" and device.type == "cpu" and not has_compiler:
        raise ConfigError("compile='on': needs g++ or clang++ on a CPU; or give --compile=off")
    if c.compile != "auto":
        return c.compile == "on"
    on_cpu = device.type == "cpu" and has_compiler and flops_per_shape > 3e13
    return device.type == "cuda" or on_cpu


def keep_memory() -> None:
    """Have the C library keep what is freed for the next step, where it is glibc.

    By default it returns every large tensor to the system and gets it back page by page, which is a
    third of a step at small shapes (mallopt(3): M_MMAP_MAX, M_TRIM_THRESHOLD).
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # no allocation by mmap
        mallopt(-1, -1)  # no return of the heap's end


class Ranks:
    """The processes that train together: one, unless torchrun started more.

    Where one of them dies, the others raise a RuntimeError within `timeout` seconds.
    """

    def __init__(self, device: torch.device, timeout: int = 600):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1:
            # What torch imports late has the group as a default argument, and keeps it, with gloo's
            # threads, until the interpreter ends, which they may abort. Now it gets None instead
            from torch.distributed import nn as late  # noqa: F401

            backend = "nccl" if device.type == "cuda" else "gloo"
            wait = datetime.timedelta(seconds=timeout)
            store, rank, size = next(dist.rendezvous("env://", timeout=wait))
            store = fresh_part(store, rank, size, timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def mean(self, x: Tensor) -> Tensor:
        """Average over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
            x /= self.size
        return x

    def from_first(self, mask: Tensor) -> Tensor:
        """What rank 0 holds, in place: ranks that prune different units would never agree again."""
        if self.size > 1:
            byte = mask.byte()
            dist.broadcast(byte, src=0)
            mask.copy_(byte)
        return mask

    def alike(self, x: Tensor) -> bool:
        """Whether x, integers of one shape everywhere, is the same on all ranks."""
        lowest, highest = x.clone(), x.clone()
        if self.size > 1:
            dist.all_reduce(lowest, dist.ReduceOp.MIN)
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        return torch.equal(lowest, highest)

    def check_weights(self, model: nn.Module, step: int) -> None:
        """Ranks with different weights would go on without a word, and train no model at all."""
        if self.size > 1 and not self.alike(fingerprint(model)):
            raise TrainingError(
                f"step {step}: the ranks hold different weights; --resume goes on from the last "
                "checkpoint. Should it happen again, a GPU or the network may be faulty"
            )

    # Optimizer state shared out (ZeRO-1, 1910.02054): each parameter has one rank that holds its
    # moments and updates it, and then sends the new weights to the others.

    def owners(self, model: nn.Module, shard: bool) -> dict[str, int]:
        """Parameter name -> the rank that updates it, in shares of about equal size; without
        `shard` every rank updates all of them.
        """
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        return share_out(sizes, self.size) if shard else dict.fromkeys(sizes, self.rank)

    def share_weights(self, model: nn.Module, owner: dict[str, int]) -> None:
        sent = [
            dist.broadcast(p.detach(), src=owner[name], async_op=True)
            for name, p in model.named_parameters()
        ]
        for handle in sent:
            handle.wait()

    def gather_moments(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, owner: dict[str, int], shard: bool
    ) -> dict[str, dict[str, Tensor]]:
        """Parameter name -> its AdamW state, complete on rank 0 (elsewhere what the rank has)."""
        moments = {
            name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state
        }
        for name, p in model.named_parameters() if shard else ():
            has = torch.tensor([name in moments], device=p.device, dtype=torch.uint8)
            dist.broadcast(has, src=owner[name])
            if not has:
                continue
            state = moments.get(name) or {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.empty_like(p),
                "exp_avg_sq": torch.empty_like(p),
            }
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = state[key].to(p.device)
                dist.broadcast(value, src=owner[name])
                state = state | {key: value}
            if self.rank == 0:
                moments[name] = {key: value.cpu() for key, value in state.items()}
        return moments


def fresh_part(store: dist.Store, rank: int, size: int, timeout: int) -> dist.Store:
    """A part of the store that no earlier start of these ranks has written to.

    torchrun --max-restarts keeps the store, and in it the addresses of ranks that died; its count
    of restarts differs between nodes. So rank 0 makes up a name, and tells it to whoever has asked:
    one that has died does not answer, and the one that starts in its place asks anew.
    """
    name, until = uuid.uuid4().hex, time.monotonic() + timeout
    if rank > 0:
        store.set(f"rank {rank}", name)
        name = store.get(name).decode()  # waits for rank 0
        store.set(f"{name} has rank {rank}", "")
    else:
        for other in range(1, size):
            while not store.check([f"{name} has rank {other}"]):
                if store.check([f"rank {other}"]):
                    store.set(store.get(f"rank {other}").decode(), name)
                if time.monotonic() > until:
                    raise RuntimeError(f"timeout: rank {other} did not come in {timeout} seconds")
                time.sleep(0.02)
    return dist.PrefixStore(name, store)


def share_out(sizes: dict[str, int], n: int) -> dict[str, int]:
    """Name -> which of n gets it: the largest first, each to the one that has least."""
    owner, load = {}, [0] * n
    for name, size in sorted(sizes.items(), key=lambda pair: -pair[1]):
        owner[name] = load.index(min(load))
        load[owner[name]] += size
    return owner


def fingerprint(model: nn.Module) -> Tensor:
    """int64: the shape of every weight, and the sum over its bits, each times its place."""
    parts = []
    for p in model.parameters():
        bits = p.detach().contiguous().view(torch.int32).flatten().long()
        places = torch.arange(1, len(bits) + 1, device=p.device)
        parts += [torch.tensor(p.shape, device=p.device), (bits * places).sum().view(1)]
    return torch.cat(parts)


@contextlib.contextmanager
def explain_memory(micro_batch: int, share: int):
    """Say which micro batch to try when one of `micro_batch` of a rank's sequences does not fit."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in FULL):
            raise
        smaller = [n for n in range(1, micro_batch // 2 + 1) if share % n == 0]
        way = f"--micro_batch_size={smaller[-1]}" if smaller else "a shorter --context_length"
        message = f"out of memory with micro batches of {micro_batch} sequences; try {way}"
        raise TrainingError(message) from error


FULL = ("out of memory", "not enough memory", "allocate memory")
LOST = ("closed by peer", "reset by peer", "Broken pipe", "imed out", "timeout", "NCCL", "gloo")


def another_rank_died(error: RuntimeError) -> bool:
    """Whether this is how the backend says that a rank no longer answers."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return several and any(words in str(error) for words in LOST)


class Stop:
    """SIGINT, SIGTERM or SIGUSR1 (the warning of a batch system) asks for a stop at the step's end;
    a second one ends the process at once.
    """

    def __init__(self):
        self.signal, self.before = 0, {}

    def __enter__(self) -> "Stop":
        return self

    def listen(self) -> None:
        """From here on; before, while ranks may wait for one that has died, a signal just ends."""
        asked = [getattr(signal, s) for s in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, s)]
        self.before = {s: signal.signal(s, self.ask) for s in asked}

    def ask(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
