"""The model as a training step calls it: compiled, recomputed, under torchrun in DDP."""

import logging
import os
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from textwrap import shorten

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from model import GPT, SLICES
from prune import Slice
from run.config import Config, micro_batch
from run.cost import Plan
from run.machine import NO_MEMORY, Machine

# What costs more to compute again than to keep: matrix products, and attention in any kernel
KERNELS = "flash_attention", "cudnn_attention", "efficient_attention", "flash_attention_for_cpu"
PRODUCTS = ["mm", "bmm", *(f"_scaled_dot_product_{kernel}" for kernel in KERNELS)]


class Forward:
    """forward(tokens, targets): the loss of a micro batch; its backward pass adds to the gradients
    of a step. `compiled`: whether the model is. Raises UserError as `wrap` does."""

    def __init__(self, model: GPT, c: Config, plan: Plan, machine: Machine):
        self.model, self.wrapped, self.machine = model, model, machine
        self.micro_batch_size, self.context_length = micro_batch(c, machine.ranks), c.context_length
        self.compiled = choose_compile(c, machine.device, plan)
        if c.recompute != "none":  # keep the inputs of blocks only (gradient checkpointing)
            how = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is drawn in them
            if c.recompute == "cheap":  # and products
                keep = [getattr(torch.ops.aten, name).default for name in PRODUCTS]
                how["context_fn"] = partial(create_selective_checkpoint_contexts, keep)
                logging.getLogger("torch._higher_order_ops.wrap").setLevel("ERROR")  # a false alarm
            for block in model.blocks:
                block.forward = partial(checkpoint, block.forward, **how)
        if self.compiled:  # around what is recomputed, so that one graph holds both
            compile_training(model, plan.schedule.widths)
            self.try_compiled()
        self.wrap()

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens, targets: as model.GPT takes them. Returns the mean loss, a float32 scalar."""
        with self.machine.autocast():
            return self.wrapped(tokens, targets)

    def averaging(self, now: bool) -> AbstractContextManager:
        """In it, a forward and backward pass averages the gradients over the ranks only if `now`:
        for all micro batches but the last of a step, they just add up."""
        return nullcontext() if now or not self.machine.launched else self.wrapped.no_sync()

    @contextmanager
    def unwrapped(self) -> Iterator[None]:
        """Prune in it: DDP would keep the old parameters, and its buckets their gradients."""
        self.wrapped = self.model
        self.model.zero_grad()
        yield
        self.wrap()

    def wrap(self) -> None:
        """Under torchrun, put the parameters of now into a new DistributedDataParallel. After its
        first backward pass it sorts its buckets by the order in which gradients came. Two empty
        passes have that done before any step counts, so the first step after a resume adds the
        ranks' gradients in the usual order. Raises UserError where ranks hold different weights."""
        if not self.machine.launched:
            return
        self.machine.check_same(self.model)
        self.model._ddp_params_and_buffers_to_ignore = ["cos", "sin"]  # no rank changes these
        how = {"gradient_as_bucket_view": True, "init_sync": False}  # all ranks have one model
        self.wrapped = DistributedDataParallel(self.model, **how)
        for _ in range(2):  # it sorts between the two, while its buckets hold no gradient
            self.model.zero_grad()
            self.empty_pass()
        # Zeros, not None: DDP multiplies a gradient that is new in its buckets by 1 / ranks, but
        # divides one that lies there, as in all later steps, and the two round differently
        self.model.zero_grad(set_to_none=False)

    def empty_pass(self) -> None:
        """Forward and backward with a loss of 0, for what torch does in its first pass."""
        shape = self.micro_batch_size, self.context_length
        tokens = torch.zeros(shape, dtype=torch.long, device=self.machine.device)
        (0 * self(tokens, tokens)).backward()

    def try_compiled(self) -> None:
        """Try compiled blocks. If that fails on any rank, all become eager, and rank 0 says why."""
        reason = ""
        try:
            self.empty_pass()
        except Exception as error:  # whatever Dynamo, Inductor, Triton or a compiler leads to
            if isinstance(error, NO_MEMORY):
                raise
            reason = f"{type(error).__name__}: {error}"
        self.model.zero_grad()
        (failed,) = self.machine.average_numbers(float(bool(reason)))
        self.compiled = self.model.compiled = failed == 0
        if failed and self.machine.rank == 0:
            why = shorten(reason or "on another rank", 200)
            print(f"compiling failed, so the run goes on without it: {why}", file=sys.stderr)


def choose_compile(c: Config, device: torch.device, plan: Plan) -> bool:
    """Whether to compile. On a CPU, "auto" compiles only runs of more than 3e13 FLOPs: it takes
    ten seconds and makes steps 1.1 to 1.3 times faster (two cores, d_model 64 and 256), but slower
    where KV heads are pruned. On Windows, which seldom has a compiler, it compiles no run."""
    worth = plan.flops() > 3e13 and "n_kv_head" not in plan.schedule.widths
    pays = device.type == "cuda" or (device.type == "cpu" and worth)
    return c.compile == "on" or (c.compile == "auto" and pays and os.name != "nt")


def compile_training(model: GPT, kinds: Container[str]) -> None:
    """Compile the blocks and the head for training. One graph serves all blocks, as Dynamo looks it
    up by their code, which they share. Each graph serves all widths of these kinds above 1, so a
    prune compiles nothing. In eval mode, where batches have other shapes, the model is eager."""
    torch._dynamo.config.force_parameter_static_shapes = False
    torch._dynamo.config.force_nn_module_property_static_shapes = False
    torch._dynamo.config.optimize_ddp = False  # it would cut the graph where DDP's buckets end

    def switched(module: nn.Module, eager: Callable, slices: list[Slice]) -> Callable:
        compiled = torch.compile(eager)

        def forward(x: Tensor, *others: Tensor) -> Tensor:
            if not (model.compiled and module.training):
                return eager(x, *others)
            for s in slices:  # each time: a prune makes new parameters
                torch._dynamo.maybe_mark_dynamic(module.get_parameter(s.name), s.dim)
            if "d_model" in kinds:
                torch._dynamo.maybe_mark_dynamic(x, 2)
            return compiled(x, *others)

        return forward

    model.compiled = True
    in_block = [s for kind in SLICES if kind in kinds for s in SLICES[kind]]
    for block in model.blocks:
        block.forward = switched(block, block.forward, in_block)
    in_head = [Slice("norm.weight", 0), Slice("unembed.weight", 1)] if "d_model" in kinds else []
    model.head = switched(model, model.head, in_head)
