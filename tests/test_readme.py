"""What pages say: commands, changes and cells run, but shorter; numbers, quotes and links are true.

After a change of docs/by_hand.ipynb, write its outputs by
jupyter nbconvert --to notebook --execute --inplace --ClearMetadataPreprocessor.enabled=True \
    --ClearMetadataPreprocessor.preserve_nb_metadata_mask=kernelspec docs/by_hand.ipynb
"""

import ast
import importlib
import json
import lzma
import re
import shlex
import shutil
from pathlib import Path
from statistics import mean
from unittest.mock import Mock, patch

import pytest
from helpers import ROOT, events

import prune
import schedule
import train
from docs import pictures
from run.config import load_config
from studies import arms
from studies.results import effect, read, rows, small_model_tests, table
from tools.compare import load_arms, paired, read_arms, t_test

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [x for x in re.findall(r"^(?:.*&& )?(python .*)", README, re.M) if "pytest" not in x]
STUDIES = [*ROOT.glob("studies/**/README.md")]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "docs/by_hand.ipynb", *STUDIES]
SCRIPTS = sorted(ROOT.glob("studies/**/*.py"))
KNOBS = ["--shorter=100", "--batch_size=2", "--eval_tokens=500"]
SHORTER = {"train.py": KNOBS, "tools.compare": [*KNOBS, "--seeds=1"]}  # by a word of a command
SHORTER |= {"configs/smollm2_taught.py": ["--d_ff_target=64", "--prune_start=0.5"]}
SHORTER |= {"tools.evaluate": ["--text=configs/idea.py"]}
EXERCISE_7 = "tokens/speeches_36", "restart/speeches_142"
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
    for command in sorted(COMMANDS, key=lambda c: ("smollm2" in c, "convert" not in c)):
        _, program, *arguments = shlex.split(command.replace(" -m", ""), comments=True)
        if program == "studies.smollm2.convert":
            shutil.copytree("out/idea-hf", "out/smollm2-135m")
            continue
        for word in SHORTER.keys() & {program, *arguments}:
            arguments += SHORTER[word]
        main = importlib.import_module(program.removesuffix(".py")).main
        assert main(arguments) == 0, (command, capsys.readouterr().err)
    assert len(COMMANDS) > 10 and Path("out/idea/run.gif").read_bytes().startswith(b"GIF89a")


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
    for file in re.findall(r"(?<!:)(?:configs|studies)/[\w/.]+\.py", text):  # not of COMMIT:PATH
        assert page not in STUDIES or (ROOT / file).exists(), file


def test_the_workflow_and_uv_do_what_the_readme_and_its_requirements_say():
    """Each system has lines of its own; Python 3.10 has no tomllib."""
    workflow = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    runs = re.findall(r"^ +(?:- )?run: (.*)", workflow, re.M)
    assert len(runs) == 4 and set(runs) < set(README.splitlines())
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for key, file in (("dependencies", "requirements.txt"), ("extra", "requirements-extra.txt")):
        listed = ast.literal_eval(re.search(rf"^{key} = (\[.*?^\])", project, re.M | re.S)[1])
        required = (ROOT / file).read_text(encoding="utf-8").splitlines()
        assert listed == [line for line in required if not line.startswith("-r ")]


