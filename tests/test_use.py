"""What you do with a run: sample from its model, judge a text by it, draw it."""

import json
import math
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_model import large

from configs import compact
from data.tokenizer import encode_to_numpy
from tools import Trained, evaluate, load_trained, plot, sample

SHARES = [
    (0.5, 0, [4 / 86, 64 / 86, 1 / 86, 16 / 86, 1 / 86]),  # squares, normalized
    (1e-320, 0, [0, 1, 0, 0, 0]),
    (1.0, 2, [0, 2 / 3, 0, 1 / 3, 0]),
]
PICTURES = [("", "png"), ("--flops", "svg"), ("--units", "png"), ("--animate", "gif")]


@pytest.fixture(scope="module")
def trained(undisturbed) -> Trained:
    """A run whose weights are large and random, so that its tokens differ."""
    trained = load_trained(undisturbed)
    model = trained.model.cpu()
    model.unembed.weight = torch.nn.Parameter(model.embed.weight.detach().clone())
    large(model)
    return trained


@pytest.mark.parametrize("temperature, top_k, expected", SHARES)
def test_temperature_and_top_k_decide_shares(temperature, top_k, expected):
    logits = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625]).log() + 3
    draw = torch.Generator().manual_seed(0)
    counts = [0] * 5
    for _ in range(1000):
        counts[sample.draw_token(logits, temperature, top_k, draw)] += 1
    shares = [count / 1000 for count in counts]
    assert shares == pytest.approx(expected, abs=0.05)
    assert [x == 0 for x in shares] == [x == 0 for x in expected]


def generated(trained: Trained, prompt: list, n: int, temperature: float = 0) -> list:
    generator = torch.Generator().manual_seed(1)
    return list(sample.generate(trained, prompt, n, temperature, 0, generator))


def test_each_token_is_the_likeliest_after_its_context_until_the_end(trained):
    prompt = trained.tokenizer.encode_ordinary("The sum of")
    new = generated(trained, prompt, 20)
    tokens = list(prompt)
    assert len(prompt) + len(new) > trained.model.config.context_length == 16
    for token in new:
        logits = trained.model(torch.tensor([tokens[-16:]]))[0, -1]
        assert logits[: trained.tokenizer.n_vocab].argmax() == token
        tokens.append(token)
    end = next(token for token in new if token != new[0])
    with_end = replace(trained, tokenizer=SimpleNamespace(n_vocab=1024, eot_token=end))
    assert generated(with_end, prompt, 20) == new[: new.index(end)]
    padded = replace(trained, tokenizer=SimpleNamespace(n_vocab=5, eot_token=-1))
    assert max(generated(padded, [1], 15, temperature=50.0)) < 5


