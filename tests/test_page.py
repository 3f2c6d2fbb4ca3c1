"""The page of a run: what is in its file, and what it says in a browser while one plays."""

import json
import random
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import asdict, replace

import pytest
from helpers import ROOT, events, run

from run.config import Config, load_config
from schedule import Schedule
from tools import page

PAGE = (ROOT / "tools/page.html").read_text(encoding="utf-8")
HOSTILE = "</script><script>alert(1)</script><!-- \"'&lt;<img src=x onerror=alert(2)>"


def test_the_page_is_one_file_that_loads_nothing_with_the_log_inside(undisturbed, tmp_path, capsys):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    assert page.main([str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'page.html'}\n"
    html = (out / "page.html").read_text(encoding="utf-8")
    before, after = PAGE.split("/*RUNS*/")
    assert not re.search(r"//\w|src=|href=(?!.data:)|url\(|import|fetch|XMLHttp", before + after)
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
    lines = "".join(json.dumps(step | {"step": n}) + "\n" for n in range(1, 20_000))
    (out / "log.jsonl").write_text(log.replace('"step", "step"', '"none", "step"') + lines)
    shown = page.read_run(out)
    assert 350 < len(shown["step"]) <= 400 and shown["step"][-1]["step"] == 19_999
    html = page.page_of([shown, shown | {"name": HOSTILE}])
    assert len(html) < 400_000
    assert [html.count(x) for x in ("<script", "</script", "<!--")] == [2, 2, 0]
    for key in ("kind", "width_after", "val_loss"):
        (out / "log.jsonl").write_text(log.replace(f'"{key}": ', f'"{key}": "<b>", "was": '))
        refused(out, out, main=page.main)


def random_schedules(n: int) -> list[Schedule]:
    """Many are of round numbers, as people choose them: there, halves and thirds are rounded."""
    rng, made = random.Random(1), []
    while len(made) < n:
        steps, grid = rng.choice([rng.randint(50, 9000), 100, 250, 1000]), rng.choice([1, 8, 16])
        knobs = {"max_steps": steps, "prune_every": rng.choice([10, rng.randint(1, steps // 4)])}
        knobs |= {"round_to": grid, "d_ff": rng.choice([1000, rng.randint(10, 2000)])}
        knobs |= {"d_ff_target": grid * rng.randint(1, 60), "n_kv_head_target": rng.randint(0, 3)}
        knobs |= {"prune_start": rng.choice([0.1, 0.25, rng.random()]), "n_kv_head": 4}
        knobs |= {"prune_end": rng.choice([0.35, 0.5, 0.65, rng.random()])}
        knobs |= {"prune_schedule": rng.choice(["cubic", "oneshot"]), "warmup_steps": steps // 9}
        with suppress(ValueError):
            made.append(Schedule(Config(**knobs, lr_restart=rng.random() < 0.2)))
    return made


def test_its_formulas_are_those_of_schedule_py(request):
    """In node.js, or else in the browser, at 50 steps of 300 schedules."""
    schedules = random_schedules(300)
    cases = json.dumps([asdict(s.c) | {"widths": s.widths} for s in schedules])
    script = PAGE[PAGE.index("const range =") : PAGE.index("// The runs.")]
    script += f"""
    const numbers = {cases}.map(c => {{
      const s = schedule(c), kinds = Object.keys(c.widths), last = s.pruneSteps.at(-1) ?? 1;
      const at = range(50, i => Math.ceil((i + 1) * c.max_steps / 50)).map(step =>
        [step, s.phase(step), s.learningRate(step), kinds.map(kind => s.width(step, kind))]);
      return [s.pruneSteps, s.rateShare(last, c.max_steps), at];
    }});"""
    if node := shutil.which("node"):
        script += "console.log(JSON.stringify(numbers))"
        output = subprocess.run([node], input=script, encoding="utf-8", capture_output=True).stdout
        numbers = json.loads(output)
    else:
        numbers = request.getfixturevalue("browser").execute_script(script + "return numbers")
    for s, (prunes, share, points) in zip(schedules, numbers, strict=True):
        assert prunes == s.prune_steps()
        assert share == pytest.approx(s.rate_share((prunes or [1])[-1], s.max_steps))
        for step, phase, rate, widths in points:
            assert phase == s.phase(step) and widths == [s.width(step, kind) for kind in s.widths]
            assert rate == pytest.approx(s.learning_rate(step), rel=1e-12)


@pytest.fixture
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


def test_in_a_browser_it_shows_each_step_and_plays(browser, undisturbed, toy, tmp_path):
    """Two runs, one with a hostile name, one that is not done; and a run that has just begun."""
    from selenium.webdriver import ActionChains, Keys

    def show(*runs: dict, width: int = 1200) -> None:
        (tmp_path / "page.html").write_text(page.page_of(runs), encoding="utf-8")
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get((tmp_path / "page.html").as_uri())
        script = "return [document.documentElement.scrollWidth, document.images.length]"
        assert browser.execute_script(script) == [width, 0]

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
    show(one | {"step": one["step"][:1], "end": 1, "prune": [], "eval": [], "done": []}, width=400)
    show(one | {"name": HOSTILE}, other)
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
