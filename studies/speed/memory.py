"""The peak memory of training steps of configs/idea_2.8b.py, on tensors without data, and what the
plan says: python -m studies.speed.memory [--key=value ...]
"""

import sys
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
from run.cost import memory_of
from run.machine import recompute_blocks
from run.optimizer import make_optimizers
from run.read_config import load_config
from tools.load import load_plan
from tools.plan import GPT2_VOCABULARY


class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive: `now`, and at most so far, `peak`."""

    def __init__(self):
        super().__init__()
        self.bytes, self.now, self.peak = {}, 0, 0  # bytes: of each storage, by its address

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        for x in filter(torch.is_tensor, tree_leaves(result)):
            storage = x.untyped_storage()
            if storage._cdata not in self.bytes:
                self.bytes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return result

    def free(self, key: int) -> None:
        self.now -= self.bytes.pop(key)


def attend(q: Tensor, k: Tensor, v: Tensor, queries_per_kv: int) -> Tensor:
    """As a GPU does it: model.py writes it out for bfloat16 on a CPU."""
    k, v = (x.repeat_interleave(queries_per_kv, dim=1) for x in (k.type_as(v), v))
    return F.scaled_dot_product_attention(q.type_as(v), k, v, is_causal=True)


def simulate(c, shape) -> int:
    """Bytes at the peak of two steps. In the second there are moments from the start, and gradients
    when its last micro batch begins."""
    with FakeTensorMode(), Memory() as memory:
        gpt = model.GPT(shape)
        optimizers = make_optimizers(gpt, c, torch.bfloat16)
        if c.recompute:
            recompute_blocks(gpt)
        tokens = torch.zeros(c.micro_batch_size, c.context_length, dtype=torch.long)
        for micro_batches in (1, 2):
            for _ in range(micro_batches):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = gpt(tokens, tokens)
                loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return memory.peak


def main() -> None:
    model.attend = attend
    print("| optimizer | shape | simulated, GiB | planned, GiB |\n| --- | --- | --- | --- |")
    for optimizer in ("adamw", "muon"):
        knobs = [f"--optimizer={optimizer}", *sys.argv[1:]]
        c, plan = load_plan(load_config("configs/idea_2.8b.py", knobs), missing=GPT2_VOCABULARY)
        for name, shape in (("enlarged", plan.shape(1)), ("final", plan.final)):
            planned = sum(memory_of(c, shape, c.micro_batch_size).values())
            simulated = simulate(c, shape) / 2**30
            print(f"| {optimizer} | {name} | {simulated:.2f} | {planned / 2**30:.2f} |", flush=True)


if __name__ == "__main__":
    main()
