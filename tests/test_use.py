"""What one does with a run: sample from its model, draw it, watch it elsewhere."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import events, refused, run, same_end
from test_model import large

from model import KINDS
from run.folder import read_log
from tools import figures, film, plot, sample
from tools.load import Trained, load_trained


@pytest.fixture(scope="module")
def trained(undisturbed) -> Trained:
    """A toy's run, its weights large and random: what it learnt is one token, again and again."""
    trained = load_trained(undisturbed)
    model = trained.model.cpu()  # where the tokens are
    model.unembed.weight = torch.nn.Parameter(model.embed.weight.detach().clone())
    large(model)
    return trained


@pytest.mark.parametrize(
    "choice, expected",
    [
        ({"temperature": 0.5}, [x / 86 for x in (4, 64, 1, 16, 1)]),  # squares, up to a factor
        ({"temperature": 1e-320}, [0, 1, 0, 0, 0]),
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


def generate(trained: Trained, prompt: list[int], n: int, temperature: float = 0.0) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return list(sample.generate(trained, prompt, n, temperature, 0, generator))


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

    monkeypatch.setattr(sample, "load_trained", lambda path: trained)
    one, two = said("--seed=3"), said("--seed=3", "--samples=2")
    assert two.startswith(one) and two.count("The sum") == 2 and two[len(one) :].strip("-\n") != one
    assert said("--seed=4") != one
    assert said("--prompt=")  # the empty one follows <|endoftext|>
    for wrong in ("--temperature=nan", "--seed=99999999999999999999"):
        with pytest.raises(SystemExit, match="2"):
            said(wrong)


def test_widths_change_at_the_prunes_however_rarely_steps_are_logged(undisturbed):
    steps = events(undisturbed, "step")
    few = figures.by_name(undisturbed) | {"step": steps[6::7] + steps[-1:]}
    for x in ("tokens", "flops"):
        width, trained = dict(zip(*figures.widths(few, "n_kv_head", x))), 0
        for step in steps:
            assert step["n_kv_head"] == width[max(t for t in width if t <= trained)]
            trained = step[x]
        assert max(width) == trained


def rewrite(log, to, keep=lambda e: True) -> None:
    """Copy the events of a log that are to be kept."""
    kept = [json.dumps(e) + "\n" for e in read_log(log) if keep(e)]
    (to / "log.jsonl").write_text("".join(kept))


def test_pictures_of_a_run_of_several_and_of_units(undisturbed, tmp_path, capsys):
    pytest.importorskip("matplotlib").rcParams["svg.fonttype"] = "none"  # words stay text

    def picture(*arguments) -> str:
        to = tmp_path / "picture.svg"
        assert plot.main([*map(str, arguments), f"--to={to}"]) == 0
        assert capsys.readouterr().out.strip() == str(to)
        return to.read_text()

    two = picture(undisturbed, undisturbed)
    assert all(f">{x}<" in two for x in (*KINDS, "learning rate", "training tokens", "2k"))
    assert two.count(">run: ") == 2
    assert ">training FLOPs<" in picture(undisturbed, "--flops")
    units = picture(undisturbed, "--units")
    assert all(f">{kind}: what" in units for kind in KINDS) and ">layer 1<" in units
    drawn = {}  # layer, by its number at first -> how many prunes of d_ff it has seen
    for line in plot.draw_units(undisturbed).axes[3].lines:
        drawn[line.get_label()] = len(line.get_xdata())
    gone = [e["removed"][0][0] for e in events(undisturbed, "prune") if e["kind"] == "n_layer"]
    left = [layer for layer in range(4) if layer != gone[0]]
    assert drawn == {f"layer {i}": 4 for i in left} | {f"layer {gone[0]}": 2} and len(gone) == 2


def test_what_cannot_be_drawn_is_one_line(undisturbed, tmp_path, capsys):
    def no(*arguments, words: str) -> None:
        refused(capsys, plot.main, tmp_path, *arguments, words=words)

    no("--to=a.gif", words="--to=a.gif: must end in .png or .svg")
    no("--animate", "--to=a.svg", words="--to=a.svg: must end in .gif or .png")
    no(tmp_path, "--units", words="take one OUT_DIR")
    no("--animate", words="no run that was validated yet")
    rewrite(undisturbed, tmp_path, lambda e: e["event"] != "prune")
    no("--units", words=f"{tmp_path}: its log has no prune")
    log = (undisturbed / "log.jsonl").read_text()
    for old, new in (('"kind": ', '"group": '), ('"val_loss": ', '"val_loss": NaN, "was": ')):
        (tmp_path / "log.jsonl").write_text(log.replace(old, new))
        no(words=f"{tmp_path}: .*damaged, or of an older version")


def test_a_prune_raises_the_loss_in_the_picture_by_what_the_log_says(undisturbed):
    panel = pytest.importorskip("matplotlib.figure").Figure().add_subplot()
    log = figures.by_name(undisturbed)
    now = log["prune"][-2]["tokens"]
    figures.draw_jumps(panel, log, "blue", now)
    (red,) = panel.collections
    prunes = [e for e in log["prune"] if e["tokens"] <= now]
    jumps = [[[e["tokens"], e[key]] for key in ("loss_before", "loss_after")] for e in prunes]
    assert np.array(red.get_segments()).tolist() == jumps and len(jumps) > 4
    low, high = panel.get_ylim()
    assert all(low < e["loss_before"] and e["loss_after"] < high for e in log["prune"])


def test_in_the_animation_units_go_where_they_stand_and_the_others_close_up():
    def prune(tokens: int, kind: str, width: int, *removed: list[int]) -> dict:
        widths = {"width_before": width, "width_after": width - 1}
        return {"tokens": tokens, "kind": kind, "removed": removed} | widths

    first = [prune(10, "d_ff", 4, [1], [3]), prune(10, "d_model", 3, [0])]
    second = [prune(20, "d_ff", 3, [0], [2]), prune(20, "n_layer", 2, [0])]
    third = [prune(30, "d_ff", 2, [0]), prune(30, "d_model", 2, [1])]  # of layer 1, and of all
    log = {"step": [{"tokens": 40, "n_layer": 1}], "prune": [*first, *second, *third]}
    shown = {
        moment: [" ".join("".join(".x#"[i] for i in row) for row in u) for u in kinds.values()]
        for moment, kinds in film.unit_states(log).items()
    }
    assert shown[0, 0] == ["#### ####", "###", "##"]  # neurons of layers 0 and 1, channels, layers
    assert shown[10, 0] == shown[10, 1] == ["#x## ###x", "x##", "##"]
    assert shown[10, 2] == ["#.## ###.", ".##", "##"]
    assert shown[10, 3] == ["###. ###.", "##.", "##"]
    assert shown[20, 0] == ["xxx. ##x.", "##.", "x#"]  # a layer goes with its neurons
    assert shown[20, 3] == [".... ##..", "##.", "#."]
    assert shown[30, 0] == [".... x#..", "#x.", "#."]


@pytest.mark.parametrize("shape", [(1, 1), (4, 80), (24, 509), (2, 8192)], ids=str)
def test_each_unit_has_a_cell_of_its_colour(shape):
    panel = pytest.importorskip("matplotlib.figure").Figure((7, 2)).add_subplot()
    units = np.resize([film.GONE, film.CHOSEN, film.USED], shape)
    film.draw_units(panel, "d_ff", units)
    cells = panel.collections[0].get_array().reshape(-1, 4)
    drawn = sorted(np.unique(cells[cells[:, 3] > 0], axis=0, return_counts=True)[1])
    assert drawn == sorted(np.unique(units, return_counts=True)[1])


def test_the_animation_is_a_film_of_ten_seconds_or_a_still(undisturbed, tmp_path):
    pytest.importorskip("matplotlib")
    Image = pytest.importorskip("PIL.Image")
    rewrite(undisturbed, tmp_path)
    run = [str(tmp_path), "--animate"]
    assert plot.main(run) == plot.main([*run, f"--to={tmp_path / 'still.png'}"]) == 0
    film, still = (Image.open(tmp_path / name) for name in ("run.gif", "still.png"))
    times = []
    for i in range(film.n_frames):
        film.seek(i)
        times.append(film.info["duration"])
    assert 8000 < sum(times) < 12000 and film.info["loop"] == 0 and film.n_frames > 4
    assert still.size == (2 * film.size[0], 2 * film.size[1])
    assert film.convert("RGB").getpixel((0, 0)) == (13, 17, 23)
    assert still.getpixel((0, 0)) == (255, 255, 255)


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
