"""A prune against its oracle: the model whose pruned units are zero and never move."""

import copy
import random
from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch
from test_model import large

from model import GPT, KINDS, GPTConfig
from prune import Pruner, choose, slice_group

CONFIG = GPTConfig(
    vocab_size=40, context_length=10, n_layer=2, d_model=16, head_dim=4, queries_per_kv=2,
    n_kv_head=4, d_ff=24,
)  # fmt: skip
SLICED = ("d_ff", "n_kv_head")  # of a block
OPTIMIZERS = {"adamw": torch.optim.AdamW, "momentum": partial(torch.optim.SGD, momentum=0.9)}


@pytest.fixture(autouse=True)
def double_precision(monkeypatch):
    """Everything in float64, so that equality means 1e-12."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    torch.set_default_dtype(torch.float32)


def make(optimizer=torch.optim.AdamW, tied=True):
    model = large(GPT(replace(CONFIG, tie_embeddings=tied)))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return model, optimizer(groups, lr=1e-2)


def batch(seed):
    """Tokens and targets, (3, 10) each."""
    return torch.randint(0, 40, (2, 3, 10), generator=torch.Generator().manual_seed(seed))


def update(model, optimizer, seed):
    model(*batch(seed)).backward()
    optimizer.step()
    optimizer.zero_grad()


def check_optimizer(model, optimizer):
    """It holds each parameter once and no other, and its state has their shapes."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == set(model.parameters()) >= set(
        optimizer.state
    )
    for p, state in optimizer.state.items():
        assert all(x.dim() == 0 or x.shape == p.shape for x in state.values())


def of_kind(model, kind):
    return [group for group in model.groups() if group.kind == kind]