def test_the_readme_and_its_pictures_show_what_the_studies_and_the_schedule_say():
    pytest.importorskip("scipy"), pytest.importorskip("matplotlib")
    made = list(rows(small_model_tests()))
    assert table(made) in (ROOT / "studies/README.md").read_text(encoding="utf-8")
    leads = [w[1:3] for w, e in made if "small" in w[0] and e.low > 0]
    assert leads == [["36 to 142", "Muon"], ["142", "AdamW"], ["570", "AdamW"], ["570", "AdamW"]]
    when = read("window/when")
    said = [effect([paired(when["idea_50_75"], when["idea_10_35"])]).pairs]
    (speeches,) = [e for w, e in made if "cosine" in w[0] and "speeches" in w[1]]
    said += [f"{speeches.mean:.3f}", speeches.pairs]

    section = " ".join(README.partition("## Does it work?")[2].partition("\n## ")[0].split())
    assert re.findall(r"\d+ of \d+|\d\.\d{3,}|\d+ settings", section) == said
    (forest,) = pictures.forest(made).axes
    labels = {label.get_text() for label in forest.get_yticklabels()}
    assert labels == {words[0] for words, _ in made} | {", ".join(words[1:]) for words, _ in made}
    assert [text.get_text() for text in forest.texts] == [e.pairs for _, e in made]
    for *_, setting, pairs in small_model_tests():  # exercise 7
        for d in pairs.values() if setting in EXERCISE_7 else ():
            leader = "IDEA" if mean(d) > 0 else "small model"
            assert f"|{leader} by {abs(mean(d)):.3f} ({t_test(d):.2f})|" in COURSE
    words = re.search(r"tools\.compare (.*) --seeds", COURSE)[1].split()
    paths, knobs = ([x for x in words if x.startswith("--") == is_knob] for is_knob in (0, 1))
    idea, small, longer = load_arms(paths, [*knobs, "--data_dir=data/sotu"], "idea")
    assert idea.plan.final == small.plan.final == longer.plan.final
    assert small.plan.flops() < longer.plan.flops() == pytest.approx(idea.plan.flops(), rel=0.01)
    panels = pictures.leads(made).axes
    verdicts = [text.get_text() for panel in panels for text in panel.texts]
    for lead, n in (("IDEA by 0.019 nats (2%", 1), ("small model by 0.023", 1), ("no clear", 4)):
        assert len([words for words in verdicts if words.startswith(lead)]) == n
    dots = [line.get_xdata() for panel in panels for line in panel.lines]
    drawn = [e.mean for w, e in made[2:] if "570" not in w[1] or w[2] != "Muon"]  # as README says
    assert sorted(x[0] for x in dots if len(x) == 1) == sorted(drawn)
    s = schedule.Schedule(load_config("configs/idea.py", ["--learning_rate=1", "--shorter=4"]))
    drawn = zip(*(panel.lines[0].get_ydata() for panel in pictures.method().axes[1::2]))
    assert [*drawn] == [(s.width(i, "d_ff"), s.learning_rate(i)) for i in range(1, 1001)]


def test_every_script_of_a_study_imports_and_train_takes_every_config_and_arm():
    for path in SCRIPTS:
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    paths = [*map(str, ROOT.glob("configs/*.py"))]
    dicts = {name: x for name, x in vars(arms).items() if isinstance(x, dict) and name[0] != "_"}
    tables = [name for name, x in dicts.items() if isinstance([*x.values()][0], dict)]
    paths += [f"studies/arms.py:{name}" for name in tables]
    every = [arm for path in paths for arm in read_arms(path)[1].values()]
    assert len(every) > 80 and all(load_config(*arm) for arm in every)


def changed(file: str, diff: str) -> str:
    """What a reader does: replace the lines with a minus."""
    text = (ROOT / file).read_text(encoding="utf-8")
    lines = [line.lstrip(" ") for line in diff.rstrip().splitlines()]
    old, new = ("".join(x[1:] + "\n" for x in lines if x[0] == sign) for sign in "-+")
    assert text.count(old) == 1, f"{file} has not once: {old}"
    return text.replace(old, new)


def test_every_change_of_the_course_applies_runs_and_changes_the_run(toy, tmp_path, monkeypatch):
    def run(command: str) -> list[tuple[int, float]]:
        """The widths and the losses of the steps."""
        arguments = [x.replace("configs", f"{ROOT}/configs") for x in (command + SHORT).split()]
        with patch.dict("run.config.CHOICES", criterion=prune.CRITERIA):  # as a new process has it
            assert train.main([*arguments, f"--data_dir={toy.parent / 'data'}", "--overwrite"]) == 0
        out = re.search(r"--out_dir=(\S+)", command)[1]
        return [(e["d_ff"], e["loss"]) for e in events(tmp_path / out, "step")]

    enlarged, *criteria = RUNS[:4]
    base, chance, late, oneshot, naive, kept, sized, *exercises = RUNS[4:]
    monkeypatch.chdir(tmp_path)
    wide, unchanged = run(enlarged), run(base)
    assert {width for width, _ in wide} == {unchanged[0][0]} != {unchanged[-1][0]}
    assert [re.search(r"criterion=(\w+)", c)[1] for c in criteria] == [*prune.CRITERIA]
    sensitivity, _, random = map(run, criteria)
    for a, b in zip(sensitivity, random):
        assert (a == b) == (a[0] == wide[0][0])  # until the prune
    restarts, goes_on = run(naive), run(oneshot)
    assert [width for width, _ in restarts] == [width for width, _ in goes_on]  # one step
    assert restarts != goes_on and unchanged not in map(run, (chance, late, sized))
    others = restarts, unchanged, sensitivity
    for (file, diff), exercise, other in zip(DIFFS, (kept, *exercises), others, strict=True):
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        with patch.dict(vars(module)), monkeypatch.context() as patched:  # until the end of this
            exec(changed(file, diff), vars(module))
            patched.setattr("run.cost.Schedule", schedule.Schedule)
            assert run(exercise) != other, f"changes nothing: {diff}"
    assert run(base) == unchanged


