"""The processes that train together, and how they agree."""

import datetime
import hashlib
import os
import warnings
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from run import UserError


class Ranks:
    """The processes that train together: one, unless torchrun started more.

    Where one of them dies, the others end within half an hour at the latest: with gloo by a
    RuntimeError, with NCCL by its watchdog, which aborts the process.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.launched = "WORLD_SIZE" in os.environ  # by torchrun; also where it starts one process
        if self.launched:
            # Import this before the group exists. Otherwise it keeps the group, and gloo's threads,
            # until the interpreter ends, and may crash it
            from torch.distributed import nn as late  # noqa: F401

            backend = "nccl" if device.type == "cuda" else "gloo"
            wait = datetime.timedelta(minutes=30)
            try:
                store, rank, size = next(dist.rendezvous("env://", timeout=wait))
            except ValueError as error:  # WORLD_SIZE alone is set
                raise UserError(f"{error}; torchrun sets all that ranks need") from error
            # torchrun keeps its store when it starts dead ranks again, with their old addresses
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"attempt {attempt}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)

    def mean(self, x: Tensor) -> Tensor:
        """The average of x over the ranks."""
        if self.launched:
            x = x.to(self.device)  # NCCL averages on the GPU only
            dist.all_reduce(x)
            x /= self.size
        return x

    def means(self, *numbers: Tensor | float) -> list[float]:
        """The average of each number over the ranks, with one wait for the device."""
        full = partial(torch.full, (), dtype=torch.float32, device=self.device)
        x = torch.stack([n if isinstance(n, Tensor) else full(n) for n in numbers])
        return self.mean(x).tolist()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model; under torchrun, in a DistributedDataParallel, whose backward pass averages the
        gradients over the ranks. Wrap it anew after a prune: DDP holds the parameters of now.

        A resumed run must add the ranks' numbers in the same order. So DDP may not sort its buckets
        anew after the first step, which it does unless it looks for unused parameters. And all
        gradients lie in the buckets from the first step on, as DDP rounds where it copies one in.
        """
        if not self.launched:
            return model
        model.zero_grad()  # frees the old buckets
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        with warnings.catch_warnings():  # torch 2.13 has another name for broadcast_buffers
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                model,
                broadcast_buffers=False,  # the model's buffers are constants
                init_sync=False,  # all ranks have the same weights: see check()
                gradient_as_bucket_view=True,
                find_unused_parameters=True,
            )

    def from_first(self, mask: Tensor) -> Tensor:
        """Overwrite the mask with that of rank 0, so that all ranks prune the same units."""
        if self.launched:
            byte = mask.byte()
            dist.broadcast(byte, src=0)
            mask.copy_(byte)
        return mask

    def alike(self, x: Tensor) -> bool:
        """Whether x, integers of one shape everywhere, is the same on all ranks."""
        lowest, highest = x.clone(), x.clone()
        if self.launched:
            dist.all_reduce(lowest, dist.ReduceOp.MIN)
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        return torch.equal(lowest, highest)

    def check_start(self, steps: int, settings: dict[str, object]) -> None:
        """Raises UserError if ranks have done different numbers of steps, or differ in a setting:
        they would train no model at all. Waits for all ranks."""
        if not self.alike(torch.tensor(steps, device=self.device)):
            way = "give all of them one out_dir, on a disk that they share"
            raise UserError(f"this rank starts after step {steps}, another elsewhere; {way}", 1)
        for name, value in settings.items():
            bits = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "big")
            if not self.alike(torch.tensor(bits, device=self.device)):
                way = "give all of them one command, the same data and the same teacher"
                raise UserError(f"{name}={value!r} on this rank, another elsewhere; {way}", 1)

    def check(self, model: nn.Module) -> None:
        """Raises UserError if the ranks' weights differ: they would train no model at all."""
        bits = [p.detach().contiguous().view(torch.int32).sum() for p in model.parameters()]
        if self.launched and not self.alike(torch.stack(bits)):
            way = "--resume goes on from the last checkpoint"
            cause = "Should it happen again, a GPU or the network may be faulty"
            raise UserError(f"the ranks hold different weights; {way}. {cause}", 1)


def leave_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
