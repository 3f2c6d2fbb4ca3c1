"""The method in one file: a GPT starts too wide, loses its weakest neurons on the way, ends small.
python docs/one_file.py            prints the loss before a prune, after it and a step later. Try:
    criterion=random               Prunes cost more: the scores had found neurons of little use.
    d_ff_target=16                 So do deep ones: of the neurons that are left, few do little.
    d_ff_target=16 prune_start=0.5 prune_end=0.75  Late ones more: it knows more by then.
    fresh_optimizer=1              The prune is cheap, the next step is not: AdamW starts anew."""

import json
import lzma
import math
import sys
from fractions import Fraction
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KNOBS = dict(
    n_layer=2, d_model=32, n_head=4, d_ff=256, d_ff_target=96,  # d_ff: neurons in each layer
    max_steps=400, batch_size=16, context_length=96, learning_rate=1.2e-2, warmup_steps=20, seed=1,
    prune_start=0.1, prune_end=0.35, prune_every=10, round_to=16,  # start, end: of max_steps
    criterion="sensitivity", score_beta=0.85, fresh_optimizer=0,  # 1: at each prune
)  # fmt: skip
CRITERIA = {  # how much a weight matters
    "sensitivity": lambda weight, gradient: weight * gradient,
    "random": lambda weight, gradient: torch.rand_like(weight),
}


# Data: a byte of the speeches is a token. Step and seed alone decide what a batch holds
def batch(data: Tensor, step: int, size: int, c: SimpleNamespace) -> tuple[Tensor, Tensor]:
    order = torch.Generator().manual_seed(1_000_000 * c.seed + step)
    starts = torch.randint(len(data) - c.context_length, (size, 1), generator=order)
    tokens = data[starts + torch.arange(c.context_length + 1)].long()
    return tokens[:, :-1], tokens[:, 1:]  # the input and the next tokens, (size, T) each


# Model: a neuron of a layer is a row (0) of gate, the same row of up, the same column (1) of down
class Block(nn.Module):
    def __init__(self, c: SimpleNamespace):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(c.d_model), nn.RMSNorm(c.d_model)
        self.attention = nn.MultiheadAttention(c.d_model, c.n_head, bias=False, batch_first=True)
        self.gate, self.up = (nn.Linear(c.d_model, c.d_ff, bias=False) for _ in range(2))
        self.down = nn.Linear(c.d_ff, c.d_model, bias=False)
        self.scores = torch.zeros(c.d_ff)  # of its neurons

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d_model)
        h, later = self.attention_norm(x), torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        x = x + self.attention(h, h, h, attn_mask=later, need_weights=False)[0]
        h = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def slices(self) -> tuple:  # where its neurons are
        return (self.gate.weight, 0), (self.up.weight, 0), (self.down.weight, 1)


class GPT(nn.Module):
    def __init__(self, c: SimpleNamespace):
        super().__init__()
        self.embed, self.position = (nn.Embedding(n, c.d_model) for n in (256, c.context_length))
        self.blocks = nn.Sequential(*[Block(c) for _ in range(c.n_layer)])
        self.norm, self.unembed = nn.RMSNorm(c.d_model), nn.Linear(c.d_model, 256, bias=False)
        for matrix in [p for p in self.parameters() if p.dim() == 2]:
            nn.init.normal_(matrix, std=0.05)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:  # the mean loss, in nats
        x = self.blocks(self.embed(tokens) + self.position.weight)
        return F.cross_entropy(self.unembed(self.norm(x)).flatten(0, 1), targets.flatten())


# When: after a warm-up, one cosine to the last step, whatever is pruned
def learning_rate(step: int, c: SimpleNamespace) -> float:
    done = max(0, step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps)
    return c.learning_rate * min(step / max(1, c.warmup_steps), (1 + math.cos(math.pi * done)) / 2)


def width(step: int, c: SimpleNamespace) -> int:  # fast while many neurons are of little use
    opens, closes = (round(part * c.max_steps) + 1 for part in (c.prune_start, c.prune_end))
    if step >= closes:
        return c.d_ff_target
    steps = max(0, step - opens) // c.prune_every * c.prune_every  # until the most recent prune
    left = 1 - Fraction(steps, max(1, closes - opens))  # exact
    exact = c.d_ff_target + (c.d_ff - c.d_ff_target) * left**3
    return min(c.d_ff, math.ceil(exact / c.round_to) * c.round_to)


# Which: a neuron's score is the L2 norm of how much its weights matter, over its three slices
def unit_scores(block: Block, criterion: str) -> Tensor:  # (d_ff,)
    matters = CRITERIA[criterion]
    squares = [matters(w.detach(), w.grad).square().sum(1 - dim) for w, dim in block.slices()]
    return sum(squares).sqrt()


# How: cut each weight and its two moments in AdamW alike. AdamW still holds it, as `data` changes.
# No graph may be alive, as in a loss that is kept: it knows the shapes of before
def slice_group(block: Block, optimizer: torch.optim.AdamW, keep: Tensor) -> None:
    for weight, dim in block.slices():
        state = optimizer.state[weight]
        for x in (weight, state["exp_avg"], state["exp_avg_sq"]):
            x.data = x.data.index_select(dim, keep)
    block.scores = block.scores[keep]


def main(arguments: list[str]) -> None:
    c = SimpleNamespace(**KNOBS)
    try:
        for key, _, value in (argument.partition("=") for argument in arguments):
            setattr(c, key, type(KNOBS[key])(value))
        if c.criterion not in CRITERIA or not 0 < c.d_ff_target <= c.d_ff:
            raise ValueError
    except (KeyError, ValueError):
        known = f"knobs are {KNOBS}, criteria {[*CRITERIA]}; d_ff_target is 1 to d_ff"
        sys.exit(f"error: {' '.join(arguments)}: {known}")
    torch.set_num_threads(1)
    torch.manual_seed(c.seed)
    with lzma.open(__file__.rpartition("docs")[0] + "data/corpus/sotu.jsonl.xz") as lines:
        text = "\n".join(json.loads(line)["text"] for line in lines).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    data, held_out = data[:-100_000], batch(data[-100_000:], 0, 64, c)
    model, cost, next_steps = GPT(c), 0.0, 0.0
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    for step in range(1, c.max_steps + 1):
        optimizer.param_groups[0]["lr"] = learning_rate(step, c)  # schedule
        old, new = width(step - 1, c), width(step, c)
        if new < old:  # prune
            before = model(*held_out).item()
            for block in model.blocks:
                slice_group(block, optimizer, block.scores.topk(new).indices.sort().values)
            after = model(*held_out).item()
            if c.fresh_optimizer:
                optimizer.state.clear()
        model(*batch(data, step, c.batch_size, c)).backward()  # forward and backward
        for block in model.blocks:  # score: a running average, as one batch is noisy
            block.scores.lerp_(unit_scores(block, c.criterion), 1 - c.score_beta)
        optimizer.step()  # update
        optimizer.zero_grad()
        if new < old:  # log: then is the loss after one more step
            then = model(*held_out).item()
            cost, next_steps = cost + after - before, next_steps + then - after
            print(f"step {step}: d_ff {old} -> {new}, loss {before:.3f} -> {after:.3f}, {then:.3f}")
    print(f"prunes cost {cost:.3f}, next steps {next_steps:+.3f}; end {model(*held_out):.3f} +-0.1")


if __name__ == "__main__":
    main(sys.argv[1:])
