"""The processes that train together, and how they agree."""

import datetime
import os
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from run import UserError


class Ranks:
    """The processes that train together: one, unless torchrun started more.

    Where one of them dies, the others raise a RuntimeError, within half an hour at the latest.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1:
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
        """Average over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
            x /= self.size
        return x

    def means(self, *numbers: Tensor | float) -> list[float]:
        """The average of each number over the ranks, with one wait for the device."""
        full = partial(torch.full, (), dtype=torch.float32, device=self.device)
        x = torch.stack([n if isinstance(n, Tensor) else full(n) for n in numbers])
        return self.mean(x).tolist()

    def mean_gradients(self, model: nn.Module) -> None:
        """Data parallelism: every rank goes on with the mean of all ranks' gradients."""
        if self.size > 1:
            gradients = [p.grad for p in model.parameters()]
            # Together: one by one, small ones are slow. 32: all would need twice the memory
            for i in range(0, len(gradients), 32):
                some = gradients[i : i + 32]
                vector_to_parameters(self.mean(parameters_to_vector(some)), some)

    def from_first(self, mask: Tensor) -> Tensor:
        """Overwrite the mask with that of rank 0, so that all ranks prune the same units."""
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

    def check_start(self, steps: int) -> None:
        """Raises UserError if ranks have done different numbers of steps. Waits for all ranks."""
        if not self.alike(torch.tensor(steps, device=self.device)):
            way = "give all of them one out_dir, on a disk that they share"
            raise UserError(f"this rank starts after step {steps}, another elsewhere; {way}", 1)

    def check(self, model: nn.Module) -> None:
        """Raises UserError if the ranks' weights differ: they would train no model at all."""
        bits = [p.detach().contiguous().view(torch.int32).sum() for p in model.parameters()]
        if self.size > 1 and not self.alike(torch.stack(bits)):
            way = "--resume goes on from the last checkpoint"
            cause = "Should it happen again, a GPU or the network may be faulty"
            raise UserError(f"the ranks hold different weights; {way}. {cause}", 1)


def leave_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
