"""Memory and FLOPs of steps of configs/idea_2.8b.py, on tensors without data, for each value of
`recompute`, beside what the plan says: python -m studies.speed.memory [--key=value ...]

Compiled steps are cut into forward and backward as Inductor cuts them, and then run operation by
operation. In the head that would hold what Inductor fuses, so here they have 256 tokens to choose
from. FLOPs are those of the products with weights.
"""

import sys
import weakref
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import partitioners
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode

import model
from run.config import Config, load_config
from run.cost import memory_of
from run.machine import Machine
from tools import load_plan
from tools.bench import Forward, Step
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


def simulate(c: Config, shape: model.GPTConfig) -> tuple[int, int, int]:
    """Bytes at the peak of a step of two micro batches, bytes that a forward pass leaves, and the
    FLOPs of a micro batch."""
    torch._dynamo.reset()
    c = replace(c, d_ff_target=0)
    with FakeTensorMode(allow_non_fake_inputs=True), Memory() as memory:
        step = Step(c, shape, Machine(c), c.compile)
        step()  # makes the moments, and compiles
        memory.peak = memory.now
        step(micro_batches=2)
        peak, before = memory.peak, memory.now
        with FlopCounterMode(display=False) as counter:
            loss = step.forward(*step.batch)
            kept = memory.now - before
            loss.backward()
    return peak, kept, counter.get_total_flops()


def without_data() -> None:
    """Have torch and the model do without what needs numbers, or no other modes around."""
    for mode in (FakeTensorMode, _FlopCounterMode, Memory):  # or nothing is compiled in them
        mode.ignore_compile_internals = classmethod(lambda mode: True)
    partitioners.has_recomputable_rng_ops = lambda graph: False  # no dropout
    torch.compile = lambda f, compile=torch.compile: compile(
        f, backend="aot_eager_decomp_partition"
    )
    model.attend = attend
    model.GPT.to = lambda gpt, device: gpt  # it is there
    Forward.try_compiled = Forward.empty_pass


def main() -> None:
    print(
        "| shape | steps | recompute | KiB kept a token and layer | FLOPs a token and layer", end=""
    )
    print(" | GiB | planned |\n|" + " --- |" * 7)
    knobs = ["--device=cpu", "--dtype=bfloat16", *sys.argv[1:]]
    c, plan = load_plan(load_config("configs/idea_2.8b.py", knobs), missing=GPT2_VOCABULARY)
    tokens = c.micro_batch_size * c.context_length
    for name, whole in (("enlarged", plan.enlarged), ("final", plan.final)):
        for compile, steps in (("off", "eager"), ("on", "compiled")):
            shape = replace(whole, vocab_size=256) if compile == "on" else whole
            for recompute in ("none", "cheap", "all"):
                here = replace(c, recompute=recompute, compile=compile)
                one, two, all_layers = (
                    simulate(here, replace(shape, n_layer=n)) for n in (1, 2, shape.n_layer)
                )
                kept, flops = ((b - a) / tokens for a, b in zip(one[1:], two[1:]))
                planned = sum(memory_of(here, shape, c.micro_batch_size).values())
                cells = f"{kept / 2**10:.0f} | {flops:.4g} | {all_layers[0] / 2**30:.2f}"
                row = f"| {name} | {steps} | {recompute} | {cells} | {planned / 2**30:.2f} |"
                print(row, flush=True)


if __name__ == "__main__":
    without_data()
    main()
