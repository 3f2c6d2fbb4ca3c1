"""What a run computes on, and how: device, precision, compiled or not, recomputed or not."""

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Container
from functools import partial
from textwrap import shorten

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model import GPT, SLICES
from run import UserError
from run.config import Config, micro_batch
from run.cost import Plan, knobs_that_fit, memory_of
from run.errors import out_of_memory
from run.ranks import Ranks


def choose_device(c: Config) -> torch.device:
    """The device, set up so that training on it is fast. Raises UserError where it is not there, or
    cannot compute what the run needs."""
    found = {"cpu": True, "cuda": torch.cuda.is_available()}
    found["mps"] = torch.backends.mps.is_available()
    kind = ("cuda" if found["cuda"] else "cpu") if c.device == "auto" else c.device
    if not found[kind]:
        raise UserError(f"device={c.device!r}: this torch finds none; try --device=auto")
    # It has no float64, and with bfloat16 its attention sees later tokens (pytorch issue 195910)
    if kind == "mps" and ("WORLD_SIZE" in os.environ or c.dtype == "bfloat16"):
        raise UserError("device='mps': works without torchrun, and in float32 only")
    if kind == "cuda":
        here, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if here >= gpus:
            raise UserError(f"device={c.device!r}: local rank {here}, but {gpus} GPUs are here")
        torch.cuda.set_device(here)
        torch.set_float32_matmul_precision("high")  # TF32 for what is not in a lower precision
        try_product()
    if kind == "cpu":
        keep_memory()
    return torch.device(kind)


def try_product() -> None:
    """Raises UserError where the GPU does not multiply: not every torch has kernels for each."""
    try:
        x = torch.ones(2, 2, device="cuda")
        (x @ x).tolist()  # waits for the GPU
    except RuntimeError as error:
        card = torch.cuda.get_device_name()
        what = f"does not compute with torch {torch.__version__} ({shorten(str(error), 100)})"
        way = "pytorch.org/get-started/locally has the builds of torch, for other GPUs and drivers"
        raise UserError(f"{card}: {what}; {way}") from error


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
    """Of the matrix products; weights, moments and scores are float32 whatever it is."""
    if c.dtype != "auto":
        return getattr(torch, c.dtype)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability()[0] >= 8  # Ampere
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        native = native and device.type == "cpu"
    return torch.bfloat16 if native else torch.float32


def choose_compile(c: Config, device: torch.device, plan: Plan) -> bool:
    """Whether to compile. On a CPU, "auto" compiles only runs of more than 3e13 FLOPs: compiling
    takes ten seconds and makes steps 1.1 to 1.3 times faster (two cores, d_model 64 and 256). Not
    where KV heads are pruned: with a varying number of heads, compiled steps are slower there. Nor
    on Windows, where the compiler that Inductor calls is seldom installed."""
    long = plan.flops() > 3e13 and "n_kv_head" not in plan.schedule.widths
    pays = device.type == "cuda" or (device.type == "cpu" and long)
    return c.compile == "on" or (c.compile == "auto" and pays and os.name != "nt")


def compile_blocks(model: GPT, kinds: Container[str]) -> None:
    """Compile the blocks for training. One graph serves all blocks, which are alike, and all widths
    of these kinds above 1, so a prune does not compile anything again.

    In eval mode, where batches have other shapes, blocks stay as they are.
    """
    torch._dynamo.config.force_parameter_static_shapes = False
    torch._dynamo.config.force_nn_module_property_static_shapes = False
    torch._dynamo.config.optimize_ddp = False  # it would cut the graph where DDP's buckets end
    slices = [(name, dim) for kind in SLICES if kind in kinds for name, dim in SLICES[kind]]

    def switched(block: torch.nn.Module) -> Callable:
        eager, compiled = block.forward, torch.compile(block.forward)

        def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            if not (model.compiled and block.training):
                return eager(x, cos, sin)
            for name, dim in slices:  # each time: a prune makes new parameters
                torch._dynamo.maybe_mark_dynamic(block.get_submodule(name).weight, dim)
            if "d_model" in kinds:
                torch._dynamo.maybe_mark_dynamic(x, 2)
            return compiled(x, cos, sin)

        return forward

    model.compiled = True
    for block in model.blocks:
        block.forward = switched(block)


def keep_compiled(model: GPT, one_pass: Callable[[GPT], None], ranks: Ranks) -> bool:
    """Whether one pass, forward and backward, works with compiled blocks on all ranks. If not,
    blocks become eager everywhere, and rank 0 says why. Gradients are dropped."""
    reason = ""
    try:
        one_pass(model)
    except Exception as error:  # whatever Dynamo, Inductor, Triton or a compiler leads to
        if out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}"
    model.zero_grad()
    (failed,) = ranks.means(float(bool(reason)))
    model.compiled = failed == 0
    if failed and ranks.rank == 0:
        why = shorten(reason or "on another rank", 200)
        print(f"compiling failed, so the run goes on without it: {why}", file=sys.stderr)
    return model.compiled


def recompute_blocks(model: GPT) -> None:
    """Gradient checkpointing: a step keeps only the input of each block, and the backward pass
    computes the block again. Call it after compile_blocks."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def describe(device: torch.device, ranks: int, dtype: str, compiled: bool) -> str:
    way = "compiled" if compiled else "eager"
    return f"{device.type}, ranks: {ranks}, CPU threads: {torch.get_num_threads()}, {dtype}, {way}"
