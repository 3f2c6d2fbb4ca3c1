"""What a run computes on: device, precision, the ranks that train together, signals to stop."""

import os
import shutil
import signal
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from config import Config, ConfigError


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
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
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
    if c.compile != "auto":
        return c.compile == "on"
    has_compiler = shutil.which("g++") is not None
    on_cpu = device.type == "cpu" and has_compiler and flops_per_shape > 3e13
    return device.type == "cuda" or on_cpu


class Ranks:
    """The processes that train together: one, unless torchrun started more."""

    def __init__(self, device: torch.device):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

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


class Stop:
    """SIGINT, SIGTERM or SIGUSR1 (the warning of a batch system) asks for a stop at the step's end;
    a second one ends the process at once.
    """

    def __init__(self):
        self.signal = 0

    def __enter__(self) -> "Stop":
        asked = [getattr(signal, s) for s in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, s)]
        self.before = {s: signal.signal(s, self.ask) for s in asked}
        return self

    def ask(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