def test_what_the_course_works_out_by_hand_is_so():
    late = ["--prune_start=0.5", "--prune_end=0.75"]
    plans = [load_config("configs/idea.py", ["--shorter=4", *knobs]) for knobs in ([], late)]
    early, late = map(schedule.Schedule, plans)
    widths = [early.width(step, "d_ff") for step in (200, 201, 250, 251, 350, 351)]
    assert widths == [160, 144, 128, 112, 112, 96]
    assert "**144**, at step 201" in COURSE and "**at step 351**" in COURSE
    for s, last, share in ((early, 351, "39%"), (late, 751, "3%")):
        assert [*s.prune_steps()][-1] == last
        assert f"{s.rate_share(last, 1000):.0%}" == share and share in COURSE


def test_the_tables_of_the_course_are_of_its_runs():
    pytest.importorskip("scipy")
    runs = read("restart/course_short")
    spread = "|final loss|{0:+.3f} ({1:+.3f} to {2:+.3f})|"
    for arm, base, shows in (
        ("paper", "idea", spread),
        ("magnitude", "idea", spread),
        ("plateau", "idea", "|final loss|{0:+.3f} (p < 0.001)|"),
        ("naive_50", "oneshot_50", "|naive|{0:+.3f} (p < 0.001)|"),
        ("naive_50_kept", "oneshot_50", "|naive with its old optimizer|{0:+.3f} (p < 0.001)|"),
        ("oneshot_50_fresh", "oneshot_50", "clear, but small {0:.3f} (p = {3:.3f})"),
        ("gradient_size", "idea", "we cannot tell ({0:+.3f})"),
    ):
        d = paired(runs[arm], runs[base])
        p = t_test(d)
        assert shows.format(mean(d), min(d), max(d), p) in COURSE, arm
        assert "<" not in shows or p < 0.001
    lines = (ROOT / "studies/restart/pruned.csv").read_text().split()[1:]
    after: dict = {}
    for arm, width, _, _, loss in (line.split(",") for line in lines):
        after.setdefault((arm, width), []).append(float(loss))
    criteria = [after[arm, "96"] for arm in ("sensitivity", "magnitude", "random")]
    cells = [f"{mean(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in criteria]
    assert f"|{'|'.join(cells)}|" in COURSE
    best, own = after["sensitivity", "96"], after["gradient_size", "96"]
    assert sum(a > b for a, b in zip(best, own)) == 9
    assert f"|{mean(best):.2f}|{mean(own):.2f}, lower in nine (p = 0.008)|" in COURSE


def test_the_cells_of_the_notebook_run():
    pytest.importorskip("matplotlib").use("Agg")
    Path("train.py").touch()  # a cell looks for the project's folder by it
    names = {"__name__": "by_hand"}
    for cell in CELLS:
        code = "".join(cell["source"]).replace("%matplotlib inline", "")
        exec(code.replace('"--shorter=16"', '"--shorter=160", "--batch_size=2"'), names)
    for moments, is_same in (("sliced", True), ("fresh", False)):  # what it says of Muon
        for u, v in zip(names["updates"][moments], names["unpruned"]):
            assert ((u * v).sum() / (u.norm() * v.norm()) > 0.99) == is_same


def test_the_notebook_has_its_outputs_and_nothing_of_the_machine_that_made_them():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    shows = [cell for cell in CELLS if re.search(r"print\(|show\(", "".join(cell["source"]))]
    assert len(shows) > 10 and all(cell["outputs"] for cell in shows)
    assert not re.search('"output_type": "error"|"name": "stderr"', NOTEBOOK)
    assert not re.search(r"/(tmp|home|root|usr|Users)/| at 0x|iopub", NOTEBOOK)  # paths, times
