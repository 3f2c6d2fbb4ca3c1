"""A prune against its oracle: the model whose pruned units are zero and never move."""

import copy
import random
from dataclasses import replace
from functools import partial
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from test_model import SHAPES, large

from model import GPT, KINDS
from prune import Pruner, Slice, block_groups, keep_units, per_unit

CONFIG = replace(SHAPES["tied"], n_kv_head=4)
KINDS_IN_LAYERS = ("d_ff", "n_kv_head")
SUBSETS = [kinds for n in range(1, 5) for kinds in combinations(KINDS, n)]
ADAMW = torch.optim.AdamW
MOMENTUM = partial(torch.optim.SGD, momentum=0.9)


@pytest.fixture(autouse=True)
def double_precision(monkeypatch):
    """Everything in float64, so that equality means 1e-12."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    torch.set_default_dtype(torch.float32)


def make_model(optimizer_class=ADAMW, config=CONFIG):
    """A model and its optimizer, which knows the names of its parameters."""
    model = large(GPT(config))
    named = list(model.named_parameters())
    vectors = [(name, p) for name, p in named if p.dim() == 1]
    matrices = [(name, p) for name, p in named if p.dim() == 2]
    groups = [{"params": vectors}, {"params": matrices}]
    return model, optimizer_class(groups, lr=1e-2, weight_decay=0.1)


def make_pruner(criterion="sensitivity", kinds=KINDS_IN_LAYERS):
    return Pruner(criterion, 0.0, kinds, seed=1)


def batch(seed):  # tokens and targets, (3, 10) each
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 50, (2, 3, 10), generator=generator)


def backward(model):
    model(*batch(0)).backward()


def groups_of_kind(model, kind):
    return [group for group in model.groups() if group.kind == kind]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def all_units() -> dict[str, list[int]]:
    return {kind: list(range(getattr(CONFIG, kind))) for kind in KINDS}


def rows_of(units: list[int], length: int) -> torch.Tensor:
    """The rows of these units, if each unit has `length` rows."""
    starts = torch.tensor(units).unsqueeze(1) * length
    return (starts + torch.arange(length)).flatten()


def survivors(tensors: dict, keep: dict[str, list[int]]) -> dict:
    """What a prune should leave of a model's parameters, or of tensors like them, by
    the formulas of attention and SwiGLU. keep: the indices of each kind that stay,
    alike in all layers."""
    layers = keep["n_layer"]
    d_model = keep["d_model"]
    d_ff = keep["d_ff"]
    kv = rows_of(keep["n_kv_head"], CONFIG.head_dim)
    q = rows_of(keep["n_kv_head"], CONFIG.head_dim * CONFIG.queries_per_kv)
    rows = {
        "q": q,
        "k": kv,
        "v": kv,
        "o": d_model,
        "gate": d_ff,
        "up": d_ff,
        "down": d_model,
    }
    columns = {"o": q, "down": d_ff}
    left = {}
    for name, x in tensors.items():
        matrix = name.split(".")[-2]  # such as "gate"
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            if int(layer) not in layers:
                continue
            name = f"blocks.{layers.index(int(layer))}.{rest}"
        if matrix in rows:
            left[name] = x[rows[matrix]][:, columns.get(matrix, d_model)]
        else:
            left[name] = x[..., d_model]  # norms and embeddings
    return left


# A pruned model against a small one


@pytest.mark.parametrize("tied, optimizer_class", [(True, ADAMW), (False, MOMENTUM)])
@pytest.mark.parametrize("kinds", SUBSETS, ids="+".join)
def test_a_pruned_model_equals_a_small_one_that_got_the_surviving_slices(
    kinds, tied, optimizer_class
):
    """So do the moments, and the step that an optimizer makes of the same gradient."""
    config = replace(CONFIG, n_layer=4, tie_embeddings=tied)
    whole, whole_optimizer = make_model(optimizer_class, config)
    backward(whole)
    whole_optimizer.step()
    whole_optimizer.zero_grad()
    model, optimizer = make_model(optimizer_class, config)
    model.load_state_dict(whole.state_dict())
    optimizer.load_state_dict(copy.deepcopy(whole_optimizer.state_dict()))

    keep = choose_half(config, kinds)
    pruner = make_pruner(kinds=kinds)
    for kind in kinds:
        set_scores(pruner, model, kind, keep[kind])
    order = kinds if tied else reversed(kinds)  # layers last, as in the loop, or first
    for kind in order:
        pruner.prune(model, [optimizer], kind, len(keep[kind]))

    check_that_scores_moved(pruner, model, kinds, keep)
    check_that_the_optimizer_holds_the_model(optimizer, model)
    widths = {kind: len(kept) for kind, kept in keep.items()}
    assert model.config == replace(config, **widths)
    assert (model.unembed.weight is model.embed.weight) == tied
    small = GPT(model.config)
    small.load_state_dict(survivors(whole.state_dict(), keep))
    assert repr(model) == repr(small)
    tokens, _ = batch(1)
    logits = model(tokens)
    assert_close(logits, small(tokens))
    assert logits.abs().max() > 0.1

    set_gradients(whole, model, keep)
    whole_optimizer.step()
    optimizer.step()
    expected = survivors(dict(whole.named_parameters()), keep)
    assert_close(dict(model.named_parameters()), expected)


def choose_half(config, kinds) -> dict[str, list[int]]:
    """The units to keep: half of these kinds, at random, and all of the other kinds."""
    keep = {kind: list(range(getattr(config, kind))) for kind in KINDS}
    for kind in kinds:
        units = keep[kind]
        keep[kind] = sorted(random.Random(kind).sample(units, len(units) // 2))
    if "n_layer" in kinds:
        keep["n_layer"] = [1, 3]
    return keep


def set_scores(pruner, model, kind, kept):
    """Scores by which these units are kept: 100 and the number of the group."""
    for i, group in enumerate(groups_of_kind(model, kind)):
        scores = torch.full((group.width,), float(i))
        scores[kept] += 100.0
        pruner.scores[group.name] = scores


def check_that_scores_moved(pruner, model, kinds, keep):
    """With their layers."""
    for kind in set(kinds) & set(KINDS_IN_LAYERS):
        for new, old in enumerate(keep["n_layer"]):
            scores = pruner.scores[f"blocks.{new}.{kind}"]
            assert scores.unique().tolist() == [100.0 + old]
    assert set(pruner.scores) <= {group.name for group in model.groups()}


def check_that_the_optimizer_holds_the_model(optimizer, model):
    """With names, if it has any, that are right."""
    named = dict(model.named_parameters())
    held = []
    for group in optimizer.param_groups:
        held += group["params"]
        for name, p in zip(group.get("param_names", ()), group["params"]):
            assert named[name] is p
    assert len(held) == len(optimizer.state)
    assert set(held) == set(named.values())


def set_gradients(whole, model, keep):
    """Random gradients, the same for what is left of the whole model."""
    gradients = {}
    for name, p in whole.named_parameters():
        generator = torch.Generator().manual_seed(len(name))
        p.grad = torch.randn(p.shape, generator=generator)
        gradients[name] = p.grad
    for name, gradient in survivors(gradients, keep).items():
        model.get_parameter(name).grad = gradient


# Scores


def scores_by_removal(model, kind, importance) -> dict[str, torch.Tensor]:
    """For each group, for each unit: the root of the squared importances that the model
    loses with it."""
    squares = {}
    for name, p in model.named_parameters():
        squares[name] = importance(p, p.grad).square()

    def total(units, prefix):
        left = survivors(squares, all_units() | {kind: units})
        return sum(x.sum() for name, x in left.items() if name.startswith(prefix))

    scores = {}
    units = all_units()[kind]
    for group in groups_of_kind(model, kind):
        prefix = ""
        if kind in KINDS_IN_LAYERS:
            prefix = group.name.removesuffix(kind)  # such as "blocks.1."
        lost = []
        for unit in units:
            others = [other for other in units if other != unit]
            lost.append(total(units, prefix) - total(others, prefix))
        scores[group.name] = torch.stack(lost).sqrt()
    return scores


IMPORTANCES = {
    "sensitivity": lambda weight, gradient: weight * gradient,
    "magnitude": lambda weight, gradient: weight,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_the_kinds_to_prune_are_what_the_weights_of_a_unit_sum_to(kind, tied):
    model, _ = make_model(config=replace(CONFIG, tie_embeddings=tied))
    backward(model)
    for criterion, importance in IMPORTANCES.items():
        pruner = make_pruner(criterion, kinds=[kind])
        pruner.score(model)
        expected = scores_by_removal(model, kind, importance)
        torch.testing.assert_close(pruner.scores, expected)


@pytest.mark.parametrize("name", ["norm.weight", "blocks.1.ffn.up.weight"])
def test_one_gradient_that_is_not_finite_changes_no_score(name):
    model, _ = make_model()
    pruner = make_pruner()
    backward(model)
    pruner.score(model)
    before = dict(pruner.scores)
    for bad in (torch.inf, torch.nan):
        backward(model)
        model.get_parameter(name).grad[-1] = bad
        pruner.score(model)
        assert_equal(pruner.scores, before)


def test_units_may_lie_in_several_parts_and_three_dims():
    x = torch.randn(4, 6, 2)  # experts with three gates, then three ups
    where = Slice("experts", dim=1, parts=2)
    expected = [x[:, [j, 3 + j]].sum() for j in range(3)]
    torch.testing.assert_close(per_unit(x, where, 3), torch.stack(expected))
    keep = torch.tensor([True, False, True])
    assert torch.equal(keep_units(x, where, keep), x[:, [0, 2, 3, 5]])


# Prunes


def test_a_prune_says_which_units_went_and_why_and_drops_all_gradients():
    model, optimizer = make_model()
    pruner = make_pruner()
    pairs = torch.arange(24.0).flip(0) // 2  # 11, 11, 10, 10, ...
    for group in groups_of_kind(model, "d_ff"):
        pruner.scores[group.name] = pairs
    backward(model)
    record = pruner.prune(model, [optimizer], "d_ff", 5)
    assert all(p.grad is None for p in model.parameters())
    removed = list(range(5, 24))  # not 4: the first of two equal scores is kept
    assert record["removed"] == [removed] * 2
    quantiles = pairs.quantile(torch.arange(21) / 20).tolist()
    assert record["scores"] == [pytest.approx(quantiles)] * 2
    assert pruner.scores["blocks.1.d_ff"].tolist() == [11, 11, 10, 10, 9]


def test_a_frozen_weight_stays_frozen_and_has_the_gradient_zero():
    model, optimizer = make_model()
    pruner = make_pruner()
    pruner_with_zeros = make_pruner()
    old = model.blocks[1].ffn.up.weight.requires_grad_(False)
    backward(model)
    pruner.score(model)
    old.grad = torch.zeros_like(old)
    pruner_with_zeros.score(model)
    assert_equal(pruner.scores, pruner_with_zeros.scores)

    state = {"name": "up", "nothing": None, "count": 3}  # no tensors
    optimizer.state[old] = state
    pruner.prune(model, [optimizer], "d_ff", 5)
    new = model.blocks[1].ffn.up.weight
    assert new.shape == (5, 16)
    assert not new.requires_grad
    assert optimizer.state[new] == state
    assert model.blocks[0].ffn.up.weight.requires_grad


def test_weights_that_a_layer_shares_with_one_that_stays_are_kept():
    model = GPT(CONFIG)
    model.blocks[1].ffn = model.blocks[0].ffn
    optimizer = ADAMW(model.parameters())
    pruner = make_pruner("random", ["n_layer"])
    pruner.scores = {"blocks": torch.tensor([0.0, 1.0])}
    pruner.prune(model, [optimizer], "n_layer", 1)
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())


def test_equal_scores_do_no_harm_if_all_units_stay():
    model, optimizer = make_model()
    pruner = make_pruner("random", ["n_layer"])
    pruner.scores = {"blocks": torch.zeros(2)}
    record = pruner.prune(model, [optimizer], "n_layer", 2)
    assert record["removed"] == [[]]


# What is refused


def test_a_second_list_of_the_layers_is_refused():
    model, optimizer = make_model()
    model.second = torch.nn.ModuleList(model.blocks)
    pruner = make_pruner("random", ["n_layer"])
    pruner.scores = {"blocks": torch.tensor([0.0, 1.0])}
    with pytest.raises(ValueError, match="^second: "):
        pruner.prune(model, [optimizer], "n_layer", 1)


def adafactor(case):
    case.optimizer_class = torch.optim.Adafactor


def lbfgs(case):
    case.optimizer_class = torch.optim.LBFGS


def shared_ffn(case):
    case.model.blocks[1].ffn = case.model.blocks[0].ffn


def wrong_parts(case):
    case.units["d_ff"] = [Slice("ffn.gate.weight", 0, parts=3)]


def wrong_name(case):
    case.units["d_ff"] = [Slice("gate.weight", 0)]


def hook(case):
    case.model.blocks[0].ffn.gate.weight.register_hook(abs)


def hook_after_accumulation(case):
    weight = case.model.blocks[0].ffn.gate.weight
    weight.register_post_accumulate_grad_hook(lambda p: None)


def sparse_gradient(case):
    case.model.embed.sparse = True
    case.optimizer_class = torch.optim.SGD


def too_few_scores(case):
    case.scores = torch.ones(3)


def equal_scores(case):
    case.scores = torch.ones(24)


def no_groups(case):
    case.units.clear()


REFUSED_BY_SCORE = [
    (adafactor, "blocks.0.ffn.gate.weight: the optimizer's 'row_var'"),
    (lbfgs, "embed.weight: the optimizer's 'old_dirs'"),
    (shared_ffn, "blocks.1.ffn.gate.*twice"),
    (wrong_parts, "blocks.0.ffn.gate.weight: dim 0"),
    (wrong_name, "d_ff: blocks.0 has no .* gate.weight$"),
    (hook, "gate.weight: .* hooks"),
    (hook_after_accumulation, "gate.weight: .* hooks"),
    (sparse_gradient, "embed.weight: .* sparse"),
]
REFUSED_BY_PRUNE = [
    *REFUSED_BY_SCORE,
    (too_few_scores, "blocks.1.d_ff: cannot keep 5 of .* by 3 scores"),
    (equal_scores, "blocks.1.d_ff: all scores are equal"),
    (no_groups, "d_ff: the model has no units of this kind"),
]


def make_case(change):
    """A model after a step of its optimizer, with a pruner, which `change` has
    spoilt."""
    config = replace(CONFIG, tie_embeddings=False)  # a tied gradient is not sparse
    model, _ = make_model(config=config)
    units = {"d_ff": [Slice("ffn.gate.weight", 0), Slice("bias", 0)]}
    case = SimpleNamespace(model=model, units=units)
    case.optimizer_class = ADAMW
    case.scores = torch.rand(24)
    change(case)
    model.groups = lambda: block_groups(model, "blocks", units)
    backward(model)
    case.optimizer = case.optimizer_class(model.parameters())
    case.optimizer.step(lambda: torch.ones(()))
    case.pruner = make_pruner()
    case.pruner.optimizers = [case.optimizer]
    case.pruner.scores = {
        "blocks.0.d_ff": torch.rand(24),
        "blocks.1.d_ff": case.scores,
    }
    return case


@pytest.mark.parametrize("change, message", REFUSED_BY_SCORE)
def test_the_first_score_refuses_what_no_prune_could_cut(change, message):
    case = make_case(change)
    with pytest.raises(ValueError, match=message):
        case.pruner.score(case.model)


@pytest.mark.parametrize("change, message", REFUSED_BY_PRUNE)
def test_what_cannot_be_pruned_is_refused_before_anything_is_cut(change, message):
    case = make_case(change)
    before = list(case.model.parameters())
    with pytest.raises(ValueError, match=message):
        case.pruner.prune(case.model, [case.optimizer], "d_ff", 5)
    after = list(case.model.parameters())
    assert len(after) == len(before)
    assert all(a is b for a, b in zip(after, before))


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
