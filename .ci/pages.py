"""Checks that the pages are true: commands, numbers, quotes and links.

Run it by: python -m pytest .ci/pages.py

It needs requirements-extra.txt. After you change the notebook, write its outputs by
jupyter execute --inplace docs/by_hand.ipynb
"""

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys

import helpers
import pytest
from conftest import *  # noqa: F403 (its fixtures; one thread, before torch is imported)
from helpers import ROOT
from own_loop import *  # noqa: F403 (its tests)

from configs import load_config
from studies import arms, results
from tools.compare import load_arms, paired, t_test


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


README = read("README.md")
COURSE = read("docs/course.md")
EVIDENCE = read("studies/README.md")
CELLS = json.loads(read("docs/by_hand.ipynb"))["cells"]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("[ds]*/*.md"), ROOT / "docs/by_hand.ipynb"]
TABLES = []
for name, value in vars(arms).items():
    if isinstance(value, dict) and not name.startswith("_"):
        TABLES.append(name)
QUICK = ["--shorter=100", "--batch_size=2", "--eval_tokens=500", "--device=cpu"]


def test_every_command_of_the_readme_works(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^(?:.*&& )?python (.*)", README, re.M)
    assert len(commands) == 7
    for command in commands:
        arguments = shlex.split(command, comments=True)
        if arguments[:2] == ["-m", "pytest"]:
            continue
        if arguments[0] == "train.py":
            is_new = "--resume" not in arguments
            code = helpers.train(*arguments[1:], *(QUICK if is_new else []))
        else:
            code = importlib.import_module(arguments[1]).main(arguments[2:])
        assert code == 0, (command, capsys.readouterr().err)


def test_the_loop_of_the_readme_stands_in_train():
    (loop,) = re.findall(r"```python\n(.*?)```", README, re.S)
    lines = read("train.py").splitlines()
    shown = [line for line in loop.splitlines() if line.strip() != "..."]
    positions = [lines.index(line) for line in shown]
    assert positions == sorted(positions)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_and_no_page_needs_history(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"git\s+show", text)
    for path, part in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        target = page.parent / path if path else page
        assert target.exists(), path
        if part and target.suffix == ".md":
            heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            anchors = []
            for head in heads:
                words = re.sub(r"[^\w\- ]", "", head).lower()
                anchors.append(words.replace(" ", "-"))
            assert part in anchors, f"{path}#{part}"
    for module in re.findall(
        r"python -m ((?:studies|tools|data|docs)(?:\.\w+)+)", text
    ):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_the_workflow_and_pyproject_repeat_the_readme_and_the_requirements():
    workflow = read(".github/workflows/tests.yml")
    commands = re.findall(r"^ +(?:- )?run: (.*)", workflow, re.M)
    known = README.splitlines() + read("docs/running.md").splitlines()
    assert len(commands) == 4
    assert set(commands) < set(known)
    project = read("pyproject.toml")
    files = {"dependencies": "requirements.txt", "extra": "requirements-extra.txt"}
    for key, file in files.items():  # Python 3.10 has no tomllib
        (found,) = re.findall(rf"^{key} = (\[.*?^\])", project, re.M | re.S)
        required = [line for line in read(file).splitlines() if line[:2] != "-r"]
        assert ast.literal_eval(found) == required


def test_the_tables_of_the_evidence_are_those_of_its_runs():
    runs = results.read()
    comparisons = list(results.comparisons(runs))
    leads = list(results.leads(runs))
    claims = [comparison for comparison in comparisons if comparison[0]]
    assert results.claim_table(claims) in EVIDENCE
    assert results.main_table(leads) in EVIDENCE
    assert results.rising_table(runs) in EVIDENCE
    known = results.main_table(leads)
    for _, _, *tests in comparisons:
        known += f"\n{results.effect(*tests)}"
    for effect in re.findall(r"[+-]\d\.\d+ \(.*?\), \d+ of \d+", EVIDENCE):
        assert effect in known
    patch = ["git", "apply", "--check", "studies/by_width.patch"]
    subprocess.run(patch, cwd=ROOT, check=True)


@pytest.mark.parametrize("table", ["configs", *TABLES])
def test_arms_compare_and_scratch_flops_has_the_flops_of_idea(table):
    paths = [f"studies/arms.py:{table}"]
    if table == "configs":
        names = ["idea", "scratch", "scratch_flops", "naive", "oneshot", "enlarged"]
        paths = [f"configs/{name}.py" for name in names]
    for shorter in (1, 8):
        knobs = ["--data_dir=data/sotu", f"--shorter={shorter}"]
        of_name = {arm.name: arm for arm in load_arms(paths, knobs, "idea")}
        small = of_name["scratch_flops"]
        flops = small.plan.flops()
        one_step = flops / small.config.max_steps
        assert abs(flops - of_name["idea"].plan.flops()) < one_step


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("configs/*[!_].py")), ids=lambda x: x.stem
)
def test_every_config_is_valid(path):
    load_config(str(path))


