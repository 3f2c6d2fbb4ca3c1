"""The optimizers of a run: AdamW, and Muon (Jordan et al., 2024) for matrices."""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from model import GPT
from run.config import Config

STACK = 2**26  # numbers, at most, of matrices that Muon multiplies together: 256 MiB in float32


def make_optimizers(model: GPT, c: Config, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters; or Muon for the matrices of the blocks and AdamW for the rest. Only
    matrices have weight decay. dtype: of Muon's products."""
    by_muon = [p for p in model.blocks.parameters() if p.dim() >= 2 and c.optimizer == "muon"]
    muon = set(by_muon)
    others = [p for p in model.parameters() if p not in muon]
    matrices, vectors = [p for p in others if p.dim() >= 2], [p for p in others if p.dim() < 2]
    lr, decay = c.learning_rate, c.weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(c.beta1, c.beta2), fused=True)
    dtype = torch.float32 if dtype == torch.float16 else dtype  # in it, a gradient may be 0
    return [Muon(by_muon, lr, decay, dtype), adamw] if by_muon else [adamw]


class Muon(torch.optim.Optimizer):
    """Makes all singular values of an update nearly equal, and scales it to the usual size of
    AdamW's (2502.16982), so that one learning rate fits both. torch.optim.Muon does the same with
    adjust_lr_fn="match_rms_adamw", but always in bfloat16, which a CPU without it emulates, many
    times slower. dtype: of the products alone. Ranks, whose gradients agree, share these out."""

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float, dtype: torch.dtype):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        lr, todo = group["lr"], list(stacks(group["params"]))
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # With four ranks and six stacks, 0 to 3 come first: rank 2 multiplies stack 2, while the
        # others multiply theirs, and gives them its product. Then come 4 and 5, by ranks 0 and 1
        for one_each in (todo[i : i + ranks] for i in range(0, len(todo), ranks)):
            for owner, params in enumerate(one_each):  # all keep the momentum, its owner multiplies
                ahead = self.average(params, group["momentum"])
                if owner == rank:
                    wide = [x if x.shape[0] <= x.shape[1] else x.mT for x in ahead]
                    product = orthogonalize(torch.stack(wide).to(self.dtype))
            for owner, params in enumerate(one_each):
                first, size = params[0], (len(params), *sorted(params[0].shape))
                x = product if owner == rank else first.new_empty(size, dtype=self.dtype)
                if ranks > 1:
                    dist.broadcast(x, owner)
                updates = [u if u.shape == p.shape else u.mT for u, p in zip(x.to(first), params)]
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                torch._foreach_add_(params, updates, alpha=-lr * 0.2 * math.sqrt(max(first.shape)))

    def average(self, params: list[Tensor], momentum: float) -> list[Tensor]:
        """Average the gradients over steps into the momentum, which all ranks hold whole, so rank 0
        can save it. Returns the averages after one more such step (Nesterov's momentum)."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients = [p.grad for p in params]
        averages = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        return torch._foreach_lerp(gradients, averages, momentum)


def stacks(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """The matrices in lists of one shape, or of it and its transpose: a product of many at once is
    faster than one after another. A list of two or more holds at most STACK numbers."""
    alike: dict[tuple, list[Tensor]] = {}
    for x in matrices:
        alike.setdefault(tuple(sorted(x.shape)), []).append(x)
    for some in alike.values():
        n = max(1, STACK // some[0].numel())
        yield from (some[i : i + n] for i in range(0, len(some), n))


def orthogonalize(x: Tensor) -> Tensor:
    """Each U S V^T of a stack (k, n, m), n <= m, becomes U S' V^T, with singular values between
    about 0.7 and 1.2 unless they were tiny: five Newton-Schulz iterations. Jordan et al. chose the
    polynomial, 3.4445 s - 4.7750 s^3 + 2.0315 s^5, to lift small singular values fast."""
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    for _ in range(5):
        xx = x @ x.mT  # (k, n, n)
        y = torch.baddbmm(xx, xx, xx, beta=-4.7750, alpha=2.0315)  # -4.7750 xx + 2.0315 xx xx
        x = torch.baddbmm(x, y, x, beta=3.4445)  # 3.4445 x + y x
    return x
