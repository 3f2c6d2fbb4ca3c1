"""What one does with a run: sample from its model, judge a text by it, draw it."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import events
from test_model import large

from data.tokenizer import encode_bytes
from model import KINDS
from tools import Trained, evaluate, load_trained, plot, sample


@pytest.fixture(scope="module")
def trained(undisturbed) -> Trained:
    """A toy's run, its weights large and random: what it learnt is one token, again and again."""
    trained = load_trained(undisturbed)
    model = trained.model.cpu()  # where the tokens are
    model.unembed.weight = torch.nn.Parameter(model.embed.weight.detach().clone())
    large(model)
    return trained


def test_tokens_come_as_often_as_temperature_and_top_k_say():
    logits = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625]).log() + 3
    generator = torch.Generator().manual_seed(0)
    for temperature, top_k, expected in (
        (0.5, 0, [x / 86 for x in (4, 64, 1, 16, 1)]),  # squares, up to a factor
        (1e-320, 0, [0, 1, 0, 0, 0]),
        (1.0, 2, [0, 2 / 3, 0, 1 / 3, 0]),
    ):
        tokens = [sample.draw_token(logits, temperature, top_k, generator) for _ in range(1000)]
        seen = [tokens.count(i) / 1000 for i in range(5)]
        assert seen == pytest.approx(expected, abs=0.05)
        assert [s == 0 for s in seen] == [e == 0 for e in expected]


def test_each_token_is_the_likeliest_after_its_context_until_the_end(trained):
    def generate(trained: Trained, prompt: list[int], n: int, temperature: float = 0) -> list[int]:
        generator = torch.Generator().manual_seed(1)
        return list(sample.generate(trained, prompt, n, temperature, 0, generator))

    prompt = trained.tokenizer.encode_ordinary("The sum of")
    new, tokens = generate(trained, prompt, 20), list(prompt)
    assert len(prompt) + len(new) > trained.model.config.context_length == 16
    for token in new:
        logits = trained.model(torch.tensor([tokens[-16:]]))[0, -1, : trained.tokenizer.n_vocab]
        assert logits.argmax() == token
        tokens.append(token)
    stop = next(token for token in new if token != new[0])
    ends = replace(trained, tokenizer=SimpleNamespace(n_vocab=1024, eot_token=stop))
    assert generate(ends, prompt, 20) == new[: new.index(stop)]
    few = replace(trained, tokenizer=SimpleNamespace(n_vocab=5, eot_token=-1))  # the rest only pads
    assert max(generate(few, [1], 15, temperature=50.0)) < 5


@pytest.mark.parametrize("times", [1, 8, 17], ids="{} times".format)
def test_each_byte_of_a_text_is_predicted_once(trained, times):
    text = b"The sum of \xff\xfe is \xf0\x9f\x99\x82." * times  # 1: no whole window; 8: no rest
    tokens = [trained.tokenizer.eot_token, *encode_bytes(trained.tokenizer, text)]
    n, nats = len(tokens) - 1, 0.0
    for t in range(1, n + 1):  # each token alone; the last window is full, too
        start = min((t - 1) // 16 * 16, max(0, n - 16))
        logits = trained.model(torch.tensor([tokens[start:t]])).detach()
        p = torch.softmax(logits[0, -1].double(), -1)
        nats -= math.log(p[tokens[t]])
    got = evaluate.judge_text(trained, text)
    assert got["bits per byte"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)
    assert got["perplexity per token"] == pytest.approx(math.exp(nats / n), rel=1e-4)


def test_a_model_that_has_diverged_is_told(undisturbed, tmp_path, capsys, refused):
    path, text = tmp_path / "checkpoint.pt", tmp_path / "text"
    text.write_text("The sum")
    state = torch.load(undisturbed / "checkpoint.pt", weights_only=True)
    state["model"]["norm.weight"].fill_(1e6)  # its perplexity is past the largest float
    torch.save(state, path)
    assert evaluate.main([str(path), f"--text={text}"]) == 0
    assert "| perplexity per token | inf |" in capsys.readouterr().out
    state["model"]["norm.weight"].fill_(math.nan)
    torch.save(state, path)
    refused("not finite", path, main=sample.main)


def test_a_run_is_read_without_its_log_but_not_with_other_data(undisturbed, tmp_path, refused):
    out = shutil.copytree(undisturbed, tmp_path / "run", ignore=lambda *_: ["log.jsonl"])
    for path in (out, out / "checkpoint.pt"):  # after <|endoftext|>
        assert sample.main([str(path), "--prompt=", "--tokens=1"]) == 0
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    torch.save(state | {"data": "of another text"}, out / "checkpoint.pt")
    refused(f"{out}: .*data that .*toy", out, main=sample.main)


def test_pictures_of_several_runs_and_of_units(undisturbed, tmp_path, capsys):
    pytest.importorskip("matplotlib").rcParams["svg.fonttype"] = "none"  # words stay text

    def picture(*arguments, to="picture.svg", made="picture.svg") -> str:
        assert plot.main([*map(str, arguments), f"--to={tmp_path / to}"]) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / made)
        return (tmp_path / made).read_text("utf-8", "replace")

    for to, made in (("picture", "picture.png"), ("", "run.png")):
        assert picture(undisturbed, to=to, made=made)[1:4] == "PNG"
    prunes, (*_, last) = events(undisturbed, "prune"), events(undisturbed, "eval")
    end = f" {last['val_loss']:.3f} (validation), prunes cost {sum(plot.rises(prunes)):.2f}<"
    assert picture(undisturbed, undisturbed).count(f">run ends at{end}") == 2
    most = f" cost most, {max(plot.rises(prunes)):.3f} nats<"  # the headline
    assert picture(undisturbed).count(most) == 1
    assert ">training FLOPs<" in picture(undisturbed, "--flops")
    units = picture(undisturbed, "--units")
    for kind in KINDS:
        added = max(plot.rises([e for e in prunes if e["kind"] == kind]))
        assert f"{plot.NAMES[kind]} cost most, {added:.3f} nats<" in units


