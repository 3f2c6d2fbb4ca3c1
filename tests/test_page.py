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
from run.out_dir import read_log
from schedule import Schedule
from tools import page

PAGE = (ROOT / "tools/page.html").read_text(encoding="utf-8")
HOSTILE = "</script><script>alert(1)</script><!-- \"'&lt;<img src=x onerror=alert(2)>"
NAMES = {"d_ff": "neurons", "n_kv_head": "heads", "d_model": "channels", "n_layer": "layers"}


def test_the_page_is_one_file_with_the_log_inside(undisturbed, tmp_path, capsys):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    assert page.main([str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'page.html'}\n"
    html = (out / "page.html").read_text(encoding="utf-8")
    before, after = PAGE.split("/*RUNS*/")  # which load nothing from elsewhere
    assert not re.search(r"//\w|src=|href=(?!.data:)|url\(|import|fetch|XMLHttp", before + after)
    assert html.startswith(before) and html.endswith(after)
    (shown,) = json.loads(html.removeprefix(before).removesuffix(after))
    for name, keys in page.SHOWN.items():
        for e, logged in zip(shown[name], events(undisturbed, name), strict=True):
            for key in ("step", *keys.split()):
                is_float = isinstance(logged[key], float)
                assert (
                    e[key] == (pytest.approx(logged[key], rel=1e-4) if is_float else logged[key])
                    or key == "scores"
                )


def test_a_long_run_makes_no_large_page(undisturbed, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    log, step = read_log(undisturbed), events(undisturbed, "step")[0]
    log = [e for e in log if e["event"] != "step"] + [step | {"step": n} for n in range(1, 20_000)]
    (out / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
    shown = page.read_run(out)
    assert 350 < len(shown["step"]) <= 400 and shown["step"][-1]["step"] == 19_999
    assert len(page.page_of([shown, shown])) < 400_000


def test_a_name_ends_no_script(undisturbed):
    html = page.page_of([page.read_run(undisturbed) | {"name": HOSTILE}])
    assert [html.count(x) for x in ("<script", "</script", "<!--")] == [2, 2, 0]
    assert json.dumps(HOSTILE).replace("<", r"\u003c") in html


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("", "", "no step yet"),
        ('"kind": "d_ff"', '"kind": "<img src=x>"', "damaged"),
        ('"val_loss": ', '"val_loss": NaN, "was": ', "damaged"),
        ('"width_after": ', '"width_after": "<b>", "was": ', "damaged"),
        ('"removed": ', '"went": ', "older version"),
    ],
)
def test_what_cannot_be_shown_is_one_line(undisturbed, tmp_path, refused, old, new, says):
    shutil.copy(undisturbed / "config.json", tmp_path)
    log = (undisturbed / "log.jsonl").read_text().replace(old, new) if old else ""
    (tmp_path / "log.jsonl").write_text(log)
    refused(f"{tmp_path}: .*{says}", tmp_path, main=page.main)
    refused(f"{tmp_path / 'none'}: no such", tmp_path / "none", main=page.main)


def random_schedules(n: int) -> list[Config]:
    """Many are of round numbers, as people choose them: there, halves and thirds are rounded."""
    rng, made = random.Random(1), []
    while len(made) < n:
        steps, grid = rng.choice([rng.randint(50, 9000), 100, 250, 1000]), rng.choice([1, 8, 16])
        knobs = {"max_steps": steps, "prune_every": rng.choice([10, rng.randint(1, steps // 4)])}
        knobs |= {"round_to": grid, "d_ff": rng.choice([1000, rng.randint(10, 2000)])}
        knobs |= {"d_ff_target": grid * rng.randint(1, 60), "n_kv_head_target": rng.randint(0, 3)}
        knobs |= {"prune_start": rng.choice([0.1, 0.25, rng.random()]), "n_kv_head": 4}
        knobs |= {"prune_end": rng.choice([0.35, 0.5, 0.65, rng.random()])}
        knobs |= {"prune_schedule": rng.choice(["cubic", "oneshot"]), "learning_rate": rng.random()}
        c = Config(**knobs, lr_restart=rng.random() < 0.2, warmup_steps=steps // 9)
        with suppress(ValueError):
            Schedule(c)
            made.append(c)
    return made


def test_its_formulas_are_those_of_schedule_py(request):
    """In node.js, or else in the browser, at 50 steps of 300 schedules."""
    schedules = [Schedule(c) for c in random_schedules(300)]
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


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("no chromium, or no chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    # In a container, root has no sandbox, and shared memory is small
    flags = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars")
    for flag in flags:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        yield browser


@pytest.fixture
def show(browser, tmp_path):
    """Opens the page of runs. At the end, its console must be empty."""

    def show(*runs: dict, width: int = 1200, scheme: str = "light") -> None:
        (tmp_path / "page.html").write_text(page.page_of(runs), encoding="utf-8")
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get((tmp_path / "page.html").as_uri())

    browser.get_log("browser")
    yield show
    assert browser.get_log("browser") == []


@pytest.fixture(scope="module")
def training(toy, tmp_path_factory):
    """A longer run that prunes neurons alone, was stopped, resumed, and is not done."""
    out = tmp_path_factory.mktemp("training") / "training"
    knobs = ["--max_steps=45", "--n_kv_head_target=0", "--d_model_target=0", "--n_layer_target=0"]
    assert run(toy, out, *knobs, "--stop_after=20") == 0
    assert run(toy, out, *knobs, "--resume", "--stop_after=32") == 0
    return out


def move(browser, slider: str, value: float) -> None:
    script = "const [slider, value] = arguments; document.querySelector(slider).value = value;"
    event = "dispatchEvent(new Event('input', { bubbles: true }))"
    browser.execute_script(script + f"document.querySelector(slider).{event}", slider, value)


def now(browser, run: int = 0) -> dict[str, str]:
    script = (
        "return [...document.querySelectorAll(arguments[0])].map(x => [x.dataset.is, x.innerText])"
    )
    return dict(browser.execute_script(script, f"#now .r{run} [data-is]"))


def cells(browser, run: int, kind: str, state: str) -> list[list[int]]:
    """The units of each group that are drawn in this state."""
    script = """return [...document.querySelectorAll(arguments[0])].map(svg =>
        [+svg.dataset.columns, svg.querySelector("." + arguments[1]).getAttribute("d")])"""
    drawn = browser.execute_script(script, f'.cells[data-run="{run}"][data-kind={kind}]', state)
    corners = [(columns, re.findall(r"M(\d+) (\d+)h[93]", path)) for columns, path in drawn]
    return [[int(y) // 10 * columns + int(x) // 10 for x, y in at] for columns, at in corners]


def test_at_any_moment_it_says_what_the_log_says(browser, show, undisturbed, training):
    show(*map(page.read_run, (undisturbed, training)))
    about = browser.find_element("id", "about").text
    assert f"Final loss {events(undisturbed, 'done')[0]['val_loss']:.3f}" in about
    assert "Resumed after step 20. Not done yet: step 32 of 45." in about
    for i, out in enumerate((undisturbed, training)):
        c = load_config(str(out))
        layers, widths = list(range(c.n_layer)), Schedule(c).widths
        left = {(kind, j): list(range(getattr(c, kind))) for kind in widths for j in layers}
        for e in read_log(out):
            if e["event"] == "prune":
                whole, before = len(e["removed"]) == 1, layers
                for j, removed in zip([0] if whole else layers, e["removed"]):
                    units = left[e["kind"], j]
                    left[e["kind"], j] = [u for k, u in enumerate(units) if k not in removed]
                layers = left[e["kind"], 0] if e["kind"] == "n_layer" else layers
                for j in set(before) - set(layers):  # a layer goes with its units
                    left |= {(kind, j): [] for kind in ("d_ff", "n_kv_head")}
            elif e["event"] == "step":
                move(browser, "#time", -(-e["step"] * 45 // c.max_steps))
                said = now(browser, i)
                expected = {NAMES[kind]: str(e[kind]) for kind in widths}
                expected |= {"step": str(e["step"]), "phase": e["phase"]}
                assert said | expected | {"parameters": f"{e['params']:,}"} == said
                assert float(said["training loss"]) == pytest.approx(e["loss"], abs=6e-4)
                assert float(said["learning rate"]) == pytest.approx(e["lr"], rel=0.006)
                for kind in widths if e["step"] > 14 else ():
                    groups = [left[kind, j] for j in range(c.n_layer)]
                    whole = kind in ("d_model", "n_layer")
                    assert cells(browser, i, kind, "there") == groups[: 1 if whole else None]
    last = [e for e in events(undisturbed, "prune") if e["step"] == 25]
    move(browser, "#time", 38)  # there
    rise = last[-1]["loss_after"] - last[0]["loss_before"]
    assert float(now(browser)["last prune"].replace("−", "-")) == pytest.approx(rise, abs=6e-4)
    going = {e["kind"]: len(e["removed"][0]) for e in last}
    prunes = {e["step"] for e in events(undisturbed, "prune")}  # their losses have a line alone
    lines = browser.find_elements("css selector", "#charts .r0 .dash")
    assert [len(line.get_attribute("points").split()) for line in lines] == [2 * len(prunes)]
    assert [len(x) for x in cells(browser, 0, "d_model", "going")] == [going["d_model"]]


def test_drag_play_click_and_keys(browser, show, undisturbed, training):
    from selenium.webdriver import ActionChains, Keys

    def hand() -> ActionChains:
        return ActionChains(browser, duration=50)

    def step() -> int:
        return int(now(browser)["step"])

    def where() -> str:
        return browser.find_element("id", "where").text

    show(*map(page.read_run, (training, undisturbed)))
    charts, play = browser.find_element("id", "charts"), browser.find_element("id", "play")
    held = hand().move_to_element_with_offset(charts, 0, -100).click_and_hold()
    held.move_by_offset(charts.size["width"] // 8, 5).release().perform()
    assert 26 <= step() <= 29  # five eighths of 45
    hand().send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT).perform()
    was = step()
    assert 24 <= was <= 27
    play.click()
    assert play.text == "Pause"
    while step() == was:  # without an end, if it does not play
        pass
    hand().send_keys(Keys.ARROW_LEFT).perform()
    assert play.text == "Play"
    move(browser, "#time", 1)
    browser.find_element("id", "next").click()
    moments = [e["step"] for e in events(training, "prune")]
    moments += [-(-e["step"] * 45 // 30) for e in events(undisturbed, "prune")]
    assert step() == min(moments)
    second = browser.find_elements("css selector", ".cells")[1]
    hand().move_to_element_with_offset(second, 3, 3).click().perform()
    assert where().startswith("Neuron 21 of training in layer 2")
    second.send_keys(Keys.ARROW_LEFT, Keys.ARROW_UP)  # a line has 8
    assert second.get_attribute("aria-valuenow") == "12" and "Neuron 12 " in where()
    first = events(training, "prune")[0]
    went = sum(unit < 11 for unit in first["removed"][1]) if step() >= first["step"] else 0
    row = 12 - went  # those that are left close up
    assert f"It has 48 weights: row {row} of gate and up and column {row} of down." in where()
    move(browser, "#time", 1)
    for kind, words in {
        "n_kv_head": "It has 256 weights: rows 1 to 4 of q, k and v and columns 1 to 4 of o.",
        "d_model": "It has 160 weights in each layer: column 1 of gate, up, q, k and v and row 1",
        "n_layer": "It has 2,560 weights. ",
    }.items():
        cell = browser.find_element("css selector", f".cells[data-kind={kind}]")
        cell.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
        assert words in where()


def test_the_sliders_follow_schedule_py(browser, show, undisturbed):
    def said(name: str) -> str:
        return browser.find_element("id", name).text

    show(page.read_run(undisturbed))
    c = replace(load_config(str(undisturbed)), max_steps=60, prune_end=0.9, learning_rate=0.01)
    for knob in ("max_steps", "prune_end", "learning_rate"):
        move(browser, f"[name={knob}]", getattr(c, knob))
    s = Schedule(c)
    prunes = s.prune_steps()
    assert (said("share"), said("count")) == (
        f"{s.rate_share(prunes[-1], 60):.0%}",
        str(len(prunes)),
    )
    rate = browser.find_elements("css selector", "#tried .r0 polyline")[-1].get_attribute("points")
    drawn = [-float(point.split(",")[1]) for point in rate.split()]
    rates = [s.learning_rate(step) for step in range(1, 61)]
    for one in (drawn, rates):  # on a scale from 0 to 1
        one[:] = [(y - min(one)) / (max(one) - min(one)) for y in one]
    assert drawn == pytest.approx(rates, abs=0.01)
    move(browser, "[name=prune_end]", 0.1)
    assert said("says").startswith("prune_end = 0.1")
    browser.find_element("css selector", "[value=naive]").click()
    s = Schedule(replace(c, lr_restart=True, prune_schedule="oneshot"))
    assert (said("share"), said("count")) == (f"{s.rate_share(s.prune_steps()[0], 60):.0%}", "1")


def test_every_run_fits_every_screen(browser, show, undisturbed, training):
    """Also one that never prunes, or has just begun. Its name is shown as it is."""
    whole, other = map(page.read_run, (undisturbed, training))
    never = whole | {"config": whole["config"] | {"widths": {}}, "prune": []}
    begun = whole | {"step": whole["step"][:1], "end": 1, "prune": [], "eval": [], "done": []}
    hostile = whole | {"name": HOSTILE}
    for runs in ([hostile, other], [never], [begun], [never, whole]):
        for width, scheme, paper in ((400, "dark", "19, 21, 24"), (1200, "light", "255, 255, 255")):
            show(*runs, width=width, scheme=scheme)
            script = """return [document.documentElement.scrollWidth,
                getComputedStyle(document.body).backgroundColor, document.images.length]"""
            assert browser.execute_script(script) == [width, f"rgb({paper})", 0]
            assert runs[0]["name"] in browser.find_element("id", "about").text
