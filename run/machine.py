"""What a run computes on: device, precision and memory."""

import ctypes
import os
import platform
from textwrap import shorten

import torch
from torch import Tensor

from run import UserError
from run.config import Config, micro_batch, need
from run.cost import Plan, knobs_that_fit, memory_of


class Machine:
    """Device and precision. Raises UserError where the device is missing or cannot do the work."""

    def __init__(self, c: Config):
        self.device = choose_device(c)
        self.dtype = choose_dtype(c, self.device)
        self.dtype_name = str(self.dtype).removeprefix("torch.")

    def autocast(self) -> torch.autocast:
        """In it, matrix products have the run's precision. Weights and moments are float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def send(self, x: Tensor) -> Tensor:
        """x, from the CPU, on the device. The CPU does not wait: a copy from pinned memory goes on
        while the next work is prepared."""
        x = x.pin_memory() if self.device.type == "cuda" else x
        return x.to(self.device, non_blocking=True)

    def describe(self, ranks: int, compiled: bool) -> str:
        what = f"{self.device.type}, ranks: {ranks}, CPU threads: {torch.get_num_threads()}"
        return f"{what}, {self.dtype_name}, {'compiled' if compiled else 'eager'}"


def choose_device(c: Config) -> torch.device:
    """The device, set up so that training on it is fast. Raises UserError as Machine does."""
    found = {"cpu": True, "cuda": torch.cuda.is_available()}
    found["mps"] = torch.backends.mps.is_available()
    kind = ("cuda" if found["cuda"] else "cpu") if c.device == "auto" else c.device
    need(found[kind], c, "device", "this torch finds none; try --device=auto")
    # It has no float64, and with bfloat16 its attention sees later tokens (pytorch issue 195910)
    if kind == "mps" and ("WORLD_SIZE" in os.environ or c.dtype == "bfloat16"):
        raise UserError("device='mps': works without torchrun, and in float32 only")
    if kind == "cuda":
        here, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        need(here < gpus, c, "device", f"local rank {here}, but {gpus} GPUs are here")
        torch.cuda.set_device(here)
        torch.set_float32_matmul_precision("high")  # TF32 for what is not in a lower precision
        try_product()
    if kind == "cpu":
        keep_memory()
    return torch.device(kind)


def try_product() -> None:
    """Raises UserError where the GPU does not multiply: not every torch has kernels for each."""
    try:
        torch.ones(2, 2, device="cuda").matrix_power(2).tolist()  # waits for the GPU
    except RuntimeError as error:
        what = f"does not compute with torch {torch.__version__} ({shorten(str(error), 100)})"
        way = "pytorch.org/get-started/locally has the builds of torch, for other GPUs and drivers"
        raise UserError(f"{torch.cuda.get_device_name()}: {what}; {way}") from error


def keep_memory() -> None:
    """Have the C library keep what is freed for the next step, where it is glibc. By default it
    returns every large tensor to the system and gets it back page by page, which is a third of a
    step at small shapes (mallopt(3): M_MMAP_MAX, M_TRIM_THRESHOLD)."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # no allocation by mmap
        mallopt(-1, -1)  # no return of the heap's end


def check_memory(c: Config, plan: Plan, device: torch.device, ranks: int) -> None:
    """Refuse what cannot fit into the free memory of the GPU, or the memory of the machine, even if
    a compiled model keeps half of the activations that `memory_of` counts. Raises UserError."""
    if device.type == "cuda":  # what this process holds is free for it
        memory = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    else:
        try:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            memory //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # the ranks here share it
        except (AttributeError, ValueError):  # not every system has it, or knows these names
            return
    rows = micro_batch(c, ranks)
    planned = memory_of(c, plan.enlarged, rows, plan.teacher)
    need = planned["state"] + planned["activations"] / 2
    if need > memory:
        what = f"needs at least {need / 2**30:,.1f} GiB a rank with micro_batch_size={rows}"
        way = knobs_that_fit(c, plan.enlarged, plan.teacher, memory, ranks) or "a smaller model"
        raise UserError(f"the run {what}; {device.type} has {memory / 2**30:,.1f}; try {way}")


def choose_dtype(c: Config, device: torch.device) -> torch.dtype:
    """The precision of the matrix products. "auto": bfloat16 where the hardware multiplies it."""
    if c.dtype != "auto":
        return getattr(torch, c.dtype)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability()[0] >= 8  # Ampere
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        native = native and device.type == "cpu"
    return torch.bfloat16 if native else torch.float32