def some_of(width):
    keep = torch.zeros(width, dtype=torch.bool)
    keep[torch.randperm(width)[: width // 2]] = True
    return keep


def mask_units(model, group, keep):
    """Silence units without slicing: zero all of their weights. Returns where weights died."""
    dead = {}
    for name, dim in group.slices:
        weight = model.get_parameter(name)
        gone = ~keep.repeat_interleave(weight.shape[dim] // group.width)
        dead[name] = gone[:, None].expand_as(weight) if dim == 0 else gone.expand_as(weight)
        with torch.no_grad():
            weight[dead[name]] = 0.0
    return dead


@pytest.mark.parametrize("kind", SLICED)
def test_a_sliced_model_equals_a_masked_one(kind):
    model, optimizer = make()
    masked = copy.deepcopy(model)
    for group in of_kind(model, kind):
        keep = some_of(group.width)
        mask_units(masked, group, keep)
        slice_group(model, [optimizer], group, keep)
    x, _ = batch(1)
    torch.testing.assert_close(model(x), masked(x), rtol=0, atol=1e-12)
    assert model(x).abs().max() > 0.1
    assert getattr(model.config, kind) == getattr(CONFIG, kind) // 2
    rebuilt = GPT(model.config)
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(rebuilt(x), model(x))
    assert repr(rebuilt) == repr(model)  # what print(model) says


@pytest.mark.parametrize("kind", SLICED)
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_steps_after_slicing_equal_those_of_the_masked_model(make_optimizer, kind):
    model, optimizer = make(make_optimizer)
    for seed in range(3):
        update(model, optimizer, seed)
    masked, masked_optimizer = make(make_optimizer)
    masked.load_state_dict(model.state_dict())
    masked_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    dead = {}
    for group in of_kind(model, kind):
        keep = some_of(group.width)
        dead |= mask_units(masked, group, keep)
        slice_group(model, [optimizer], group, keep)
    check_optimizer(model, optimizer)
    for seed in range(3, 6):
        update(model, optimizer, seed)
        update(masked, masked_optimizer, seed)
        with torch.no_grad():
            for name, where in dead.items():  # the moments of the dead would move them again
                masked.get_parameter(name)[where] = 0.0
    theirs = dict(masked.named_parameters())
    for name, p in model.named_parameters():
        other = theirs[name][~dead[name]].view_as(p) if name in dead else theirs[name]
        torch.testing.assert_close(p, other, rtol=0, atol=1e-12)


def survivors(tensors: dict, keep: dict[str, torch.Tensor]) -> dict:
    """What a prune should leave of tensors with the names and shapes of a model's parameters, by
    the formulas of attention and SwiGLU. keep: the kept indices of each kind, alike in all layers.
    """
    hd, n, d, out = CONFIG.head_dim, CONFIG.queries_per_kv, keep["d_model"], {}
    kv = torch.cat([torch.arange(hd) + j * hd for j in keep["n_kv_head"]])
    q = torch.cat([torch.arange(n * hd) + j * n * hd for j in keep["n_kv_head"]])
    rows = {"q": q, "k": kv, "v": kv, "o": d, "gate": keep["d_ff"], "up": keep["d_ff"], "down": d}
    columns = {"o": q, "down": keep["d_ff"]}
    for name, x in tensors.items():
        place, _, rest = name.removeprefix("blocks.").partition(".")
        what = name.split(".")[-2]  # such as "gate"
        if name.startswith("blocks.") and int(place) in keep["n_layer"]:
            name = f"blocks.{keep['n_layer'].index(int(place))}.{rest}"
        elif name.startswith("blocks."):
            continue
        if what in rows:
            out[name] = x[rows[what]][:, columns.get(what, d)]
        else:
            out[name] = x[..., d]  # norms and embeddings
    return out


SUBSETS = [kinds for n in range(1, 5) for kinds in combinations(KINDS, n)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kinds", SUBSETS, ids="+".join)
def test_a_pruned_model_equals_a_small_one_that_got_the_surviving_slices(kinds, tied):
    """So do the moments, and the step that AdamW makes of the same gradient."""
    config = replace(CONFIG, n_layer=4, tie_embeddings=tied)
    large_one = large(GPT(config))
    optimizer = torch.optim.AdamW(large_one.parameters(), lr=1e-2)
    update(large_one, optimizer, 0)
    model = copy.deepcopy(large_one)
    ours = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ours.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    keep = {kind: list(range(getattr(config, kind))) for kind in KINDS}
    judge = pruner("sensitivity", kinds)
    for kind in kinds:
        some = random.Random(kind).sample(keep[kind], len(keep[kind]) // 2)
        keep[kind] = [1, 3] if kind == "n_layer" else sorted(some)
        for i, group in enumerate(of_kind(model, kind)):  # scored so that these are kept
            judge.scores[group.name] = torch.full((group.width,), float(i))
            judge.scores[group.name][keep[kind]] += 100.0
    for kind in kinds if tied else reversed(kinds):  # layers last, as in the loop, or first
        judge.prune(model, [ours], kind, len(keep[kind]), [])
    for new, old in enumerate(keep["n_layer"]):  # scores go with their layers
        for kind in set(kinds) & set(SLICED):
            assert judge.scores[f"blocks.{new}.{kind}"].unique().tolist() == [100.0 + old]
    check_optimizer(model, ours)
    assert model.config == replace(config, **{kind: len(kept) for kind, kept in keep.items()})
    assert (model.unembed.weight is model.embed.weight) == tied
    small = GPT(model.config)
    small.load_state_dict(survivors(large_one.state_dict(), keep))
    x, _ = batch(1)
    torch.testing.assert_close(model(x), small(x), rtol=0, atol=1e-12)
    assert model(x).abs().max() > 0.1 and repr(model) == repr(small)
    assert {name for name in judge.scores} <= {group.name for group in model.groups()}

    for name, p in large_one.named_parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    gradients = {name: p.grad for name, p in large_one.named_parameters()}
    for name, gradient in survivors(gradients, keep).items():
        model.get_parameter(name).grad = gradient
    optimizer.step()
    ours.step()
    expected = survivors(dict(large_one.named_parameters()), keep)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-12)


def test_layers_of_different_widths_are_noticed():
    model, optimizer = make()
    group = of_kind(model, "d_ff")[0]
    slice_group(model, [optimizer], group, some_of(group.width))
    with pytest.raises(AssertionError, match="different widths"):
        print(model.config)


def by_hand(model, kind, value):
    """Group name -> the root of the sum of value(w, grad)^2 over each unit, by explicit indices."""
    out = {}
    for i, block in enumerate(model.blocks):
        a, f, hd, n = block.attention, block.ffn, CONFIG.head_dim, CONFIG.queries_per_kv
        for j in range(getattr(CONFIG, kind)):
            if kind == "d_ff":
                pieces = [(f.gate, (j,)), (f.up, (j,)), (f.down, (slice(None), j))]
            else:
                q, kv = slice(j * n * hd, (j + 1) * n * hd), slice(j * hd, (j + 1) * hd)
                pieces = [(a.q, (q,)), (a.k, (kv,)), (a.v, (kv,)), (a.o, (slice(None), q))]
            total = sum((value(m.weight[at], m.weight.grad[at]) ** 2).sum() for m, at in pieces)
            out.setdefault(f"blocks.{i}.{kind}", []).append(total.sqrt().item())
    return out


def by_hand_all(model, kind, value):
    """The same for the channels of the stream and for the blocks."""
    values = {name: value(p, p.grad).square() for name, p in model.named_parameters()}
    if kind == "n_layer":
        ours = [[x for name, x in values.items() if f"blocks.{i}." in name] for i in range(2)]
        return {"blocks": [sum(x.sum() for x in xs).sqrt().item() for xs in ours]}
    rows = [x for name, x in values.items() if name.endswith((".o.weight", ".down.weight"))]
    others = [x for name, x in values.items() if not name.endswith((".o.weight", ".down.weight"))]
    total = [
        sum(x[j].sum() for x in rows) + sum(x[..., j].sum() for x in others) for j in range(16)
    ]
    return {"stream": [x.sqrt().item() for x in total]}


def pruner(criterion, kinds=SLICED, seed=1):
    return Pruner(criterion, 0.0, kinds, seed, agree=lambda mask: mask, mean=lambda x: x)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_the_kinds_to_prune_equal_a_hand_written_sum_per_unit(kind, tied):
    model, _ = make(tied=tied)
    model(*batch(0)).backward()
    for criterion, value in (("sensitivity", lambda w, g: w * g), ("magnitude", lambda w, g: w)):
        judge = pruner(criterion, kinds=[kind])
        judge.score(model)
        scores = (by_hand if kind in SLICED else by_hand_all)(model, kind, value)
        expected = {name: torch.tensor(s) for name, s in scores.items()}
        torch.testing.assert_close(judge.scores, expected)


def test_choose_keeps_the_best_and_ties_go_to_the_lower_index():
    mask = choose(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0]), 3)
    assert mask.tolist() == [False, True, True, True, False, False]


def test_a_prune_cuts_scores_along_and_says_which_units_went_and_why():
    model, optimizer = make()
    update(model, optimizer, 0)
    judge = pruner("sensitivity")
    judge.scores = {g.name: torch.arange(float(g.width)).flip(0) for g in model.groups()}
    cuts = judge.prune(model, [optimizer], "d_ff", 4, [])
    assert cuts["removed"] == [list(range(4, 24))] * 2
    quartiles = [i / 4 * 23 for i in range(5)]  # of all units, the removed ones too
    assert cuts["scores"] == [pytest.approx(quartiles)] * 2
    assert judge.scores["blocks.1.d_ff"].tolist() == [23.0, 22.0, 21.0, 20.0]
    assert judge.prune(model, [optimizer], "n_kv_head", 1, [])["removed"] == [[1, 2, 3]] * 2
    assert (model.config.d_ff, model.config.n_kv_head) == (4, 1)


def test_activation_keeps_the_largest_outputs_as_readers_weigh_them():
    model, optimizer = make()
    update(model, optimizer, 0)
    seen = []
    model.blocks[1].ffn.down.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    batches = [tuple(batch(seed)) for seed in (0, 1)]
    with torch.no_grad():
        for tokens, _ in batches:
            model(tokens)
    rms = torch.cat(seen).square().mean((0, 1)).sqrt()
    column = model.blocks[1].ffn.down.weight.norm(dim=0)
    best = set((rms * column).topk(8).indices.tolist())
    hooks = len(model.blocks[1].ffn.down._forward_pre_hooks)
    cuts = pruner("activation").prune(model, [optimizer], "d_ff", 8, batches)
    assert set(range(24)) - set(cuts["removed"][1]) == best
    assert len(model.blocks[1].ffn.down._forward_pre_hooks) == hooks


def test_activation_of_a_channel_is_what_readers_get_of_a_block_its_turn():
    model, optimizer = make()
    tokens, seen = batch(0)[0], {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, args, y, name=name: seen.update({name: (*args, y)}))
    with torch.no_grad():
        model(tokens)
    read = [seen[f"blocks.{i}.{name}"][0] for i in range(2) for name in ("attention.q", "ffn.up")]
    reads = sum(x.square().mean((0, 1)) for x in [*read, seen["unembed"][0]])
    turns = []
    for i in range(2):
        x, _, _, y = seen[f"blocks.{i}"]
        turns.append(1 - ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean())
    for kind, scores, width in (("d_model", reads, 8), ("n_layer", torch.stack(turns), 1)):
        batches = [(part, None) for part in tokens.split(1)]  # the split changes nothing
        cuts = pruner("activation").prune(model, [optimizer], kind, width, batches)
        assert cuts["removed"] == [sorted(scores.argsort()[: len(scores) - width].tolist())]
        quartiles = scores.quantile(torch.linspace(0, 1, 5, dtype=scores.dtype))
        torch.testing.assert_close(torch.tensor(cuts["scores"][0]), quartiles)
        model = make()[0]
        optimizer = torch.optim.AdamW(model.parameters())


def test_random_is_one_number_per_unit_that_the_seed_decides():
    model, _ = make()
    draws = []
    for seed, looks in ((1, 1), (1, 2), (2, 1)):  # a second look changes nothing
        judge = pruner("random", seed=seed)
        for _ in range(looks):
            judge.score(model)
        draws.append(judge.scores["blocks.0.d_ff"])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