# No full window; no rest; both; and windows shorter than the model's
@pytest.mark.parametrize("times, T", [(1, 16), (8, 16), (17, 16), (8, 5)])
def test_each_byte_of_a_text_is_predicted_once(trained, times, T):
    text = b"The sum of \xff\xfe is \xf0\x9f\x99\x82." * times
    tokens = encode_to_numpy(trained.tokenizer, text).tolist()
    n = len(tokens)
    tokens = [trained.tokenizer.eot_token, *tokens]
    nats = 0.0
    for t in range(1, n + 1):  # each token alone
        start = min((t - 1) // T * T, max(0, n - T))
        logits = trained.model(torch.tensor([tokens[start:t]])).detach()
        nats -= logits[0, -1].double().log_softmax(-1)[tokens[t]].item()
    metrics = evaluate.judge_text(trained, text, T)
    bits_per_byte = nats / math.log(2) / len(text)
    assert metrics["bits per byte"] == pytest.approx(bits_per_byte, rel=1e-5)
    perplexity = math.exp(nats / n)
    assert metrics["perplexity per token"] == pytest.approx(perplexity, rel=1e-4)


def test_a_model_that_cannot_be_used_is_refused(undisturbed, tmp_path, capsys, refused):
    path = tmp_path / "checkpoint.pt"
    text = tmp_path / "text"
    text.write_text("The sum")
    judge = [str(path), f"--text={text}"]
    checkpoint = torch.load(undisturbed / "checkpoint.pt", weights_only=True)
    refused("no such checkpoint", path, main=sample.main)
    own_digest = checkpoint["tokenizer_digest"]
    norm = checkpoint["model"]["norm.weight"]
    norm.fill_(1e6)
    torch.save(checkpoint, path)
    assert evaluate.main(judge) == 0
    assert "| perplexity per token | inf |" in capsys.readouterr().out
    norm.fill_(math.nan)
    for digest, word in (("other files", "its tokenizer"), (own_digest, "not finite")):
        torch.save(checkpoint | {"tokenizer_digest": digest}, path)
        refused(word, path, main=sample.main)
        refused(word, *judge, main=evaluate.main)
    refused("length 17", *judge, "--context_length=17", main=evaluate.main)
    for name in ("a.jsonl", "a.txt.gz"):  # it would judge braces or packed bytes
        refused(f"{name}: give", path, f"--text={name}", main=evaluate.main)


@pytest.mark.parametrize("flag, kind", PICTURES)
def test_a_run_is_drawn(flag, kind, undisturbed, tmp_path, refused):
    pytest.importorskip("matplotlib")
    lines = (undisturbed / "log.jsonl").read_text().splitlines(keepends=True)
    few = "".join(line for line in lines if re.search('"step": 1[07]?,', line))
    log = tmp_path / "log.jsonl"
    log.write_text(few)  # few frames, because a film takes long
    shutil.copy(undisturbed / "config.json", tmp_path)
    flags = [flag] if flag else []
    to = tmp_path / f"a.{kind}"
    assert plot.main([str(tmp_path), str(undisturbed), *flags, f"--to={to}"]) == 0
    magic = {"png": b"\x89PNG", "svg": b"<?xml", "gif": b"GIF89a"}
    assert to.read_bytes().startswith(magic[kind])
    for damaged in ("", few.replace('"kind": ', '"group": ')):
        log.write_text(damaged)
        refused(tmp_path, tmp_path, *flags, main=plot.main)


def test_curves_hold_prunes_warm_ups_and_differences(undisturbed, tmp_path):
    pytest.importorskip("matplotlib")
    log = plot.load_log(undisturbed)
    evals = [e | {"val_loss": e["val_loss"] + 0.01} for e in log.evals[1:]]
    evals[0]["tokens"] -= 1  # where the first run was not validated
    kept = log.steps[9:] + log.prunes + evals
    lines = "".join(json.dumps(event) + "\n" for event in kept)
    (tmp_path / "log.jsonl").write_text(lines)
    shutil.copy(undisturbed / "config.json", tmp_path)
    loss, minus, *_, rate = plot.draw([undisturbed, tmp_path]).axes
    bars = [bar[:, 1] for bar in loss.collections[0].get_segments()]
    assert [bar[0] for bar in bars] == plot.along(log.prunes, "loss_before")
    assert [bar[1] - bar[0] for bar in bars] == plot.rises(log.prunes)
    difference = minus.lines[0]
    assert list(difference.get_xdata()) == plot.along(evals[1:])
    assert difference.get_ydata() == pytest.approx([0.01] * len(evals[1:]))
    whole, begins_late = (line.get_xydata() for line in rate.lines[:2])
    assert begins_late == pytest.approx(whole)


def test_a_film_shows_after_each_prune_what_is_left(undisturbed):
    pytest.importorskip("matplotlib")
    log = plot.load_log(undisturbed)
    _, axes = plot.open_figure(2 + len(log.kinds()), 1)
    caption, *_, loss = axes[:, 0]
    log.steps = [event for event in log.steps if event["step"] in (1, 30)]
    last_of_step = {prune["step"]: prune for prune in log.prunes}
    captions = ["Weak parts go"] * (len(last_of_step) - 1) + ["It recovers"]
    for (step, prune), text in zip(last_of_step.items(), captions):
        plot.draw_moment(axes[:, 0], log, step + 1, other=log)
        assert caption.get_title("left") == text
        assert caption.get_title("right") == f"{compact(prune['params'])} parameters"
        mine, theirs = (line.get_xydata() for line in loss.lines[1::2])
        assert mine.tolist() == theirs.tolist()
        assert len(mine) == step // 10  # validations
