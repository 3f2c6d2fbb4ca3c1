"""The commands of the README, run as they stand there, but shorter; what pages quote and link; the
scripts and arms of the studies."""

import ast
import importlib
import lzma
import re
import shlex
import shutil
from unittest.mock import Mock

import pytest
from helpers import ROOT

import train
from docs import pictures
from run.config import load_config
from schedule import Schedule
from studies.results import rows, small_model_tests, table
from tools.compare import read_arms

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [x for x in re.findall(r"^(?:.*&& )?(python .*)", README, re.M) if "pytest" not in x]
STUDIES = [*ROOT.glob("studies/**/README.md")]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "docs/by_hand.ipynb", *STUDIES]
SCRIPTS = sorted(ROOT.glob("studies/**/*.py"))
ARMS = [path for path in SCRIPTS if re.search("^arms = ", path.read_text(), re.M)]
KNOBS = ["--shorter=100", "--batch_size=2", "--eval_tokens=500"]
# A word of a command: what is added to it
SHORTER = {"train.py": KNOBS, "tools.compare": [*KNOBS, "--seeds=1"]}
SHORTER |= {"configs/smollm2.py": ["--d_ff_target=128", "--prune_start=0.5"]}
SHORTER |= {"tools.evaluate": ["--text=configs/idea.py"], "--animate": ["--to=last.png"]}


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
    for command in sorted(COMMANDS, key=lambda command: "smollm2" in command):
        words = shlex.split(command.replace("python -m", "python"), comments=True)
        program, arguments = words[1], words[2:]
        if program == "studies.smollm2.convert":
            shutil.copytree("out/idea-hf", "out/smollm2-135m")
            continue
        for word in SHORTER.keys() & set(words):
            arguments += SHORTER[word]
        main = importlib.import_module(program.removesuffix(".py")).main
        assert main(arguments) == 0, (command, capsys.readouterr().err)
    assert len(COMMANDS) > 10


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
    said = [e.pairs for w, e in made if "cosine" in w[0] and "dictionary" not in w[1]]
    said += [f"{e.mean:.3f}" for w, e in made if "tokens" in w[0] and w[1] in ("36 to 142", "142")]
    said += [f"{sum(len(e.tests) for w, e in made if 'FLOPs' in w[0] and w[2] == 'Muon')} tests"]
    section = README.partition("## Does it work?")[2].partition("\n## ")[0]
    assert re.findall(r"\d+ of \d+|\d\.\d{3}|\d+ tests", section) == said
    shown = {text.get_text() for text in pictures.forest(made).axes[0].texts}
    assert shown > {cell for words, e in made for cell in (*words, e.pairs)}
    s = Schedule(load_config("configs/idea.py", ["--learning_rate=1"]))
    drawn = zip(*(panel.lines[0].get_ydata() for panel in pictures.method().axes[1::2]))
    assert [*drawn] == [(s.width(i, "d_ff"), s.learning_rate(i)) for i in range(1, 1001)]


def test_every_script_of_a_study_imports():
    for path in [path for path in SCRIPTS if path not in ARMS]:
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def test_every_arm_of_a_study_is_a_config_that_train_takes():
    arms = [arm for path in ARMS for arm in read_arms(str(path)).values()]
    assert len(arms) > 60 and all(load_config(*arm) for arm in arms)
