"""The commands of the README and of its chapters, run as they stand there, but shorter."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHORTER = {"train": ["--shorter=100", "--batch_size=2", "--eval_tokens=2000"]}
SHORTER["tools.compare"] = [*SHORTER["train"], "--seeds=1", "--jobs=2"]


def commands(text: str) -> list[str]:
    """What stands in its blocks of shell, a command each; not what installs or runs the tests."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = [part.strip() for block in blocks for part in re.split(r"\n|&&", block)]
    return [x for x in lines if x.startswith("python") and "pytest" not in x]


def test_every_command_of_the_readme_works(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers"), pytest.importorskip("matplotlib")
    for folder in ("configs", "tools"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "book.txt").write_text("Fellow citizens of the Senate. " * 22_000)
    (tmp_path / "speech.txt").write_text("My fellow citizens. " * 50)
    monkeypatch.chdir(tmp_path)
    assert len(commands(README)) >= 8
    for command in commands(README):
        program, *arguments = shlex.split(command, comments=True)[1:]
        if program == "-m":
            program, *arguments = arguments
            main = importlib.import_module(program).main
        else:
            program, main = "train", train.main
            assert shlex.split(command)[1] == "train.py"
        code = main([*arguments, *SHORTER.get(program, [])])
        assert code == 0, (command, capsys.readouterr().err)
    made = ("out/idea/checkpoint.pt", "out/idea/units.png", "out/idea-hf/config.json")
    assert all((tmp_path / path).exists() for path in (*made, "studies/mine/table.md"))


def test_the_files_to_read_have_as_many_lines_as_the_readme_says():
    rows = re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README)
    assert len(rows) == 4
    for file, lines in rows:
        has = len((ROOT / file).read_text().splitlines())
        assert has == int(lines), f"{file} has {has} lines now; change the number in README.md"


@pytest.mark.parametrize("page", [ROOT / "README.md", *(ROOT / "docs").glob("*.md")], ids=str)
def test_quoted_code_stands_in_its_file_and_links_lead_somewhere(page):
    text = page.read_text()
    quotes = re.findall(r"\| `([^`]+)` \| `([\w/]+\.py)` \|$", text, re.M)
    for file, diff in re.findall(r"```diff\n *# ([\w/.]+)\n(.*?)```", text, re.S):
        quotes += [(line, file) for line in re.findall(r"^ *-(.*)$", diff, re.M)]
    for line, file in quotes:
        assert line in (ROOT / file).read_text(), f"{page.name} quotes a line of {file}: {line}"
    for path in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (page.parent / path).exists(), path