def test_each_change_of_the_course_changes_its_run(tmp_path, toy):
    """Apply the diffs of the exercises in a copy, and train there."""
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns("out", ".git", ".venv", "tests")
    shutil.copytree(ROOT, copy, ignore=ignored)
    data_dir = f"--data_dir={toy.parent / 'data'}"

    def losses(knobs: list[str]) -> list[float]:
        shape = ["--shorter=200", "--batch_size=4", "--context_length=16"]
        command = [sys.executable, "train.py", *knobs, *shape, data_dir, "--overwrite"]
        subprocess.run([*command, "--out_dir=out/one"], cwd=copy, check=True)
        log = (copy / "out/one/log.jsonl").read_text().splitlines()
        return [event["loss"] for event in map(json.loads, log) if "loss" in event]

    diffs = re.findall(r"```diff\n *# ([\w/.]+)\n(.*?)```", COURSE, re.S)
    kept, curve, own = diffs
    naive = ["configs/naive.py", "--prune_start=0.5"]
    idea = ["configs/idea.py"]
    for (file, diff), knobs in [(kept, naive), (curve, idea), (own, idea)]:
        before = losses(knobs)
        path = copy / file
        original = path.read_text(encoding="utf-8")
        lines = diff.rstrip().splitlines()
        old = "".join(f"{line[1:]}\n" for line in lines if line[0] == "-")
        new = "".join(f"{line[1:]}\n" for line in lines if line[0] == "+")
        assert original.count(old) == 1, f"{file} does not have once: {old}"
        path.write_text(original.replace(old, new), encoding="utf-8")
        criterion = re.findall(r'"(\w+)": lambda weight, gradient: gradient', new)
        extra = [f"--criterion={name}" for name in criterion]
        assert losses([*knobs, *extra]) != before
        path.write_text(original, encoding="utf-8")


def test_the_project_of_the_course_has_true_costs_and_records(tmp_path):
    knobs = ["--data_dir=data/sotu"]
    models = re.findall(r"`(\S+)`\|([\d,]+)\|([\d.e]+)\|", COURSE)
    for path, parameters, flops in models:
        (arm,) = load_arms([path], knobs, "scratch_flops")
        assert f"{arm.plan.final.n_params():,}" == parameters
        assert f"{arm.plan.flops():.4g}" == f"{float(flops):.4g}"
    (entry,) = re.findall(r"```python\n(base.*?)```", COURSE, re.S)
    (tmp_path / "arms.py").write_text(entry)
    load_arms([models[0][0], f"{tmp_path}/arms.py:arms"], knobs, "scratch_flops")
    rows = re.findall(r"^(.*)`(\w+),(\w+),(\w+)`\|$", COURSE, re.M)
    for line, study, setting, arm in rows:
        runs = results.read()[f"{study}/{setting}"]
        behind = paired(runs[arm], runs["scratch_flops"])
        lead = -sum(behind) / len(behind)
        losses = [row["val_loss"] for row in runs[arm].values()]
        loss = sum(losses) / len(losses)
        assert f"|{loss:.4f}|{lead:+.4f}|{t_test(behind):.2g}|" in line


def test_the_tasks_of_the_notebook_take_their_solutions(monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(ROOT / "docs")
    names = {"__name__": "by_hand"}
    sources = {cell["id"]: "".join(cell["source"]) for cell in CELLS}
    n_tasks = 0
    for cell in CELLS:
        code = sources[cell["id"]].replace("%matplotlib inline", "")
        if cell["cell_type"] != "code":
            continue
        exec(code.replace('"--shorter=16"', '"--shorter=160", "--batch_size=2"'), names)
        task = re.match(r"turn-(\w+)-code", cell["id"])
        if task:
            n_tasks += 1
            check = re.findall(r"^print\((check_.*\))\)$", code, re.M)[-1]
            assert eval(check, names) == "not solved yet"
            solved = sources[f"turn-{task[1]}-solved"]
            (solution,) = re.findall(r"```python\n(.*?)```", solved, re.S)
            exec(solution, names)
            assert eval(check, names).startswith("right")
    assert n_tasks == 4


def test_the_notebook_holds_nothing_of_the_machine_that_ran_it():
    machine = r'"error"|"stderr"|/(tmp|home|root|usr|Users)/| at 0x'
    assert not re.search(machine, json.dumps(CELLS))