def test_prunes_and_validations_are_two_lines_and_runs_meet_where_both_have_one(
    undisturbed, tmp_path
):
    pytest.importorskip("matplotlib")
    log = plot.by_name(undisturbed)
    jumps = [e[key] for e in log["prune"] for key in ("loss_before", "loss_after")]
    other = [e | {"val_loss": e["val_loss"] + 0.01} for e in log["eval"][1:]]
    other[0]["tokens"] -= 1  # where the first run has none
    lines = "".join(json.dumps(e) + "\n" for e in log["step"] + log["prune"] + other)
    (tmp_path / "log.jsonl").write_text(lines)
    loss, minus, *_ = plot.draw([undisturbed, tmp_path]).axes
    drawn = {e["tokens"]: e["val_loss"] for e in log["eval"]}
    x, y = loss.lines[1].get_data()
    assert {a: b for a, b in zip(x, y) if b == b} == drawn  # a gap is NaN
    assert len(x) == len(drawn) + len(log["prune"]) and [*loss.lines[2].get_ydata()] == jumps
    assert [*minus.lines[0].get_xdata()] == plot.along(other[1:])
    assert minus.lines[0].get_ydata() == pytest.approx([0.01] * len(other[1:]))


def test_what_cannot_be_drawn_is_one_line(undisturbed, tmp_path, refused):
    pytest.importorskip("matplotlib")
    refused("to a.b .*not supported", undisturbed, "--to=a.b", main=plot.main)
    refused("take one OUT_DIR", undisturbed, tmp_path, "--units", main=plot.main)
    refused(f"{tmp_path}: its log has no step", tmp_path, main=plot.main)
    refused("ieda: no such run", tmp_path / "ieda", main=plot.main)
    log = (undisturbed / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(log.replace('"event": "prune"', '"event": "none"'))
    refused(f"{tmp_path}: its log has no prune", tmp_path, "--animate", main=plot.main)
    for old, new in (('"kind": ', '"group": '), ('"val_loss": ', '"val_loss": NaN, "was": ')):
        (tmp_path / "log.jsonl").write_text(log.replace(old, new))
        refused(f"{tmp_path}: .*older version, or damaged", tmp_path, main=plot.main)


def test_a_moment_of_the_film_has_the_widths_and_the_prunes_of_the_log(undisturbed):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    log = plot.by_name(undisturbed)
    panels, first = figure.subplots(2 + len(KINDS)), log["prune"][0]
    due = next(units for *_, units in plot.moments_of(log) if units)
    chosen = plot.units_of(log, 0, due)[first["kind"]] == plot.CHOSEN
    assert [row.nonzero()[0].tolist() for row in chosen] == first["removed"]  # where they stand
    for now, done, due in plot.moments_of(log):
        plot.draw_moment(panels, log, now, done, due)
        said = [x.get_title().partition(": ")[2].split(" of ")[0] for x in panels[1:-1]]
        used = dict(zip(plot.units_of(log, done, []), map(int, said)))
        for e in log["prune"][done : done + (not due)]:
            assert used[e["kind"]] == e["width_before"]
        jumps = [e[key] for e in log["prune"][:done] for key in ("loss_before", "loss_after")]
        assert [*panels[-1].lines[2].get_ydata()] == jumps
    assert used == {kind: log["step"][-1][kind] for kind in KINDS}
    assert panels[-1].lines[1].get_ydata()[-1] == log["eval"][-1]["val_loss"]
