"""Attention on a CPU, forward and backward: python -m studies.speed.attention

torch's kernel in float32 and in bfloat16, and the same written out in bfloat16 as in model.py.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from run import machine
from tools.bench import race

SHAPES = [  # sequences, heads, tokens, head_dim
    (16, 4, 128, 8),  # configs/lab/idea.py
    (12, 4, 64, 32),  # nanoGPT's CPU recipe
    (32, 4, 128, 16),  # configs/idea.py
    (16, 6, 256, 64),  # 12M parameters
    (1, 12, 1024, 64),  # GPT-2
    (2, 8, 2048, 64),
]


def kernel(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), is_causal=True)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((q.shape[2], q.shape[2]), -torch.inf, dtype=q.dtype).triu(1)
    return (q @ k.mT * q.shape[-1] ** -0.5 + mask).softmax(-1) @ v


def main() -> None:
    machine.keep_memory()
    ways = {
        "kernel, float32": partial(kernel, torch.float32),
        "kernel, bfloat16": partial(kernel, torch.bfloat16),
        "written out, bfloat16": written_out,
    }
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; milliseconds\n")
    print(f"| sequences, heads, tokens, head_dim | {' | '.join(ways)} |\n|{' --- |' * 4}")
    for shape in SHAPES:
        q, k, v, out = torch.randn(4, *shape, dtype=torch.bfloat16)
        inputs = [x.requires_grad_() for x in (q, k, v)]

        def step(attend, inputs: list[Tensor] = inputs, out: Tensor = out) -> None:
            torch.autograd.grad(attend(*inputs).to(out.dtype), inputs, out)

        times = race([partial(step, attend) for attend in ways.values()], 5)
        print(f"| {shape} | {' | '.join(f'{t * 1e3:.1f}' for t in times)} |", flush=True)


if __name__ == "__main__":
    main()
