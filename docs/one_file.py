"""The method in one file: a GPT starts too wide, loses its weakest neurons, ends small.

    python docs/one_file.py

prints the loss before each prune, after it, and one training step later. Then try:

    --criterion=random
        Prunes cost more, because the scores had found neurons of little use.
    --d_ff_target=16
        Deep prunes cost more, too, because most neurons that are left are useful.
    --d_ff_target=16 --prune_start=0.5 --prune_end=0.75
        Late prunes cost even more, because the model has learned more by then.
    --fresh_optimizer=1
        The prune is cheap, but the next step is not, because AdamW starts anew.

--help lists all knobs.
"""

import inspect
import json
import lzma
import math
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB_SIZE = 256  # a token is a byte
CORPUS = Path(__file__).parent.parent / "data/corpus/sotu.jsonl.xz"
HELD_OUT = 100_000  # bytes at the end of the corpus, for the losses that are printed

# Name of a criterion -> how important a weight is
CRITERIA = {
    "sensitivity": lambda weight, gradient: weight * gradient,
    "random": lambda weight, gradient: torch.rand_like(weight),
}


@dataclass
class Config:
    # Model
    n_layer: int = 2
    d_model: int = 32
    n_head: int = 4
    d_ff: int = 256  # neurons in each layer at the start
    # Training
    max_steps: int = 400
    batch_size: int = 16
    context_length: int = 96
    learning_rate: float = 1.2e-2  # the peak
    warmup_steps: int = 20
    seed: int = 1
    # Pruning
    d_ff_target: int = 96  # neurons in each layer at the end
    prune_start: float = 0.1  # the prune window opens after this fraction of max_steps
    prune_end: float = 0.35  # and closes after this one
    prune_every: int = 10  # steps between two prunes
    round_to: int = 16  # d_ff is a multiple of this between the start and the end
    criterion: str = "sensitivity"  # or random
    score_beta: float = 0.85  # averages scores over about 1 / (1 - score_beta) steps
    fresh_optimizer: int = 0  # 1: AdamW forgets its moments at each prune


POSITIVE = (  # the knobs that must be greater than 0
    "n_layer",
    "d_model",
    "n_head",
    "max_steps",
    "batch_size",
    "context_length",
    "learning_rate",
    "d_ff_target",
    "prune_every",
    "round_to",
)


# The data


def load_corpus() -> Tensor:
    """Return the speeches, one after the other, as tokens."""
    with lzma.open(CORPUS) as lines:
        texts = [json.loads(line)["text"] for line in lines]
    encoded = "\n".join(texts).encode()
    return torch.frombuffer(bytearray(encoded), dtype=torch.uint8)


def batch(data: Tensor, step: int, size: int, config: Config) -> tuple[Tensor, Tensor]:
    """Return the tokens of a step and the next tokens, (size, context_length) each.

    They depend on the step and the seed alone, so all runs of a seed see the same text.
    """
    order = torch.Generator().manual_seed(1_000_000 * config.seed + step)
    last_start = len(data) - config.context_length
    starts = torch.randint(last_start, (size, 1), generator=order)
    positions = starts + torch.arange(config.context_length + 1)
    tokens = data[positions].long()
    return tokens[:, :-1], tokens[:, 1:]


# The model


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        d_model = config.d_model
        d_ff = config.d_ff
        self.attention_norm = nn.RMSNorm(d_model)
        self.ffn_norm = nn.RMSNorm(d_model)
        self.attention = nn.MultiheadAttention(
            d_model, config.n_head, bias=False, batch_first=True
        )
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)
        self.scores = torch.zeros(d_ff)  # of the neurons

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d_model)
        T = x.shape[1]
        later = torch.ones(T, T).triu(1).bool()  # the positions that a token cannot see
        h = self.attention_norm(x)
        y, _ = self.attention(h, h, h, attn_mask=later, need_weights=False)
        x = x + y
        h = self.ffn_norm(x)
        neurons = F.silu(self.gate(h)) * self.up(h)  # (B, T, d_ff)
        return x + self.down(neurons)

    def slices(self) -> list[tuple[Tensor, int]]:
        """Return each weight that holds a part of every neuron, with the dim to cut.

        Neuron j is row j of gate, row j of up and column j of down.
        """
        return [(self.gate.weight, 0), (self.up.weight, 0), (self.down.weight, 1)]


