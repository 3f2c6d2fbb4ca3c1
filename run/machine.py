"""What a run computes on: device, precision, compiling; what ends it: errors, signals to stop."""

import ctypes
import os
import platform
import shutil
import signal
import sys
from collections.abc import Callable, Container
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import DataError
from model import GPT
from run import UserError
from run.config import Config, micro_batch
from schedule import make_schedule


def choose_device(c: Config) -> torch.device:
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    kind = c.device if c.device != "auto" else next(k for k, there in available.items() if there)
    if not available[kind]:
        raise UserError(f"device={c.device!r}: this torch finds none; try --device=auto")
    if kind == "cuda":
        here, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if here >= gpus:
            raise UserError(f"device={c.device!r}: local rank {here}, but {gpus} GPUs are here")
        torch.cuda.set_device(here)
        torch.set_float32_matmul_precision("high")  # TF32 for what is not in a lower precision
    return torch.device(kind)


def memory(device: torch.device) -> int:
    """Bytes of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def choose_dtype(c: Config, device: torch.device) -> torch.dtype:
    """Of the matrix products; weights, moments and scores are float32 whatever it is."""
    if c.dtype != "auto":
        return getattr(torch, c.dtype)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability()[0] >= 8  # Ampere
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        native = native and device.type == "cpu"
    return torch.bfloat16 if native else torch.float32


def choose_compile(c: Config, device: torch.device, flops: float) -> bool:
    """Whether to compile. On a CPU, "auto" compiles only runs of more than 3e13 FLOPs: compiling
    takes ten seconds and makes steps 1.1 to 1.3 times faster (two cores, d_model 64 and 256). Not
    where KV heads are pruned: with a varying number of heads, compiled steps are slower there.
    """
    has_compiler = any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))
    if c.compile == "on" and device.type == "cpu" and not has_compiler:
        raise UserError("compile='on': needs g++ or clang++ on a CPU; or give --compile=off")
    if c.compile != "auto":
        return c.compile == "on"
    pays = has_compiler and flops > 3e13 and "n_kv_head" not in make_schedule(c).widths
    return device.type == "cuda" or (device.type == "cpu" and pays)


def compile_blocks(model: GPT, kinds: Container[str]) -> Callable:
    """The model's forward pass with compiled blocks. One graph serves all blocks, which are alike,
    and all widths of these kinds above 1, so a prune does not compile anything again.

    Only training is compiled: in eval mode, where batches have other shapes, blocks stay as they
    are.
    """
    torch._dynamo.config.force_parameter_static_shapes = False
    torch._dynamo.config.force_nn_module_property_static_shapes = False

    def switched(block: torch.nn.Module) -> Callable:
        eager, compiled = block.forward, torch.compile(block.forward)

        def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            if "d_model" in kinds:
                torch._dynamo.maybe_mark_dynamic(x, 2)
            return (compiled if block.training else eager)(x, cos, sin)

        return forward

    for block in model.blocks:
        block.forward = switched(block)

    def forward(tokens: Tensor, targets: Tensor) -> Tensor:
        for group in model.groups():  # each time: a prune makes new parameters
            for name, dim in (group.slices or ()) if group.kind in kinds else ():
                torch._dynamo.maybe_mark_dynamic(model.get_parameter(name), dim)
        return model(tokens, targets)

    return forward


def recompute_blocks(model: GPT) -> None:
    """Gradient checkpointing: a step keeps only the input of each block, and the backward pass
    computes the block again. Call it after compile_blocks."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def describe(device: torch.device, ranks: int, dtype: str, compiled: bool) -> str:
    way = "compiled" if compiled else "eager"
    return f"{device.type}, ranks: {ranks}, CPU threads: {torch.get_num_threads()}, {dtype}, {way}"


def keep_memory() -> None:
    """Have the C library keep what is freed for the next step, where it is glibc.

    By default it returns every large tensor to the system and gets it back page by page, which is a
    third of a step at small shapes (mallopt(3): M_MMAP_MAX, M_TRIM_THRESHOLD).
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # no allocation by mmap
        mallopt(-1, -1)  # no return of the heap's end


FULL = ("out of memory", "not enough memory", "allocate memory")
LOST = ("closed by peer", "reset by peer", "Broken pipe", "imed out", "timeout", "NCCL", "gloo")


def describe_error(error: Exception, c: Config | None) -> tuple[str, int] | None:
    """A line for a person and the exit code; None if the error is a bug."""
    words, ranks = " ".join(str(error).split()), int(os.environ.get("WORLD_SIZE", 1))
    if isinstance(error, (UserError, DataError)):
        return words, getattr(error, "code", 2)
    if c and (isinstance(error, MemoryError) or any(part in words for part in FULL)):
        now = micro_batch(c, ranks)
        smaller = [n for n in range(1, now // 2 + 1) if now % n == 0]
        way = f"--micro_batch_size={smaller[-1]}" if smaller else "a shorter --context_length"
        return f"out of memory with micro batches of {now} sequences; try {way}", 1
    if isinstance(error, OSError):
        return words, 1
    if ranks > 1 and any(part in words for part in LOST):
        way = "--resume goes on from the last checkpoint"
        return f"another rank no longer answers; {way} ({words})", 1
    return None


def print_error(error: Exception, c: Config | None) -> int:
    """Print an error in one line, above a progress bar, and return the exit code; 0 if it is a bug.
    An error in the config is the same on every rank, so only rank 0 prints it."""
    line, code = describe_error(error, c) or ("", 0)
    rank = int(os.environ.get("RANK", 0))
    if code and (rank == 0 or c):
        tqdm.write(f"{f'rank {rank}: ' if rank else ''}error: {line}", file=sys.stderr)
    return code


class Stop:
    """SIGINT, SIGTERM or SIGUSR1 (the warning of a batch system) asks for a stop at the step's end;
    a second one ends the process at once.
    """

    def __init__(self):
        self.signal, self.before = 0, {}

    def __enter__(self) -> "Stop":
        return self

    def listen(self) -> None:
        """Catch signals from now on. Until now a signal ends the process, which may be waiting for
        a rank that has died."""
        asked = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self.before = {s: signal.signal(s, self.ask) for s in asked}

    def ask(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
