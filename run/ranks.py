"""The processes that train together, and how they agree."""

import datetime
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from run import UserError
from run.config import PATHS, Config

WAIT = datetime.timedelta(minutes=30)  # for another rank: a save or a validation may take long
FIRST_WAIT = datetime.timedelta(minutes=2)  # for the first sum, when all ranks are there
ABORT = datetime.timedelta(minutes=3)  # after so long, torch itself gives the first sum up


class Ranks:
    """The processes that train together: one, unless torchrun started more. Where one of them dies,
    the others end within half an hour at the latest: with gloo by a RuntimeError, with NCCL by its
    watchdog, which aborts the process. Raises UserError where torchrun's variables are missing, or
    the ranks find each other but get no answer."""

    def __init__(self, device: torch.device):
        self.device = device
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.launched = "WORLD_SIZE" in os.environ  # by torchrun; also where it starts one process
        if not self.launched:
            return
        # Import this before the group exists. Otherwise it keeps the group, and gloo's threads,
        # until the interpreter ends, and may crash it
        from torch.distributed import nn as late  # noqa: F401

        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=WAIT))
        except ValueError as error:  # WORLD_SIZE alone is set
            raise UserError(f"{error}; torchrun sets all that ranks need") from error
        # torchrun keeps its store when it starts dead ranks again, with their old addresses
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=ABORT)
        try:
            dist.all_reduce(torch.zeros(1, device=device), async_op=True).wait(FIRST_WAIT)
            dist.distributed_c10d._set_pg_timeout(WAIT)
        except RuntimeError as error:  # or a hang between GPUs would last half an hour
            what = f"found the other ranks, but a first sum with them failed ({error})"
            way = "between GPUs, try NCCL_P2P_DISABLE=1, or between machines NCCL_IB_DISABLE=1"
            raise UserError(f"{what}; {way} in the environment", 1) from error

    def agree(self, mask: Tensor) -> Tensor:
        """Overwrite the mask with that of rank 0."""
        if self.launched:
            dist.broadcast(mask, src=0)
        return mask

    def mean(self, x: Tensor) -> Tensor:
        """The average of x over the ranks."""
        if self.launched:
            x = x.to(self.device)  # NCCL averages on the GPU only
            dist.all_reduce(x)
            x /= self.size
        return x

    def means(self, *numbers: Tensor | float) -> list[float]:
        """The average of each number over the ranks, with one wait for the device."""
        x = [n if isinstance(n, Tensor) else torch.full((), n, device=self.device) for n in numbers]
        return self.mean(torch.stack(x)).tolist()

    def check_same(self, model: nn.Module) -> None:
        """Raises UserError where the ranks hold different weights."""
        bits = [p.detach().contiguous().view(torch.int32).sum() for p in model.parameters()]
        if self.differ(torch.stack(bits).tolist()):
            what = "the ranks hold different weights; --resume goes on from the last checkpoint. "
            raise UserError(what + "Should it happen again, a GPU or the network may be faulty", 1)

    def differ(self, x: list) -> list:
        """The entries of x that are not the same on all ranks. Waits for all of them."""
        everyone = [x] * self.size
        if self.launched:
            dist.all_gather_object(everyone, x)
        return [mine for mine, *others in zip(x, *everyone) if others != [mine] * self.size]

    def check_start(self, c: Config, steps: int, digests: dict[str, str]) -> None:
        """Raises UserError where the ranks would not do the same run. steps: those done before."""
        same = {k: v for k, v in vars(c).items() if k not in PATHS}  # paths may differ by machine
        for name, value in self.differ([("step", steps), *digests.items(), *same.items()]):
            way = "give all of them one command, and out_dir, data and teacher that they share"
            raise UserError(f"{name}={value!r} on this rank, another elsewhere; {way}", 1)