class GPT(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, config.d_model)
        self.position = nn.Embedding(config.context_length, config.d_model)
        blocks = [Block(config) for _ in range(config.n_layer)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.RMSNorm(config.d_model)
        self.unembed = nn.Linear(config.d_model, VOCAB_SIZE, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.05)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of all tokens, in nats."""
        x = self.embed(tokens) + self.position.weight  # (B, T, d_model)
        x = self.blocks(x)
        logits = self.unembed(self.norm(x))  # (B, T, VOCAB_SIZE)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# When: one cosine and one falling width, as functions of the step


def learning_rate(step: int, config: Config) -> float:
    """Return the learning rate of a step: a linear warm-up, then a cosine to 0."""
    steps_after_warmup = config.max_steps - config.warmup_steps
    progress = max(0, step - config.warmup_steps) / max(1, steps_after_warmup)
    warmup = step / max(1, config.warmup_steps)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * min(warmup, cosine)


def width(step: int, config: Config) -> int:
    """Return the number of neurons in each layer during a step.

    It falls fast while many neurons are of little use, and slowly at the end.
    """
    opens = round(config.prune_start * config.max_steps) + 1
    closes = round(config.prune_end * config.max_steps) + 1
    if step >= closes:
        return config.d_ff_target
    prunes = max(0, step - opens) // config.prune_every
    steps = prunes * config.prune_every  # from the opening to the last prune
    left = 1 - Fraction(steps, max(1, closes - opens))
    exact = config.d_ff_target + (config.d_ff - config.d_ff_target) * left**3
    rounded = math.ceil(exact / config.round_to) * config.round_to
    return min(config.d_ff, rounded)


# Which: the neurons with the lowest scores


def unit_scores(block: Block, criterion: str) -> Tensor:
    """Return the L2 norm of the importances of each neuron's weights, (d_ff,)."""
    importance = CRITERIA[criterion]
    sums = []
    for weight, dim in block.slices():
        squares = importance(weight.detach(), weight.grad).square()
        sums.append(squares.sum(1 - dim))
    return sum(sums).sqrt()


def choose(scores: Tensor, n_keep: int) -> Tensor:
    """Return the indices of the neurons with the highest scores, in ascending order."""
    best = scores.topk(n_keep).indices
    return best.sort().values


# How: cut each weight and its two moments in AdamW alike


def slice_group(block: Block, optimizer: torch.optim.AdamW, keep: Tensor) -> None:
    """Keep only these neurons of a layer.

    AdamW still holds the weights, because only their `data` changes. Do not keep a loss
    across a prune: its graph expects the old shapes.
    """
    for weight, dim in block.slices():
        state = optimizer.state[weight]
        for tensor in (weight, state["exp_avg"], state["exp_avg_sq"]):
            tensor.data = tensor.data.index_select(dim, keep)
    block.scores = block.scores[keep]


# The run


def train(config: Config) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    corpus = load_corpus()
    data = corpus[:-HELD_OUT]
    held_out = batch(corpus[-HELD_OUT:], 0, 64, config)
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    prune_cost = 0.0
    next_step_cost = 0.0
    for step in range(1, config.max_steps + 1):
        # Schedule
        optimizer.param_groups[0]["lr"] = learning_rate(step, config)

        # Prune
        old_width = width(step - 1, config)
        new_width = width(step, config)
        is_prune = new_width < old_width
        if is_prune:
            before = model(*held_out).item()
            for block in model.blocks:
                keep = choose(block.scores, new_width)
                slice_group(block, optimizer, keep)
            after = model(*held_out).item()
            if config.fresh_optimizer:
                optimizer.state.clear()

        # Forward and backward
        tokens, targets = batch(data, step, config.batch_size, config)
        model(tokens, targets).backward()

        # Score: a running average, because the scores of a single batch are noisy
        for block in model.blocks:
            scores = unit_scores(block, config.criterion)
            block.scores.lerp_(scores, 1 - config.score_beta)

        # Update
        optimizer.step()
        optimizer.zero_grad()

        # Log
        if is_prune:
            next_loss = model(*held_out).item()
            prune_cost = prune_cost + after - before
            next_step_cost = next_step_cost + next_loss - after
            losses = f"loss {before:.3f} -> {after:.3f}, {next_loss:.3f}"
            print(f"step {step}: d_ff {old_width} -> {new_width}, {losses}")
    costs = f"prunes cost {prune_cost:.3f}, next steps {next_step_cost:+.3f}"
    print(f"{costs}; end {model(*held_out).item():.3f} +-0.1")


# The command line


def read_config(arguments: list[str]) -> Config:
    """Return the knobs, as the command line sets them. Raises ValueError."""
    config = Config()
    for argument in arguments:
        knob, _, text = argument.removeprefix("--").partition("=")
        is_knob = argument.startswith("--") and knob in vars(config)
        if not is_knob:
            raise ValueError(f"{argument}: not a --KNOB=VALUE; --help lists all knobs")
        knob_type = type(getattr(config, knob))
        try:
            value = knob_type(text)
        except ValueError:
            advice = f"must be of type {knob_type.__name__}"
            raise ValueError(f"{argument}: {advice}") from None
        setattr(config, knob, value)
    check_config(config)
    return config


def check_config(config: Config) -> None:
    """Raise ValueError if a knob has a value that no run can use."""
    for knob in POSITIVE:
        is_positive = getattr(config, knob) > 0
        require(is_positive, config, knob, "must be greater than 0")
    known = " or ".join(CRITERIA)
    require(config.criterion in CRITERIA, config, "criterion", f"must be {known}")
    d_ff = config.d_ff
    require(config.d_ff_target <= d_ff, config, "d_ff_target", f"must be up to {d_ff=}")
    n_head = config.n_head
    divides = config.d_model % n_head == 0
    require(divides, config, "d_model", f"must be a multiple of {n_head=}")
    first_step_prunes = width(1, config) < d_ff
    advice = "too early, because step 1 has no scores to prune by"
    require(not first_step_prunes, config, "prune_end", advice)


def require(condition: bool, config: Config, knob: str, advice: str) -> None:
    if not condition:
        raise ValueError(f"--{knob}={getattr(config, knob)}: {advice}")


def main(arguments: list[str]) -> int:
    if "--help" in arguments:
        print(__doc__)
        print(inspect.getsource(Config))
        return 0
    try:
        config = read_config(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    train(config)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
