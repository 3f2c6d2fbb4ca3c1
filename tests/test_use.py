"""What one does with a run: sample from its model, judge a text by it, draw it."""

import json
import math
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_model import large

from data.tokenizer import encode_to_numpy
from run.log import compact
from tools import Trained, evaluate, load_trained, plot, sample

PICTURES = [([], "a.png"), (["--flops"], "a.svg"), (["--units"], "a.png"), (["--animate"], "a.gif")]


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
    for temperature, top_k, expected in (
        (0.5, 0, [x / 86 for x in (4, 64, 1, 16, 1)]),  # squares, up to a factor
        (1e-320, 0, [0, 1, 0, 0, 0]),
        (1.0, 2, [0, 2 / 3, 0, 1 / 3, 0]),
    ):
        draw = torch.Generator().manual_seed(0)
        tokens = [sample.draw_token(logits, temperature, top_k, draw) for _ in range(1000)]
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
    tokens = [trained.tokenizer.eot_token, *encode_to_numpy(trained.tokenizer, text).tolist()]
    n, nats = len(tokens) - 1, 0.0
    for t in range(1, n + 1):  # each token alone; the last window is full, too
        start = min((t - 1) // 16 * 16, max(0, n - 16))
        logits = trained.model(torch.tensor([tokens[start:t]])).detach()
        p = torch.softmax(logits[0, -1].double(), -1)
        nats -= math.log(p[tokens[t]])
    got = evaluate.judge_text(trained, text, 16)
    assert got["bits per byte"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)
    assert got["perplexity per token"] == pytest.approx(math.exp(nats / n), rel=1e-4)


def test_a_text_is_judged_in_windows_of_a_length_that_one_gives(undisturbed, capsys, refused):
    call, bits = [str(undisturbed), f"--text={__file__}"], []
    for T in (16, 4):
        assert evaluate.main([*call, f"--context_length={T}"]) == 0
        bits += capsys.readouterr().out.split()[-2:-1]
    assert bits[0] != bits[1]  # this model sees more of the text, or less
    refused("context_length 17", *call, "--context_length=17", main=evaluate.main)
    for name in ("a.jsonl", "a.txt.gz"):  # it would judge braces, or what is packed
        refused(f"{name}: give", call[0], f"--text={name}", main=evaluate.main)


def test_a_model_that_diverged_or_lacks_its_data_is_told(undisturbed, tmp_path, capsys, refused):
    path = tmp_path / "checkpoint.pt"
    (text := tmp_path / "text").write_text("The sum")
    state = torch.load(undisturbed / "checkpoint.pt", weights_only=True)
    refused("there is run", undisturbed.with_name("ru"), main=sample.main)
    state["model"]["norm.weight"].fill_(1e6)  # its perplexity is past the largest float
    torch.save(state, path)
    assert evaluate.main([str(path), f"--text={text}"]) == 0
    assert "| perplexity per token | inf |" in capsys.readouterr().out
    state["model"]["norm.weight"].fill_(math.nan)
    of_others = {"data": "of another text", "tokenizer": "of other files"}
    for change, word in (({}, "not finite"), (of_others, "data that ")):
        torch.save(state | change, path)
        refused(word, path, main=sample.main)
        refused(word, path, f"--text={text}", main=evaluate.main)


def test_a_film_says_after_each_prune_what_is_left(undisturbed):
    pytest.importorskip("matplotlib")
    log = plot.by_name(undisturbed, pruned=True)
    _, axes = plot.open_figure(2 + len({e["kind"] for e in log["prune"]}), 1)
    log["step"] = [e for e in log["step"] if e["step"] in (1, 30)]  # as if it had logged no other
    other = [e | {"run": "b"} for e in log["eval"]]
    for now, later in zip(log["prune"], [*log["prune"][1:], {"step": 31}]):
        if now["step"] < later["step"]:  # the last one of its step
            plot.draw_moment(axes[:, 0], log, now["step"] + 1, other)
            assert axes[0, 0].get_title("right") == f"{compact(now['params'])} parameters"
            caption = "It recovers" if later["step"] > 30 else "Weak parts go"
            assert axes[0, 0].get_title("left") == caption
            mine, theirs = (line.get_xydata() for line in axes[-1, 0].lines[1::2])
            assert mine.tolist() == theirs.tolist() and len(mine) == now["step"] // 10


@pytest.mark.parametrize("flags, name", PICTURES)
def test_a_run_is_drawn(flags, name, undisturbed, tmp_path, capsys, refused):
    pytest.importorskip("matplotlib")
    log = (undisturbed / "log.jsonl").read_text().splitlines(keepends=True)
    few = "".join(x for x in log if re.search('"step": 1[07]?,', x))  # a film takes long
    (tmp_path / "log.jsonl").write_text(few)
    shutil.copy(undisturbed / "config.json", tmp_path)
    assert plot.main([str(tmp_path), str(undisturbed), *flags, f"--to={tmp_path / name}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / name}\n"
    magic = {"png": b"\x89PNG", "svg": b"<?xml", "gif": b"GIF89a"}[name[2:]]
    assert (tmp_path / name).read_bytes().startswith(magic)
    for damaged in ("", few.replace('"kind": ', '"group": ')):
        (tmp_path / "log.jsonl").write_text(damaged)
        refused(tmp_path, tmp_path, *flags, main=plot.main)


def test_prunes_are_bars_runs_meet_where_both_have_one_and_warm_ups_show(undisturbed, tmp_path):
    pytest.importorskip("matplotlib")
    log = plot.by_name(undisturbed)
    other = [e | {"val_loss": e["val_loss"] + 0.01} for e in log["eval"][1:]]
    other[0]["tokens"] -= 1  # where the first run has none
    lines = "".join(json.dumps(e) + "\n" for e in log["step"][9:] + log["prune"] + other)
    (tmp_path / "log.jsonl").write_text(lines)
    shutil.copy(undisturbed / "config.json", tmp_path)
    loss, minus, *_, rate = plot.draw([undisturbed, tmp_path]).axes
    jumps = [e[key] for e in log["prune"] for key in ("loss_before", "loss_after")]
    assert [end for bar in loss.collections[0].get_segments() for end in bar[:, 1]] == jumps
    assert [*minus.lines[0].get_xdata()] == plot.along(other[1:])
    assert minus.lines[0].get_ydata() == pytest.approx([0.01] * len(other[1:]))
    whole, begins_late = (line.get_xydata() for line in rate.lines[:2])
    assert begins_late == pytest.approx(whole)
