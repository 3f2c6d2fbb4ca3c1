"""What pages say: commands, changes and cells run, but shorter; numbers, quotes and links are true.
`.ci/run` starts it by `python -m pytest .ci/pages.py`: it needs all of requirements-extra.txt.

After a change of docs/by_hand.ipynb, write its outputs by
jupyter nbconvert --to notebook --execute --inplace --ClearMetadataPreprocessor.enabled=True \
    --ClearMetadataPreprocessor.preserve_nb_metadata_mask=kernelspec docs/by_hand.ipynb
"""

import ast
import copy
import csv
import importlib
import json
import lzma
import math
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from statistics import mean, median, stdev
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
from conftest import *  # noqa: F403 (its fixtures; one thread, before torch is imported)

import torch  # isort: skip
from helpers import ROOT, events
from own_loop import *  # noqa: F403 (its tests)

import prune
import schedule
import train
from docs import one_file
from model import SLICES
from run.config import load_config
from run.cost import n_parameters
from studies import arms, results
from tools.compare import load_arms, paired, t_test

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [x for x in re.findall(r"^(?:.*&& )?(python .*)", README, re.M) if "pytest" not in x]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("[ds]*/*.md"), *ROOT.glob("docs/*.ipynb")]
KNOBS = ["--shorter=100", "--batch_size=2", "--eval_tokens=500"]
SHORTER = {"train.py": KNOBS, "tools.compare": [*KNOBS, "--seeds=1"]}  # by a word of a command
SHORTER |= {"configs/smollm2_taught.py": ["--d_ff_target=64", "--prune_start=0.5"]}
SHORTER |= {"docs/one_file.py": ["--max_steps=20"]}
SPREADS = "optimizer/muon", "tokens/dictionary_142", "tokens/dictionary_1540"
RISING = 18, 36, 71, 142, 285  # tokens for each parameter
SMOLLM2 = (ROOT / "studies/smollm2/runs.jsonl").read_text(encoding="utf-8").splitlines()
SMOLLM2 = [[*json.loads(line)["recovered"].values()] for line in SMOLLM2]  # perplexity, LAMBADA
NAMES = ("idea", "scratch", "scratch_flops", "naive", "oneshot", "enlarged", "idea_attention")
TABLES = [name for name, x in vars(arms).items() if isinstance(x, dict) and name[0] != "_"]
COURSE = (ROOT / "docs/course.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"```diff\n *# ([\w/.]+)\n(.*?)```", COURSE, re.S)
RUNS = re.findall(r"^python train\.py (.*)$", COURSE, re.M)
# 20 steps of 4 x 16 tokens; the base prunes four times in steps 4 to 8
SHORT = " --shorter=200 --batch_size=4 --context_length=16 --eval_tokens=500 --device=cpu"
NOTEBOOK = (ROOT / "docs/by_hand.ipynb").read_text(encoding="utf-8")
CELLS = [cell for cell in json.loads(NOTEBOOK)["cells"] if cell["cell_type"] == "code"]


def test_every_command_of_the_readme_works(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers"), pytest.importorskip("matplotlib")

    def start(arm, seed, out_dir):  # not as a process of its own, which takes seconds to start
        code = train.main([arm.path, *arm.knobs, f"--seed={seed}", f"--out_dir={out_dir}"])
        return Mock(returncode=code, poll=lambda: code)

    monkeypatch.setattr("tools.compare.start", start)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "book.txt").write_text("Fellow citizens of the Senate.\n" * 11_000)
    (tmp_path / "data/corpus").mkdir(parents=True)
    with lzma.open(tmp_path / "data/corpus/sotu.jsonl.xz", "wt") as file:
        file.write('{"text": "My fellow citizens of the Senate and the House."}\n' * 1000)
    monkeypatch.chdir(tmp_path)
    # The open model last: what the README exports stands in for its download
    for command in sorted(COMMANDS, key=lambda c: "smollm2" in c):
        _, program, *arguments = shlex.split(command.replace(" -m", ""), comments=True)
        if "smollm2" in command:
            shutil.copytree("out/idea-hf", "out/smollm2-135m", dirs_exist_ok=True)
        for word in SHORTER.keys() & {program, *arguments}:
            arguments += SHORTER[word]
        main = importlib.import_module(program.removesuffix(".py").replace("/", ".")).main
        assert not main(arguments), (command, capsys.readouterr().err)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_quoted_code_stands_in_its_file_and_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for line, file in re.findall(r"\| `([^`]+)` \| `([\w/]+\.py)` \|$", text, re.M):
        assert line in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no line {line}"
    for path, part in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        target = page.parent / path if path else page
        assert target.exists(), path
        if part and target.suffix == ".md":
            heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in heads]
            assert part in slugs, f"{path}#{part}"
    for name in re.findall(r"git\s+show\s+(\w{7}:[\w/.-]+)", text):
        subprocess.run(["git", "cat-file", "-e", name], cwd=ROOT, check=True)
    for module in re.findall(r"python -m ((?:studies|tools|data|docs)(?:\.\w+)+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_the_workflow_and_uv_do_what_the_pages_and_the_requirements_say():
    """Each system has lines of its own; Python 3.10 has no tomllib."""
    workflow = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    runs = re.findall(r"^ +(?:- )?run: (.*)", workflow, re.M)
    install = (ROOT / "docs/running.md").read_text(encoding="utf-8")
    assert len(runs) == 4 and set(runs) < {*README.splitlines(), *install.splitlines()}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for key, file in (("dependencies", "requirements.txt"), ("extra", "requirements-extra.txt")):
        listed = ast.literal_eval(re.search(rf"^{key} = (\[.*?^\])", project, re.M | re.S)[1])
        required = (ROOT / file).read_text(encoding="utf-8").splitlines()
        assert listed == [line for line in required if not line.startswith("-r ")]


def test_the_page_of_evidence_quotes_the_numbers_of_its_runs_and_no_others():
    pytest.importorskip("scipy")
    page, runs = (ROOT / "studies/README.md").read_text(encoding="utf-8"), results.read()
    made, leads = [*results.comparisons(runs)], [*results.leads(runs)]
    assert results.claim_table([x for x in made if x[0]]) in page
    assert results.main_table(leads) in page
    effects = {str(results.effect(*tests)): study for study, _, *tests in made}
    asked = page.partition("## What else")[2].partition("\n## ")[0]
    quoted = {*re.findall(r"[+-]\d\.\d+ \(.*?\), \d+ of \d+", asked)}
    assert {x for x, study in effects.items() if not study} <= quoted <= {*effects}

    def losses(setting: str, arm: str) -> list[float]:
        return sorted(row["val_loss"] for row in runs[setting][arm].values())

    def search(*cells: str) -> float:
        with open(ROOT / "studies/sweeps.csv", encoding="utf-8") as file:
            rows = [[*row.values()] for row in csv.DictReader(file)]
        return mean(float(row[5]) for row in rows if all(map(re.fullmatch, cells, row)))

    first = [
        search("first_edition/main", arm, rate, "(window_percent=10-35; )?min.*=0.01; .*", "1")
        for arm, rate in (("idea", "0.008"), ("scratch", "0.008"), ("scratch", "0.0113"))
    ]
    spreads = [stdev(results.minus(runs[x], "scratch_flops")) for x in SPREADS]
    late = [mean(results.minus(runs[f"window/{x}"], idea="idea_50_75")) for x in ("late", "when")]
    three = [*late, *spreads, *(mean(x.differences) for x in leads if x.low)]
    three += [x - first[0] for x in first[1:]]
    three += [4.303 * spreads[0] / 3**0.5, 2.262 * spreads[0] / 10**0.5]  # Student's t
    two = [search("size/dictionary_36_250k", "idea", "3.2e-2", ".*adamw.*second", ".*")]
    two += [mean(losses("size/dictionary_36_250k_adamw", "idea"))]
    heaps = (losses("tokens/dictionary_1540", arm) for arm in ("idea", "scratch_flops"))
    two += [x[i] for x, which in zip(heaps, ([0, 1, 2, -1], [0, 2])) for i in which]
    four = [stdev(losses(f"window/{x}", "scratch")) for x in ("late", "when")]
    said = {f"{abs(x):.{n}f}" for n, of_n in ((2, two), (3, three), (4, four)) for x in of_n}
    rises = [
        [results.minus(runs[f"rising/rising_{n}{end}"], "scratch_flops") for n in RISING]
        for end in ("", "_adamw")
    ]
    for rising in rises:
        assert "|".join(f"{mean(d):+.3f}" for d in rising) in page
        assert "|".join(f"{sum(x > 0 for x in d)} of 10" for d in rising) in page
    assert "|".join(f"{median(d):+.3f}" for d in rising) in page
    usual = [runs[x] for x in ("tokens/speeches_18", "restart/speeches_142")]
    law = [min(rises[0][-1]), median(rises[0][-1])]
    law += [mean(results.minus(x, "scratch_flops")) for x in usual]
    law += [next(mean(d) for study, _, *(d,) in made if study == "rising")]
    of_idea = (runs[f"rising/rising_{n}_adamw"]["idea"][71] for n in RISING[2:])
    doublings = [math.log2(run["tokens"] / run["params"]) for run in of_idea]
    late = results.slopes(doublings, rising[2:])
    assert f"p = {t_test(late):.1f}" in page
    long = [
        ("rising/rising_18_adamw", arm, rate, ".*warmup=10%.*", ".*")
        for arm, rate in (("idea", "3.2e-2"), ("scratch_flops", "1.6e-2"))
    ]
    said |= {f"{abs(x):.3f}" for x in (*law, mean(late))}
    said |= {f"{search(*x):.3f}" for x in long}
    warm = runs["warm-up/warmup_10_250k"]
    gains = [results.minus(warm, arm) for arm in ("idea_short", "scratch", "scratch_flops")]
    said |= {f"{abs(mean(gain)):.3f}" for gain in gains}
    two = [losses("warm-up/warmup_10_250k", "idea")[i] for i in (0, -1)]
    two += [losses("rising/rising_18_adamw", "scratch_flops")[i] for i in (0, 3, 4, -1)]
    said |= {f"{x:.2f}" for x in two}
    prose = "\n".join(line for line in page.splitlines() if line[:1] != "|")
    numbers = {*re.findall(r"(?<![\d.])\d\.\d{2,}\b(?!e)", prose)}
    assert numbers - {"0.01", "0.02", "0.05", "2.13"} == said  # units, a start, torch
    idea, small, *_ = (x.values() for x in runs["size/dictionary_36_250k"].values())
    rise = [sum(x[y] for x in idea) / sum(x[y] for x in small) - 1 for y in ("seconds", "flops")]
    cells = {line.rsplit("`")[-2]: line for line in asked.splitlines() if line.endswith("`|")}
    assert re.findall(r"\d+%", cells["speed"]) == [f"{x:.0%}" for x in rise]
    assert {*re.findall(r"\d\d\.\d", cells["smollm2"])} <= {str(x) for x, _ in SMOLLM2}
    for perplexity, lambada in re.findall(r"\|(\d\d\.\d)\|(0\.\d\d)\|", README):
        assert (perplexity, lambada) in [(f"{x}", f"{y:.2f}") for x, y in SMOLLM2]
    three = {seed: runs["restart/speeches_142"]["scratch"][seed] for seed in (1, 2, 3)}
    keeps = mean(paired(three, runs["restart/speeches_142"]["idea"]))
    (wide,) = [mean(tests[0]) for _, words, *tests in made if words == "wide"]
    assert round(wide / keeps) == 7 and "a seventh" in asked


def changed(file: str, diff: str) -> str:
    """What a reader does: replace the lines with a minus."""
    text = (ROOT / file).read_text(encoding="utf-8")
    lines = [line.lstrip(" ") for line in diff.rstrip().splitlines()]
    old, new = ("".join(x[1:] + "\n" for x in lines if x[0] == sign) for sign in "-+")
    assert text.count(old) == 1, f"{file} has not once: {old}"
    return text.replace(old, new)


def test_the_runs_of_the_course_differ_and_each_change_makes_another(toy, tmp_path, monkeypatch):
    def run(command: str) -> list[tuple[int, float]]:
        """The widths and the losses of the steps."""
        arguments = [*(command + SHORT).split(), f"--data_dir={toy.parent / 'data'}", "--overwrite"]
        with patch.dict("run.config.CHOICES", criterion=prune.CRITERIA):  # as a new process has it
            assert train.main(arguments) == 0
        out = re.search(r"--out_dir=(\S+)", command)[1]
        return [(e["d_ff"], e["loss"]) for e in events(tmp_path / out, "step")]

    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    cut = re.search(r"`(configs/cut\.py)`:\n\n```python\n(.*?)```", COURSE, re.S)
    Path(cut[1]).write_text(cut[2])
    *others, kept, magnitude, curve, own = RUNS
    seen = [run(command) for command in (*others, magnitude)]
    assert all(seen.count(x) == 1 for x in seen)
    for (file, diff), command in zip(DIFFS, (kept, curve, own), strict=True):
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        with patch.dict(vars(module)), monkeypatch.context() as patched:  # until the end of this
            exec(changed(file, diff), vars(module))
            patched.setattr("run.cost.Schedule", schedule.Schedule)
            assert run(command) not in seen, f"changes nothing: {diff}"


def test_the_numbers_of_the_course_are_of_its_runs_and_of_the_schedule():
    pytest.importorskip("scipy")
    every = results.read()
    runs, after = every["course/short"], every["course/pruned_96"]

    def minus(arm: str, base: str) -> list[float]:
        return results.minus(runs, arm, base)

    def spread(x: list[float], sign: str) -> str:
        return f"{mean(x):{sign}} ({min(x):{sign}} to {max(x):{sign}})"

    said = [spread(minus(arm, "idea"), "+.3f") for arm in ("paper", "magnitude")]
    clear = [("plateau", "idea"), ("naive_50", "oneshot_50"), ("naive_50_kept", "oneshot_50")]
    assert all(t_test(minus(*arms)) < 0.001 for arms in clear)
    said += [f"{mean(minus(*arms)):+.3f}" for arms in (*clear, ("gradient_size", "idea"))]
    d = minus("oneshot_50_fresh", "oneshot_50")
    said += [f"{mean(d):.3f} (p = {t_test(d):.3f})"]
    for setting in ("tokens/speeches_36", "restart/speeches_142"):  # exercise 7
        for small in ("scratch", "scratch_flops"):
            d = results.minus(every[setting], small)
            said += [f"{abs(mean(d)):.3f} ({t_test(d):.2f})"]
    losses = {arm: [row["val_loss"] for row in rows.values()] for arm, rows in after.items()}
    said += [spread(losses[arm], ".2f") for arm in ("sensitivity", "magnitude", "random")]
    best, own = losses["sensitivity"], losses["gradient_size"]
    said += [f"{mean(best):.2f}", f"{mean(own):.2f}"]
    assert sum(a > b for a, b in zip(best, own)) == 9
    late = ["--prune_start=0.5", "--prune_end=0.75"]
    for knobs, last in ([], 351), (late, 751):
        s = schedule.Schedule(load_config("configs/idea.py", ["--shorter=4", *knobs]))
        said += [f"{s.width(201, 'd_ff')}", f"{s.rate_share(last, 1000):.0%}"]
        assert [*s.prune_steps()][-1] == last
    assert [number for number in said if number not in COURSE] == []


MISTAKES = {  # task -> changes of its solution, and words of what its check says then
    "cut": [
        ("up[stays]", "gate[stays]", "own matrix"),
        ("gate[stays]", "gate", "row or a column"),
        ("down[:, stays]", "down[stays]", "row or a column"),
    ],
    "score": [
        (".sqrt()", "", "root"),
        ("gate.square().sum(1) + ", "", "matrix missing"),
        ("(gate.square()", "(torch.cat([gate, up, down])", "column of down"),
    ],
    "choice": [("descending=True", "", "stays"), ("[:n_keep]", "[:3]", "3 neurons stay")],
    "width": [("// 100 * 100 ", "", "hold until"), ("round_up", "int", "multiple of 16")],
}


def test_the_cells_of_the_notebook_run_and_its_tasks_take_their_solutions_and_nothing_else():
    pytest.importorskip("matplotlib").use("Agg")
    Path("train.py").touch()  # a cell looks for the project's folder by it
    names, mistakes = {"__name__": "by_hand"}, dict(MISTAKES)
    sources = {cell["id"]: "".join(cell["source"]) for cell in json.loads(NOTEBOOK)["cells"]}
    for cell in CELLS:
        code = sources[cell["id"]].replace("%matplotlib inline", "")
        exec(code.replace('"--shorter=16"', '"--shorter=160", "--batch_size=2"'), names)
        if task := re.match(r"turn-(\w+)-code", cell["id"]):
            check = re.findall(r"^print\((check_.*\))\)$", code, re.M)[-1]
            assert eval(check, names) == "not solved yet"
            solution = re.search(r"```python\n(.*?)```", sources[f"turn-{task[1]}-solved"], re.S)[1]
            for old, new, word in mistakes.pop(task[1]):
                assert old in solution
                exec(solution.replace(old, new), names)
                with pytest.raises(AssertionError, match=word):
                    eval(check, names)
            exec(solution, names)
            assert eval(check, names).startswith("right")
    assert not mistakes
    for moments, is_same in (("sliced", True), ("fresh", False)):  # what it says of Muon
        for u, v in zip(names["updates"][moments], names["unpruned"]):
            assert ((u * v).sum() / (u.norm() * v.norm()) > 0.99) == is_same


def test_the_notebook_has_its_outputs_and_nothing_of_the_machine_that_made_them():
    shows = [cell for cell in CELLS if re.search(r"print\(|show\(", "".join(cell["source"]))]
    assert all(cell["outputs"] for cell in shows)
    assert not re.search(r'"error"|"stderr"|/(tmp|home|root|usr|Users)/| at 0x|iopub', NOTEBOOK)


def test_the_project_has_true_costs_and_records_and_its_entry_compares(tmp_path):
    knobs, small = ["--data_dir=data/sotu"], re.findall(r"`(\S+)`\|([\d,]+)\|([\d.e]+)\|", COURSE)
    for path, parameters, flops in small:
        (arm,) = load_arms([path], knobs, "scratch_flops")
        assert f"{n_parameters(arm.plan.final):,}" == parameters
        assert f"{arm.plan.flops():.4g}" == f"{float(flops):.4g}"
    (entry,) = re.findall(r"```python\n(base.*?)```", COURSE, re.S)
    (tmp_path / "arms.py").write_text(entry)
    load_arms([small[0][0], f"{tmp_path}/arms.py:arms"], knobs, "scratch_flops")
    for line, study, name, arm in re.findall(r"^(.*)`(\w+),(\w+),(\w+)`\|$", COURSE, re.M):
        runs = results.read()[f"{study}/{name}"]
        behind = paired(runs[arm], runs["scratch_flops"])
        loss = mean(row["val_loss"] for row in runs[arm].values())
        assert f"|{loss:.4f}|{-mean(behind):+.4f}|{t_test(behind):.2g}|" in line, line


@pytest.mark.parametrize("table", ["", *TABLES])
def test_arms_of_the_studies_compare_and_scratch_flops_is_even_to_a_step(table):
    paths = [f"studies/arms.py:{table}"] if table else [f"configs/{name}.py" for name in NAMES]
    for shorter in (1, 8):
        knobs = ["--data_dir=data/sotu", f"--shorter={shorter}"]
        arms = {arm.name: arm for arm in load_arms(paths, knobs, "idea")}
        idea, ours = (arms[name].plan.flops() for name in ("idea", "scratch_flops"))
        assert abs(ours - idea) < ours / arms["scratch_flops"].config.max_steps


def test_train_takes_every_config():
    assert all(load_config(str(path), []) for path in ROOT.glob("configs/*.py"))


SMALL = {"max_steps": 24, "batch_size": 2, "context_length": 8, "warmup_steps": 4, "prune_every": 2}


def settings(**changes) -> SimpleNamespace:
    """Those of one_file.py, and what the schedule takes besides."""
    others = {"prune_schedule": "cubic", "lr_restart": False, "min_lr_fraction": 0.0}
    return SimpleNamespace(**vars(one_file.Config()) | others | changes)


@pytest.mark.parametrize("changes", [{}, SMALL, {"prune_start": 0.3, "d_ff": 250}])
def test_width_and_learning_rate_are_those_of_the_schedule_at_all_steps(changes):
    s, steps = schedule.Schedule(c := settings(**changes)), range(1, c.max_steps + 1)
    assert [one_file.width(step, c) for step in steps] == [s.width(step, "d_ff") for step in steps]
    rates = [one_file.learning_rate(step, c) for step in steps]
    assert rates == pytest.approx([s.learning_rate(step) for step in steps])


def test_scores_are_those_of_prune_and_a_cut_model_computes_what_a_masked_one_does():
    torch.manual_seed(1)
    model, batch = one_file.GPT(settings(**SMALL)), torch.randint(256, (2, 3, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(*batch).backward()
    optimizer.step()
    masked, its_optimizer = copy.deepcopy((model, optimizer))
    keep, goes = torch.arange(1, 256, 3), torch.arange(256) % 3 != 1
    for i, block in enumerate(model.blocks):
        slices = [x._replace(name=x.name.replace("ffn.", f"blocks.{i}.")) for x in SLICES["d_ff"]]
        group = prune.UnitGroup(f"blocks.{i}.d_ff", "d_ff", 256, tuple(slices))
        scores = prune.unit_scores(model, group, "sensitivity").detach()
        torch.testing.assert_close(one_file.unit_scores(block, "sensitivity"), scores)
        one_file.slice_group(block, optimizer, keep)
        for name, dim, _ in slices:
            small, large = model.get_parameter(name), masked.get_parameter(name)
            for key in ("exp_avg", "exp_avg_sq"):
                moment = its_optimizer.state[large][key].index_select(dim, keep)
                assert torch.equal(optimizer.state[small][key], moment)
            large.data.index_fill_(dim, goes.nonzero().squeeze(1), 0.0)
    torch.testing.assert_close(model(*batch), masked(*batch))
