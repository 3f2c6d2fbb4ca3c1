"""What one does with a run: sample from its model, draw it, watch it elsewhere."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import events, refused, run, same_end
from test_model import large

from model import KINDS
from run.folder import read_log
from tools import plot, sample
from tools.load import Trained, load_trained


@pytest.fixture(scope="module")
def trained(undisturbed) -> Trained:
    """A toy's run, its weights large and random: what it learnt is one token, again and again."""
    trained = load_trained(undisturbed)
    model = trained.model.cpu()  # where the tokens are
    model.unembed.weight = torch.nn.Parameter(model.embed.weight.detach().clone())
    large(model)
    return trained


@pytest.mark.parametrize(
    "choice, expected",
    [
        ({"temperature": 0.5}, [x / 86 for x in (4, 64, 1, 16, 1)]),  # squares, up to a factor
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3, 0]),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_temperature_and_top_k_say(choice, expected):
    logits = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625]).log() + 3
    options = {"temperature": 1.0, "top_k": 0} | choice
    generator = torch.Generator().manual_seed(0)
    tokens = [sample.draw_token(logits, generator=generator, **options) for _ in range(1000)]
    seen = [tokens.count(i) / 1000 for i in range(5)]
    assert seen == pytest.approx(expected, abs=0.05)
    assert [s == 0 for s in seen] == [e == 0 for e in expected]


def generate(trained: Trained, prompt: list[int], n: int, temperature: float = 0.0) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return list(sample.generate(trained, prompt, n, temperature, 0, generator))


def test_each_token_is_the_likeliest_after_its_context_until_the_end(trained):
    prompt = trained.tokenizer.encode_ordinary("The sum of")
    new, tokens = generate(trained, prompt, 20), list(prompt)
    assert len(prompt) + len(new) > trained.model.config.context_length == 16
    for token in new:
        logits = trained.model(torch.tensor([tokens[-16:]]))[0, -1, : trained.vocab_size]
        assert logits.argmax() == token
        tokens.append(token)
    stop = next(token for token in new if token != new[0])
    assert generate(replace(trained, end_of_text=stop), prompt, 20) == new[: new.index(stop)]
    few = replace(trained, vocab_size=5)  # what is beyond only pads
    assert max(generate(few, [1], 15, temperature=50.0)) < 5


def test_a_seed_gives_the_same_samples_again(trained, monkeypatch, capsys):
    def said(*arguments: str) -> str:
        assert sample.main(["run", "--prompt=The sum", "--temperature=2", *arguments]) == 0
        return capsys.readouterr().out

    monkeypatch.setattr(sample, "load_trained", lambda path: trained)
    one, two = said("--seed=3"), said("--seed=3", "--samples=2")
    assert two.startswith(one) and two.count("The sum") == 2 and two[len(one) :].strip("-\n") != one
    assert said("--seed=4") != one
    assert said("--prompt=")  # the empty one follows <|endoftext|>


def test_widths_change_at_the_prunes_however_rarely_steps_are_logged(undisturbed):
    steps = events(undisturbed, "step")
    few = plot.by_name(undisturbed) | {"step": steps[6::7] + steps[-1:]}
    width, trained = dict(zip(*plot.widths(few, "n_kv_head"))), 0
    for step in steps:
        assert step["n_kv_head"] == width[max(x for x in width if x <= trained)]
        trained = step["tokens"]
    assert max(width) == trained


def test_pictures_of_a_run_of_several_and_of_units(undisturbed, tmp_path, capsys):
    pytest.importorskip("matplotlib").rcParams["svg.fonttype"] = "none"  # words stay text

    def picture(*arguments) -> str:
        to = tmp_path / "picture.svg"
        assert plot.main([*map(str, arguments), f"--to={to}"]) == 0
        assert capsys.readouterr().out.strip() == str(to)
        return to.read_text()

    one, two = picture(undisturbed), picture(undisturbed, undisturbed)
    assert all(f">{x}<" in one for x in ("d_ff", "n_kv_head", "learning rate", "recover", "2k"))
    assert ">n_kv_head<" in two and ">recover<" not in two  # phases of one run alone
    units = picture(undisturbed, "--units")
    assert all(f">{kind}: what" in units for kind in KINDS) and ">layer 1<" in units
    drawn = {}  # layer, by its number at first -> how many prunes of d_ff it has seen
    for line in plot.draw_units(undisturbed).axes[1].lines:
        drawn[line.get_label()] = len(line.get_xdata())
    gone = [e["removed"][0][0] for e in events(undisturbed, "prune") if e["group"] == "n_layer"]
    left = [layer for layer in range(4) if layer != gone[0]]
    seen = {f"layer {layer}": 4 for layer in left} | {f"layer {gone[0]}": 2}
    assert drawn == seen and len(gone) == 2
    log = [json.dumps(e) + "\n" for e in read_log(undisturbed) if e["event"] != "prune"]
    (tmp_path / "log.jsonl").write_text("".join(log))
    assert ">learning rate<" in picture(tmp_path)
    refused(capsys, plot.main, tmp_path, "--units", words=f"{tmp_path}: its log has no prune")


def test_a_mirror_shows_the_numbers_of_the_log_and_changes_no_bit(
    toy, undisturbed, tmp_path, monkeypatch
):  # fmt: skip
    out, shown = tmp_path / "run", []
    mirror = SimpleNamespace(log=lambda values, step: shown.append((step, values)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: mirror))
    assert run(toy, out, "--wandb_project=mine") == 0 and same_end(out, undisturbed)
    for e, (step, values) in zip(read_log(out), shown, strict=True):
        numbers = {f"{e['event']}/{k}": e[k] for k in e if isinstance(e[k], (int, float))}
        assert (step, values) == (e["step"], numbers)
