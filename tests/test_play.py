"""The page to prune a model by hand: what it holds, and what it does in a browser."""

import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, run
from torch.nn.utils import vector_to_parameters

from data.loader import TokenDataset
from model import GPT, GPTConfig
from prune import choose, slice_group
from tools import load_trained, play

FRAME = (ROOT / "tools/play.html").read_text(encoding="utf-8")
FINISHED = ROOT / "docs/play.html"


def net_in(file: Path) -> dict:
    """The data of a page. The rest of the page is the frame as it is now."""
    html = file.read_text(encoding="utf-8")
    before, after = FRAME.split(play.MARK)
    assert html.startswith(before) and html.endswith(after)
    return json.loads(html[len(before) : -len(after)])


def model_in(net: dict) -> GPT:
    model = GPT(GPTConfig(**net["config"]))
    weights = np.frombuffer(base64.b64decode(net["weights"]), "<f2").astype("f4")
    vector_to_parameters(torch.from_numpy(weights), model.parameters())
    return model


def loss_on_passage(model: GPT, net: dict) -> float:
    return play.losses_of(model, [net["passage"]], net["rows"]).item()


def test_a_page_holds_its_model(toy, undisturbed, tmp_path, monkeypatch, refused):
    wide, cut, file = tmp_path / "wide", tmp_path / "cut", tmp_path / "page.html"
    only_d_ff = [f"--{k}_target=0" for k in ("n_kv_head", "d_model", "n_layer")]
    assert run(toy, cut, *only_d_ff) == 0
    assert run(toy, wide, *only_d_ff, "--d_ff_target=0") == 0
    assert play.main([str(wide), str(cut), f"--to={file}"]) == 0
    net = net_in(file)
    shown = model_in(net).state_dict()
    weights = load_trained(wide).model.cpu().state_dict()
    torch.testing.assert_close(shown, weights, rtol=1e-3, atol=1e-6)
    val = TokenDataset(toy.with_name("data"), "val", 16)
    held_out = torch.cat([inputs.flatten() for inputs, _ in val.in_order(9)])
    assert str(net["passage"])[1:-1] in str(held_out.tolist())
    assert len(net["passage"]) == 513
    cut_loss = loss_on_passage(load_trained(cut).model.cpu(), net)
    assert net["steps"] == [[8, pytest.approx(cut_loss)]]
    assert play.net_of(cut, wide)["steps"] == []  # neither was cut from the other
    assert play.net_of(wide, undisturbed)["steps"] == []
    monkeypatch.setattr(play, "LARGEST", 1000)
    refused("parameters", cut, main=play.main)


def test_a_page_loads_nothing_and_no_word_of_it_is_html():
    assert not re.search(r"//\w|src=|href=(?!.data:)|url\(|import|fetch|Http", FRAME)
    html = play.filled({"words": ["</script><script>alert(1)</script><!--"]})
    assert html.count("<script") == html.count("</script") == FRAME.count("<script")
    assert "<!--" not in html


def test_the_finished_page_is_small_and_shows_a_wide_model():
    net = net_in(FINISHED)
    assert FINISHED.stat().st_size < 300_000
    assert net["was"] == net["config"]["d_ff"]
    whole = loss_on_passage(model_in(net), net)
    assert whole == pytest.approx(net["split"], abs=0.02)  # a typical passage
    assert whole < net["steps"][0][1] < whole + 0.2


@pytest.fixture
def browser():
    driver = shutil.which("chromedriver") or pytest.skip("no chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")  # root has none in a container
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        yield browser
        assert browser.get_log("browser") == []


def test_in_a_browser_a_model_is_pruned_and_writes_as_in_torch(browser):
    js = browser.execute_script
    net = net_in(FINISHED)
    browser.get(FINISHED.as_uri())
    whole = model_in(net)
    half = model_in(net)
    masks = js("return alike('low', HALF).map(mask => [...mask])")
    groups = [group for group in half.groups() if group.kind == "d_ff"]
    for group, mask, scores in zip(groups, masks, net["scores"]):
        keep = choose(torch.tensor(scores), sum(mask))
        assert sum(mask) == (group.width + 1) // 2
        assert keep.equal(torch.tensor(mask).bool())
        slice_group(half, [], group, keep)

    js("$('temperature').value = 0; $('half').click()")
    while js("return wanted || busy"):  # it computes for a second
        pass
    shown_loss = float(js("return $('loss').textContent.split(' ')[0]"))
    assert shown_loss == pytest.approx(loss_on_passage(half, net), abs=2e-3)
    n_params = js("return $('params').textContent.split(' ')[0]")
    assert n_params == f"{half.config.n_params():,}"
    prompt = js("return encoded($('prompt').value)")
    for place, model in (("whole", whole), ("now", half)):
        tokens = list(prompt)
        while len(tokens) < net["config"]["context_length"]:
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        text = js("return decoded(arguments[0])", tokens)
        assert js(f"return $('{place}').textContent") == text
