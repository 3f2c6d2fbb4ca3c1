"""The commands of the README, run as they stand there, but shorter; what pages quote and link."""

import importlib
import lzma
import re
import shlex
import shutil

import pytest
from helpers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
SHORTER = {"train": ["--shorter=100", "--batch_size=2", "--eval_tokens=2000"]}
SHORTER["tools.compare"] = [*SHORTER["train"], "--seeds=1", "--jobs=2"]


def commands(text: str) -> list[str]:
    """What stands in its blocks of shell, a command each; not what installs or runs the tests."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = [part.strip() for block in blocks for part in re.split(r"\n|&&", block)]
    return [x for x in lines if x.startswith("python") and "pytest" not in x]


def test_every_command_of_the_readme_works(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers"), pytest.importorskip("matplotlib")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "book.txt").write_text("Fellow citizens of the Senate. " * 22_000)
    (tmp_path / "data/corpus").mkdir(parents=True)
    with lzma.open(tmp_path / "data/corpus/sotu.jsonl.xz", "wt") as file:
        file.write('{"text": "My fellow citizens of the Senate and the House."}\n' * 4000)
    monkeypatch.chdir(tmp_path)
    assert len(commands(README)) >= 12
    # The open model last: what the README exports stands in for its download
    for command in sorted(commands(README), key=lambda command: "smollm2" in command):
        program, *arguments = shlex.split(command, comments=True)[1:]
        if program == "-m":
            program, *arguments = arguments
        assert importlib.util.find_spec(program.removesuffix(".py")), command
        if program.endswith("smollm2.convert"):
            shutil.copytree("out/idea-hf", "out/smollm2-135m")
            continue
        shorter = SHORTER.get(program.removesuffix(".py"), [])
        if "configs/smollm2.py" in arguments:
            shorter = ["--d_ff_target=128", "--max_steps=16", "--prune_start=0.5"]
        main = importlib.import_module(program.removesuffix(".py")).main
        code = main([*arguments, *shorter])
        assert code == 0, (command, capsys.readouterr().err)
    made = ("idea/checkpoint.pt", "idea/units.png", "idea-hf/config.json", "four/table.md")
    assert all((tmp_path / "out" / path).exists() for path in (*made, "smollm2/checkpoint.pt"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quoted_code_stands_in_its_file_and_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for line, file in re.findall(r"\| `([^`]+)` \| `([\w/]+\.py)` \|$", text, re.M):
        assert line in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no line {line}"
    for path, _, part in re.findall(r"\]\((?!http)([^)#]*)(#([^)]+))?\)", text):
        target = page.parent / path if path else page
        assert target.exists(), path
        if part and target.suffix == ".md":
            heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in heads]
            assert part in slugs, f"{path}#{part}"
