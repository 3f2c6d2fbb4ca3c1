"""The two pages of a run: what is in their files, and what they say in a browser."""

import base64
import json
import re
import shutil
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, events, run

from data.loader import TokenDataset
from model import GPT, GPTConfig
from prune import choose, slice_group
from run.config import load_config
from run.cost import flops_per_token, n_parameters
from schedule import Schedule
from tools import filled, load_trained, page, play

PAGE, PLAY = ((ROOT / f"tools/{x}.html").read_text(encoding="utf-8") for x in ("page", "play"))
FRAME = ("page.html", "/*RUNS*/")
FINISHED = ROOT / "docs/play.html"
HOSTILE = "</script><script>alert(1)</script><!-- \"'&lt;<img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if not (program and (driver := shutil.which("chromedriver"))):
        pytest.skip("no chromium, or no chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)  # in a container, root has no sandbox
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        yield browser
        assert browser.get_log("browser") == []


def show(browser, file: Path, width: int, scheme: str = "light") -> None:
    """Load a file in a window of this width, which it should fit."""
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(file.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") == width


def test_the_page_is_one_file_that_loads_nothing_with_the_log_inside(undisturbed, tmp_path, capsys):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    assert page.main([str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'page.html'}\n{out / 'play.html'}\n"
    html = (out / "page.html").read_text(encoding="utf-8")
    before, after = PAGE.split(FRAME[1])
    for frame in (PAGE, PLAY):
        assert not re.search(r"//\w|src=|href=(?!.data:)|url\(|import|fetch|XMLHttp", frame)
    assert html.startswith(before) and html.endswith(after)
    (shown,) = json.loads(html.removeprefix(before).removesuffix(after))
    for name, keys in page.SHOWN.items():
        for e, logged in zip(shown[name], events(undisturbed, name), strict=True):
            for key in {"step", *keys.split()} - {"scores"}:  # floats in five digits
                exact = not isinstance(logged[key], float)
                assert e[key] == (logged[key] if exact else pytest.approx(logged[key], rel=1e-4))


def test_a_long_run_makes_no_large_page_and_no_text_is_html(undisturbed, tmp_path, refused):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    log, step = (out / "log.jsonl").read_text(), events(undisturbed, "step")[0]
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace('"max_steps": 30', '"max_steps": 20000'))
    lines = "".join(json.dumps(step | {"step": n}) + "\n" for n in range(1, 20_000))
    (out / "log.jsonl").write_text(log.replace('"step", "step"', '"none", "step"') + lines)
    shown = page.read_run(out)
    assert 350 < len(shown["step"]) <= 400 and shown["step"][-1]["step"] == 19_999
    html = filled(*FRAME, [shown, shown | {"name": HOSTILE}])
    assert len(html) < 400_000
    assert [html.count(x) for x in ("<script", "</script", "<!--")] == [2, 2, 0]
    wrong = {f'"{key}": ': f'"{key}": "<b>", "was": ' for key in ("width_after", "val_loss")}
    wrong |= {'"kind": "d_ff"': '"kind": 3', '"removed": ': '"removed": [], "was": '}
    for old, new in wrong.items():
        (out / "log.jsonl").write_text(log.replace(old, new))
        refused(out, out, main=page.main)
    (out / "log.jsonl").write_text(log)
    for knob in ('"d_ff": 48', '"max_steps": 29'):  # a config unlike the log
        (out / "config.json").write_text(re.sub(rf"{knob[:-2]}\d+", knob, config))
        refused(out, out, main=page.main)


def net_in(html: str) -> dict:
    """What a page to prune by hand has inside; the rest of it is the frame as it is now."""
    before, after = PLAY.split("/*NET*/")
    assert html.startswith(before) and html.endswith(after)
    return json.loads(html.removeprefix(before).removesuffix(after))


def model_of(net: dict) -> GPT:
    model, raw = GPT(GPTConfig(**net["config"])), base64.b64decode(net["weights"])
    weights = torch.from_numpy(np.frombuffer(raw, "<f2").astype(np.float32))
    torch.nn.utils.vector_to_parameters(weights, model.parameters())
    return model


def batch_of(net: dict) -> tuple[torch.Tensor, torch.Tensor]:
    passage = net["passage"]
    return tuple(torch.tensor(x).view(net["rows"], -1) for x in (passage[:-1], passage[1:]))


def test_a_page_to_prune_by_hand_holds_the_model_and_marks_the_one_cut_in_steps(
    toy, undisturbed, tmp_path, monkeypatch, capsys
):
    others = [f"--{kind}_target=0" for kind in ("n_kv_head", "d_model", "n_layer")]
    wide, steps = tmp_path / "wide", tmp_path / "steps"
    assert run(toy, steps, *others) == run(toy, wide, *others, "--d_ff_target=0") == 0
    assert page.main([str(wide), str(steps)]) == 0
    net, trained = net_in((wide / "play.html").read_text("utf-8")), load_trained(wide).model.cpu()
    for (name, p), q in zip(trained.named_parameters(), model_of(net).parameters()):
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-6, msg=name)
    assert net.keys() == net_in(FINISHED.read_text("utf-8")).keys()
    val = TokenDataset(load_config(str(wide)).data_dir, "val", 16)
    tokens = torch.cat([x.flatten() for x, _ in val.in_order(9)]).tolist()
    assert str(net["passage"])[1:-1] in str(tokens) and len(net["passage"]) == 513
    left, loss = net["steps"][0]
    assert left == 8 and loss == pytest.approx(
        load_trained(steps).model.cpu()(*batch_of(net)).item()
    )
    for one, other in ((steps, wide), (wide, undisturbed)):  # neither was cut from the one
        assert net_in(play.page_of(one, other))["steps"] == []
    capsys.readouterr()
    monkeypatch.setattr(play, "LARGEST", 1000)
    assert page.main([str(steps)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{steps / 'page.html'}\n" and said.err.count("\n") == 1
    assert said.err.startswith("no play.html: ") and "parameters" in said.err


def test_the_finished_page_is_small_and_of_a_wide_model():
    net = net_in(FINISHED.read_text("utf-8"))
    assert FINISHED.stat().st_size < 300_000
    assert net["was"] == net["config"]["d_ff"]
    whole = model_of(net)(*batch_of(net)).item()
    assert whole == pytest.approx(net["split"], abs=0.02)  # a typical passage
    assert whole < net["steps"][0][1] < whole + 0.2


def test_its_formulas_are_those_of_schedule_py(browser):
    """At 50 steps of each config, as it is and shorter, where parts of its steps are rounded."""
    names = ("idea", "idea_paper", "idea_attention", "scratch", "oneshot", "naive")
    knobs = [(name, f"--shorter={n}") for name in names for n in (1, 3, 7, 9)]
    schedules = [Schedule(load_config(f"configs/{name}.py", [knob])) for name, knob in knobs]
    cases = json.dumps([asdict(s.config) | {"widths": s.widths} for s in schedules])
    script = PAGE[PAGE.index("const range =") : PAGE.index("// The runs.")]
    script += f"""
    const numbers = {cases}.map(c => {{
      const s = schedule(c), kinds = Object.keys(c.widths), last = s.pruneSteps.at(-1) ?? 1;
      const at = range(50, i => Math.ceil((i + 1) * c.max_steps / 50)).map(step =>
        [step, s.phase(step), s.learningRate(step), kinds.map(kind => s.width(step, kind))]);
      return [s.pruneSteps, s.rateShare(last, c.max_steps), at];
    }});
    return numbers"""
    numbers = browser.execute_script(script)
    for s, (prunes, share, points) in zip(schedules, numbers, strict=True):
        assert prunes == s.prune_steps()
        assert share == pytest.approx(s.rate_share((prunes or [1])[-1], s.max_steps))
        for step, phase, rate, widths in points:
            assert phase == s.phase(step) and widths == [s.width(step, kind) for kind in s.widths]
            assert rate == pytest.approx(s.learning_rate(step), rel=1e-12)


def test_in_a_browser_a_model_is_pruned_by_hand_as_torch_does(browser):
    from selenium.webdriver import Keys

    js, net, papers = browser.execute_script, net_in(FINISHED.read_text("utf-8")), set()
    for width, scheme in ((400, "dark"), (1200, "light")):
        show(browser, FINISHED, width, scheme)
        papers.add(js("return getComputedStyle(document.body).backgroundColor"))
    assert len(papers) == 2

    def said(name: str) -> str:
        while js("return wanted || busy"):  # without an end, if it never comes to rest
            pass
        return browser.find_element("id", name).text

    def press(selector: str, *keys: str) -> None:
        element = browser.find_element("css selector", selector)
        element.send_keys(*keys) if keys else js("arguments[0].click()", element)

    # Whole, and with half of the neurons really cut, in each order: first of all by score
    model, width = model_of(net), net["config"]["d_ff"]
    orders = js("return ['low', 'random1', 'high'].map(way => alike(way, HALF).map(m => [...m]))")
    for scores, mask in zip(net["scores"], orders[0]):
        assert torch.tensor(mask).bool().equal(choose(torch.tensor(scores), (width + 1) // 2))
    cut_losses = []
    for masks in ([[1] * width] * len(orders[0]), *orders):
        cut = deepcopy(model)
        groups = [group for group in cut.groups() if group.kind == "d_ff"]
        for group, mask in zip(groups, masks):
            slice_group(cut, [], group, torch.tensor(mask).bool())
        cut_losses.append(cut(*batch_of(net)).item())
        in_js = js("return mean(losses(arguments[0]))", masks)
        assert in_js == pytest.approx(cut_losses[-1], abs=1e-5)
    assert float(said("loss")) == pytest.approx(cut_losses[0], abs=2e-3)
    press("#half")
    assert float(said("loss").split()[0]) == pytest.approx(cut_losses[1], abs=2e-3)
    orders_said = [float(said(f"of-{name}")) for name in ("low", "random", "high")]
    assert orders_said == pytest.approx(cut_losses[1:], abs=7e-3)
    press("[value=high]")
    assert float(said("loss").split()[0]) == pytest.approx(cut_losses[3], abs=2e-3)
    costs = js("return ['params', 'flops'].map(id => $(id).textContent.split(' ')[0])")
    flops = flops_per_token(cut.config) / 3  # of the forward pass alone
    assert costs == [f"{n_parameters(cut.config):,}", f"{flops / 1000:.0f}k"]
    red = "return [...$('read').children].filter(x => parseInt(x.style.cssText.slice(8))).length"
    assert js(red) > 200
    # At temperature 0 it writes what torch finds likeliest
    js("$('temperature').value = 0; $('temperature').oninput()")
    prompt = js("return encoded($('prompt').value)")
    words = [word.encode("latin-1") for word in net["words"]]
    assert b"Fellow citizens of the Senate".endswith(b"".join(words[i] for i in prompt))
    for place, writer in (("whole", model), ("now", cut)):
        tokens = [*prompt]
        while len(tokens) < net["config"]["context_length"]:
            tokens.append(int(writer(torch.tensor([tokens]))[0, -1].argmax()))
        text = b"".join(words[i] for i in tokens).decode(errors="replace")
        assert said(place).split() == text.split()
    press("#draw")
    assert said("left0") == f"{(width + 1) // 2} of {width} neurons"
    assert "2 draws" in said("cost-random")
    press("#half")  # puts all back
    press("#keep0", *[Keys.ARROW_LEFT] * 3)
    press(cells := "#layers > div:nth-child(2) .cells button")
    press(cells, Keys.ARROW_RIGHT)
    browser.switch_to.active_element.send_keys(Keys.SPACE)
    assert said("left0") == f"{width - 3} of {width} neurons"
    assert said("left1") == f"{width - 2} of {width} neurons"


def test_in_a_browser_it_shows_each_step_and_plays(browser, undisturbed, toy, tmp_path):
    """Two runs, one with a hostile name, one that is not done; and a run that has just begun."""
    from selenium.webdriver import ActionChains, Keys

    def show_runs(*runs: dict, width: int = 1200) -> None:
        (file := tmp_path / "page.html").write_text(filled(*FRAME, runs), encoding="utf-8")
        show(browser, file, width)
        assert browser.execute_script("return document.images.length") == 0

    def move(slider: str, value: float) -> None:
        script = f"const slider = document.querySelector('{slider}'); slider.value = {value};"
        browser.execute_script(script + "slider.dispatchEvent(new Event('input', {bubbles: true}))")

    def now() -> dict[str, str]:
        script = "return [...document.querySelectorAll('#now .r0 [data-is]')]"
        return dict(browser.execute_script(script + ".map(x => [x.dataset.is, x.innerText])"))

    def said(name: str) -> str:
        return browser.find_element("id", name).text

    assert run(toy, half := tmp_path / "half", "--max_steps=45", "--stop_after=20") == 0
    one, other = page.read_run(undisturbed), page.read_run(half)
    begun = {"step": one["step"][:1], "end": 1, "prune": [], "eval": [], "done": []}
    show_runs(one | begun, width=400)
    show_runs(one | {"step": one["step"][4:]})  # the first steps are not in its log
    assert now()["step"] == "5" and now()["training loss"] == f"{one['step'][4]['loss']:.3f}"
    starts = "return [...document.querySelectorAll('#charts polyline')].map(x => x.points[0].x)"
    first = browser.execute_script("return charts.X(1 / 30)")  # the learning rate's
    assert pytest.approx(first, abs=0.1) in browser.execute_script(starts)
    show_runs(one | {"name": HOSTILE}, other)
    assert HOSTILE in said("about") and "Not done yet: step 20 of 45." in said("about")
    for e in events(undisturbed, "step"):
        move("#time", -(-e["step"] * 45 // 30))
        shown = now()
        assert (shown["step"], shown["phase"]) == (str(e["step"]), e["phase"])
        assert (shown["neurons"], shown["layers"]) == (str(e["d_ff"]), str(e["n_layer"]))
        assert float(shown["training loss"]) == pytest.approx(e["loss"], abs=6e-4)
    hand, charts = ActionChains(browser, duration=50), browser.find_element("id", "charts")
    held = hand.move_to_element_with_offset(charts, 0, -100).click_and_hold()
    held.move_by_offset(charts.size["width"] // 8, 5).release().perform()
    assert 17 <= (was := int(now()["step"])) <= 20  # five eighths
    browser.find_element("id", "play").click()
    while int(now()["step"]) == was:  # without an end, if it does not play
        pass
    hand.send_keys(Keys.ARROW_LEFT).perform()
    assert said("play") == "Play"
    move("#time", 1)
    cells = browser.find_elements("css selector", ".cells[data-kind=d_ff]")[1]
    cells.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert "It has 48 weights: row 1 of gate and up and column 1 of down." in said("where")
    move("[name=prune_end]", 0.9)
    s = Schedule(replace(load_config(str(undisturbed)), prune_end=0.9))
    assert said("count") == str(len(s.prune_steps()))
    assert said("share") == f"{s.rate_share(s.prune_steps()[-1], 30):.0%}"
