"""A prune against its oracle: the model whose pruned units are zero and never move."""

import copy
import random
from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch
from test_model import SHAPES, large

from model import GPT, KINDS
from prune import Pruner, Slice, block_groups, keep_units, per_unit

CONFIG = replace(SHAPES["tied"], n_kv_head=4)
SLICED = ("d_ff", "n_kv_head")  # of a block
SUBSETS = [kinds for n in range(1, 5) for kinds in combinations(KINDS, n)]
MOMENTUM = partial(torch.optim.SGD, momentum=0.9)


@pytest.fixture(autouse=True)
def double_precision(monkeypatch):
    """Everything in float64, so that equality means 1e-12."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    torch.set_default_dtype(torch.float32)


def make(optimizer=torch.optim.AdamW, config=CONFIG):
    model = large(GPT(config))
    named = list(model.named_parameters())
    groups = [{"params": [(name, p) for name, p in named if p.dim() == dim]} for dim in (1, 2)]
    return model, optimizer(groups, lr=1e-2, weight_decay=0.1)


def batch(seed):  # tokens and targets, (3, 10) each
    return torch.randint(0, 50, (2, 3, 10), generator=torch.Generator().manual_seed(seed))


def update(model, optimizer, seed):
    model(*batch(seed)).backward()
    optimizer.step()
    optimizer.zero_grad()


def of_kind(model, kind):
    return [group for group in model.groups() if group.kind == kind]


def survivors(tensors: dict, keep: dict[str, torch.Tensor]) -> dict:
    """What a prune should leave of a model's parameters or of tensors like them, by the formulas of
    attention and SwiGLU. keep: the indices of each kind that stay, alike in all layers."""
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


def test_the_momentum_of_muon_is_cut_with_its_weights():
    model = large(GPT(CONFIG))
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    muon = torch.optim.Muon(matrices, lr=1e-2)
    pruner = Pruner("magnitude", 0.0, ["d_ff"], seed=0)
    model(*batch(1)).backward()
    pruner.score(model)
    muon.step()
    before = muon.state[model.blocks[0].ffn.up.weight]["momentum_buffer"]
    scores = pruner.scores["blocks.0.d_ff"]
    best = scores.argsort(descending=True)[:2].sort().values
    pruner.prune(model, [muon], "d_ff", 2)
    after = muon.state[model.blocks[0].ffn.up.weight]["momentum_buffer"]
    assert before.shape[0] > 2
    assert torch.equal(after, before[best])


@pytest.mark.parametrize("tied, optim", [(True, torch.optim.AdamW), (False, MOMENTUM)])
@pytest.mark.parametrize("kinds", SUBSETS, ids="+".join)
def test_a_pruned_model_equals_a_small_one_that_got_the_surviving_slices(kinds, tied, optim):
    """So do the moments, and the step that an optimizer makes of the same gradient."""
    config = replace(CONFIG, n_layer=4, tie_embeddings=tied)
    large_one, optimizer = make(optim, config)
    update(large_one, optimizer, 0)
    model, ours = make(optim, config)
    model.load_state_dict(large_one.state_dict())
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
        judge.prune(model, [ours], kind, len(keep[kind]))
    for new, old in enumerate(keep["n_layer"]):  # scores go with their layers
        for kind in set(kinds) & set(SLICED):
            assert judge.scores[f"blocks.{new}.{kind}"].unique().tolist() == [100.0 + old]
    held = [p for group in ours.param_groups for p in group["params"]]
    assert len(held) == len(ours.state) and set(held) == set(model.parameters())
    names = [x for g in ours.param_groups for x in zip(g.get("param_names", ()), g["params"])]
    assert set(names) <= set(model.named_parameters())  # none is false
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
    torch.testing.assert_close(dict(model.named_parameters()), expected, rtol=0, atol=1e-12)


def by_removal(model, kind, value):
    """Group name -> for each unit, the root of what all value(w, grad)^2 sum to less without it."""
    squares = {name: value(p, p.grad).square() for name, p in model.named_parameters()}
    every = {k: list(range(getattr(CONFIG, k))) for k in KINDS}

    def total(units, within):
        left = survivors(squares, every | {kind: units}).items()
        return sum(x.sum() for name, x in left if name.startswith(within))

    scores, units = {}, every[kind]
    for group in of_kind(model, kind):
        within = group.name.removesuffix(kind) if kind in SLICED else ""  # such as "blocks.1."
        left = torch.stack([total([u for u in units if u != unit], within) for unit in units])
        scores[group.name] = (total(units, within) - left).sqrt()
    return scores


def pruner(criterion, kinds=SLICED, seed=1):
    return Pruner(criterion, 0.0, kinds, seed)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_the_kinds_to_prune_are_what_the_weights_of_a_unit_sum_to(kind, tied):
    model, _ = make(config=replace(CONFIG, tie_embeddings=tied))
    model(*batch(0)).backward()
    for criterion, value in (("sensitivity", lambda w, g: w * g), ("magnitude", lambda w, g: w)):
        judge = pruner(criterion, kinds=[kind])
        judge.score(model)
        torch.testing.assert_close(judge.scores, by_removal(model, kind, value))


def test_a_prune_says_which_units_went_and_why_and_drops_all_gradients():
    model, optimizer = make()
    judge = pruner("sensitivity")
    pairs = torch.arange(24.0).flip(0) // 2  # 11, 11, 10, 10, ...: ties go to the lower index
    judge.scores = {group.name: pairs for group in of_kind(model, "d_ff")}
    model(*batch(0)).backward()  # one of several of a step
    cuts = judge.prune(model, [optimizer], "d_ff", 5)
    assert all(p.grad is None for p in model.parameters())
    assert cuts["removed"] == [list(range(5, 24))] * 2
    assert cuts["scores"] == [pytest.approx(pairs.quantile(torch.arange(21) / 20).tolist())] * 2
    assert judge.scores["blocks.1.d_ff"].tolist() == [11, 11, 10, 10, 9]


def test_units_may_lie_in_several_parts_and_three_dims():
    x, where = torch.randn(4, 6, 2), Slice("experts", dim=1, parts=2)  # gates, then ups
    expected = [x[:, [j, 3 + j]].sum() for j in range(3)]
    torch.testing.assert_close(per_unit(x, where, 3), torch.stack(expected))
    assert torch.equal(keep_units(x, where, torch.tensor([True, False, True])), x[:, [0, 2, 3, 5]])


def test_a_frozen_weight_stays_frozen_and_has_the_gradient_zero():
    (model, optimizer), judge, other = make(), pruner("sensitivity"), pruner("sensitivity")
    old = model.blocks[1].ffn.up.weight.requires_grad_(False)
    model(*batch(0)).backward()
    judge.score(model)
    old.grad = torch.zeros_like(old)
    other.score(model)
    torch.testing.assert_close(judge.scores, other.scores, rtol=0, atol=0)
    optimizer.state[old] = state = {"name": "up", "nothing": None, "count": 3}  # no tensors
    judge.prune(model, [optimizer], "d_ff", 5)
    new = model.blocks[1].ffn.up.weight
    assert new.shape == (5, 16) and not new.requires_grad and optimizer.state[new] == state
    assert model.blocks[0].ffn.up.weight.requires_grad


@pytest.mark.parametrize("name", ["norm.weight", "blocks.1.ffn.up.weight"])
def test_one_gradient_that_is_not_finite_changes_no_score(name):
    model, judge, before = make()[0], pruner("sensitivity"), {}
    for bad in (None, torch.inf, torch.nan):
        model(*batch(0)).backward()
        if bad:
            model.get_parameter(name).grad[-1] = bad
        judge.score(model)
        before = before or dict(judge.scores)
    torch.testing.assert_close(judge.scores, before, rtol=0, atol=0)


def test_weights_that_a_layer_shares_with_one_that_stays_are_kept():
    model, judge = GPT(CONFIG), pruner("random", ["n_layer"])
    model.blocks[1].ffn = model.blocks[0].ffn
    optimizer = torch.optim.AdamW(model.parameters())
    for scores in ([0.0, 0.0], [0.0, 1.0]):  # equal ones do no harm where all stay
        judge.scores = {"blocks": torch.tensor(scores)}
        judge.prune(model, [optimizer], "n_layer", 2 - (scores[1] > 0))
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())
    model.second = torch.nn.ModuleList(model.blocks)
    with pytest.raises(ValueError, match="^second: "):
        judge.prune(model, [optimizer], "n_layer", 1)


AFTER = "register_post_accumulate_grad_hook"
REFUSED = [  # what changes; whether the first score says so
    ("blocks.0.ffn.gate.weight: the optimizer's 'row_var'", "make = torch.optim.Adafactor", True),
    ("embed.weight: the optimizer's 'old_dirs'", "make = torch.optim.LBFGS", True),
    ("blocks.1.ffn.gate.*twice", "model.blocks[1].ffn = model.blocks[0].ffn", True),
    ("blocks.0.ffn.gate.weight: dim 0", "units['d_ff'] = [Slice('ffn.gate.weight', 0, 3)]", True),
    ("d_ff: blocks.0 has no .* gate.weight$", "units['d_ff'] = [Slice('gate.weight', 0)]", True),
    ("gate.weight: .* hooks", "model.blocks[0].ffn.gate.weight.register_hook(abs)", True),
    ("gate.weight: .* hooks", f"model.blocks[0].ffn.gate.weight.{AFTER}(lambda p: None)", True),
    ("embed.weight: .* sparse", "model.embed.sparse, make = True, torch.optim.SGD", True),
    ("blocks.1.d_ff: cannot keep 5 of .* by 3 scores", "scores = torch.ones(3)", False),
    ("blocks.1.d_ff: all scores are equal", "scores = torch.ones(24)", False),
    ("d_ff: the model has no units of this kind", "units.clear()", False),
]


@pytest.mark.parametrize("words, change, at_once", REFUSED)
def test_what_cannot_be_pruned_is_refused_before_anything_is_cut(words, change, at_once):
    model = make(config=replace(CONFIG, tie_embeddings=False))[0]  # tied, no gradient is sparse
    units = {"d_ff": [Slice("ffn.gate.weight", 0), Slice("bias", 0)]}
    names = {"model": model, "units": units, "scores": torch.rand(24), "make": torch.optim.AdamW}
    exec(change, names | {"torch": torch, "Slice": Slice}, names)
    model.groups = lambda: block_groups(model, "blocks", units)
    model(*batch(0)).backward()
    optimizer, judge = names["make"](model.parameters()), pruner("sensitivity")
    optimizer.step(lambda: torch.ones(()))
    weights, judge.optimizers = list(model.parameters()), [optimizer]
    judge.scores = {"blocks.0.d_ff": torch.rand(24), "blocks.1.d_ff": names["scores"]}
    if at_once:
        with pytest.raises(ValueError, match=words):
            judge.score(model)
    with pytest.raises(ValueError, match=words):
        judge.prune(model, [optimizer], "d_ff", 5)
    assert all(a is b for a, b in zip(weights, model.parameters()))
