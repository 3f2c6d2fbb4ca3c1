"""What a run computes on, and how: device, precision, compiled or not, recomputed or not."""

import ctypes
import os
import platform
import shutil
from collections.abc import Callable, Container
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model import GPT
from run import UserError
from run.config import Config
from schedule import make_schedule


def choose_device(c: Config) -> torch.device:
    """The device, set up so that training on it is fast. Raises UserError where it is not there."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    found["cpu"] = True
    kind = next(kind for kind in found if found[kind]) if c.device == "auto" else c.device
    if not found[kind]:
        raise UserError(f"device={c.device!r}: this torch finds none; try --device=auto")
    if kind == "cuda":
        here, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if here >= gpus:
            raise UserError(f"device={c.device!r}: local rank {here}, but {gpus} GPUs are here")
        torch.cuda.set_device(here)
        torch.set_float32_matmul_precision("high")  # TF32 for what is not in a lower precision
    if kind == "cpu":
        keep_memory()
    return torch.device(kind)


def keep_memory() -> None:
    """Have the C library keep what is freed for the next step, where it is glibc.

    By default it returns every large tensor to the system and gets it back page by page, which is a
    third of a step at small shapes (mallopt(3): M_MMAP_MAX, M_TRIM_THRESHOLD).
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # no allocation by mmap
        mallopt(-1, -1)  # no return of the heap's end


def send(x: Tensor, device: torch.device) -> Tensor:
    """x, from the CPU, on the device. The CPU does not wait: a copy from pinned memory goes on
    while the next work is prepared."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def installed_memory(device: torch.device) -> int:
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
    names = ["gcc", "clang"] if device.type == "cuda" else ["g++", "clang++"]
    variable = "CC" if device.type == "cuda" else "CXX"
    has_compiler = any(map(shutil.which, (os.environ.get(variable, names[0]), *names)))
    if c.compile == "on" and not has_compiler:
        needed = " or ".join(names)
        raise UserError(f"compile='on': needs {needed}, or {variable} set; or give --compile=off")
    if c.compile != "auto":
        return c.compile == "on"
    pays = flops > 3e13 and "n_kv_head" not in make_schedule(c).widths
    return has_compiler and (device.type == "cuda" or (device.type == "cpu" and pays))


def compile_blocks(model: GPT, kinds: Container[str]) -> None:
    """Compile the blocks for training. One graph serves all blocks, which are alike, and all widths
    of these kinds above 1, so a prune does not compile anything again.

    In eval mode, where batches have other shapes, blocks stay as they are.
    """
    torch._dynamo.config.force_parameter_static_shapes = False
    torch._dynamo.config.force_nn_module_property_static_shapes = False
    torch._dynamo.config.optimize_ddp = False  # it would cut the graph where DDP's buckets end

    def switched(block: torch.nn.Module) -> Callable:
        eager, compiled = block.forward, torch.compile(block.forward)

        def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            if "d_model" in kinds:
                torch._dynamo.maybe_mark_dynamic(x, 2)
            return (compiled if block.training else eager)(x, cos, sin)

        return forward

    for block in model.blocks:
        block.forward = switched(block)

    def mark_widths(model: GPT, _) -> None:  # each time: a prune makes new parameters
        for group in model.groups() if model.training else ():
            for name, dim in (group.slices or ()) if group.kind in kinds else ():
                torch._dynamo.maybe_mark_dynamic(model.get_parameter(name), dim)

    model.register_forward_pre_hook(mark_widths)


def recompute_blocks(model: GPT) -> None:
    """Gradient checkpointing: a step keeps only the input of each block, and the backward pass
    computes the block again. Call it after compile_blocks."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def describe(device: torch.device, ranks: int, dtype: str, compiled: bool) -> str:
    way = "compiled" if compiled else "eager"
    return f"{device.type}, ranks: {ranks}, CPU threads: {torch.get_num_threads()}, {dtype}, {way}"
