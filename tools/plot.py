"""Draw runs from their logs: python -m tools.plot OUT_DIR [OUT_DIR ...] [--to FILE]

Loss, widths and learning rate over tokens, one colour a run, go to the first OUT_DIR, as run.png,
units.png or run.gif, unless --to names another file. With --animate, a .png shows the end alone."""

import math
from argparse import ArgumentParser
from functools import partial
from pathlib import Path

import numpy as np

from data import command
from run import UserError
from run.out_dir import compact, read_log
from tools import expanded

# Of the first run, of the second, ...: where curves lie on each other, the lower one shows in gaps
LINES = "-", "--", "-.", ":"
NAMES = {"d_ff": "neurons", "n_kv_head": "heads", "d_model": "channels", "n_layer": "layers"}
BLUE, RED, GREY = "#2f6fb7", "#e5484d", "#8b949e"
CAPTIONS = {"enlarged": "A large model trains", "prune": "Its weakest parts go"}  # of the film
CAPTIONS["recover"] = "What is left recovers"
GONE, CHOSEN, USED = range(3)  # the states of a unit


def by_name(out_dir: Path, pruned: bool = False) -> dict[str, list[dict]]:
    """The events of a run, by name. pruned: it must have a prune. Raises UserError."""
    events, log = read_log(out_dir), {}
    for name in ("step", "eval", "prune"):
        log[name] = [e | {"run": out_dir.name} for e in events if e["event"] == name]
        if not log[name] and (pruned or name != "prune"):
            raise UserError(f"{out_dir}: its log has no {name} yet; nothing to draw")
    return log


def along(events: list[dict], key: str = "tokens") -> list:
    return [e[key] for e in events]


def rises(prunes: list[dict]) -> list[float]:
    """What each prune added to the loss, in nats per token."""
    return [e["loss_after"] - e["loss_before"] for e in prunes]


def costliest(prunes: list[dict]) -> str:
    e = max(prunes, key=lambda e: rises([e]))
    what = f"{e['width_before']} → {e['width_after']} {NAMES.get(e['kind'], e['kind'])}"
    return f"{e['run']}: pruning {what} cost most, {rises([e])[0]:.3f} nats"


def widths(log: dict[str, list[dict]], done: int) -> dict[str, int]:
    """Kind -> its width when so many prunes are done."""
    first = {e["kind"]: e["width_before"] for e in log["prune"][::-1]}
    return log["step"][0] | first | {e["kind"]: e["width_after"] for e in log["prune"][:done]}


def open_figure(rows: int, columns: int, **settings):
    """A figure and its axes over tokens, (rows, columns). Raises UserError without matplotlib."""
    try:
        import matplotlib.pyplot as plt
        from matplotlib.ticker import EngFormatter
    except ModuleNotFoundError as error:
        raise UserError(f"no figure: {error}; pip install -r requirements-extra.txt") from error
    plt.switch_backend("Agg")
    plt.rcParams.update({"font.size": 9})
    settings = {"sharex": "col", "squeeze": False, "constrained_layout": True} | settings
    figure, axes = plt.subplots(rows, columns, **settings)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, lw=0.5)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1M, 2M
    return figure, axes


def draw_losses(panel, log: dict, x: str, jump: str, label: str, first=True, **style) -> None:
    """Draw the losses of a run, its prunes as jumps. No line joins these, of few tokens, with the
    validations, of many: their own line has a gap at each prune. first: name all in the legend."""
    steps, prunes = log["step"], log["prune"]
    words = ("training", "before and after a prune (small sample)") if first else (None, None)
    faint = {"color": style["color"], "alpha": 0.4, "label": words[0]}
    panel.plot(along(steps, x), along(steps, "loss"), lw=1, **faint)
    points = sorted(log["eval"] + prunes, key=lambda e: e["tokens"])
    y = [e.get("val_loss", math.nan) for e in points]
    panel.plot(along(points, x), y, marker="o", ms=3.5, label=label, **style)
    jumps = np.reshape([(e["loss_before"], e["loss_after"]) for e in prunes], (-1, 2))
    panel.plot(np.repeat(along(prunes, x), 2), jumps.flat, color=jump, lw=0.8)
    panel.vlines(along(prunes, x), *jumps.T, color=jump, lw=3, label=words[1] if prunes else None)


def span(logs: list[dict]) -> tuple[float, float]:
    """Where losses are drawn: of all prunes, and of validations but for a run's first tenth."""
    y = [e[k] for log in logs for e in log["prune"] for k in ("loss_before", "loss_after")]
    for log in logs:
        y += [e["val_loss"] for e in log["eval"] if e["tokens"] > log["step"][-1]["tokens"] / 10]
    return np.min(y) - np.ptp(y) / 5 - 0.01, np.max(y) + np.ptp(y) / 3 + 0.01


def draw(out_dirs: list[Path], x: str = "tokens"):
    """A figure with the curves of runs over x, "tokens" or "flops". Raises UserError."""
    logs = [by_name(out_dir) for out_dir in out_dirs]
    every = [e for log in logs for e in log["prune"]]
    minus = ["minus the first run"] * (x == "tokens" and len(logs) > 1)  # FLOPs seldom meet
    kinds = [*dict.fromkeys(along(every, "kind"))]
    names = ["loss, nats per token", *minus, *kinds, "learning rate"]
    heights = [3, *[1.2] * len(names[1:])]
    size = {"figsize": (8.3, 1.1 * sum(heights)), "height_ratios": heights}
    panels = dict(zip(names, open_figure(len(names), 1, **size)[1].flat))
    loss, *others, lr = panels.values()
    known = {e["tokens"]: e["val_loss"] for e in logs[0]["eval"]}
    for i, log in enumerate(logs):
        steps, prunes, evals, color = log["step"], log["prune"], log["eval"], f"C{i}"
        style = {"color": color, "ls": LINES[i % 4]}
        label = f"{evals[-1]['run']} ends at {evals[-1]['val_loss']:.3f} (validation)"
        if prunes:
            label += f", prunes cost {round(sum(rises(prunes)), 2) + 0.0:.2f}"  # no -0
        draw_losses(loss, log, x, color if logs[1:] else RED, label, first=i == 0, **style)
        if i and minus:  # not between validations, where a curve bends more than runs differ
            both = [e for e in evals if e["tokens"] in known]
            y = [e["val_loss"] - known[e["tokens"]] for e in both]
            others[0].plot(along(both, x), y, marker="o", ms=3.5, **style)
            for e in both[-1:]:
                box = {"va": "center", "zorder": 1, "bbox": {"color": "white", "pad": 1}}
                others[0].text(e[x], y[-1], f"   {y[-1]:+.3f}", color=color, **box)
        for kind in kinds:
            cuts = [e for e in prunes if e["kind"] == kind]
            y = [widths(log, 0)[kind], *along(cuts, "width_after"), steps[-1][kind]]
            panels[kind].step([0, *along(cuts, x), steps[-1][x]], y, where="post", **style)
        lr.plot(along(steps, x), along(steps, "lr"), **style)
    for name, panel in panels.items():
        panel.set(ylabel=NAMES.get(name, name))
        if panel is not loss:
            panel.axhline(0, color="C0" if name in minus else "0.8", lw=1, zorder=0)
    loss.set(ylim=span(logs), title=costliest(every) if every else None)
    loss.legend(loc="upper right", edgecolor="none")
    lr.set_xlabel("training FLOPs" if x == "flops" else "training tokens")
    return loss.figure


def draw_units(out_dir: Path):
    """A figure: what the prunes of a kind cost, and the scores that chose. Raises UserError."""
    log = by_name(out_dir, pruned=True)
    kinds = {kind: NAMES.get(kind, kind) for kind in along(log["prune"], "kind")}
    figure, axes = open_figure(len(kinds), 2, figsize=(11, 3.5 * len(kinds)), sharex=False)
    for (kind, name), (cost, score) in zip(kinds.items(), axes):
        prunes = [e for e in log["prune"] if e["kind"] == kind]
        bars = cost.bar(range(len(prunes)), rises(prunes), 0.5, color=RED)
        cost.bar_label(bars, fmt="%.3f", padding=2, rotation=90 * (len(prunes) > 12))
        cost.set_xticks(range(len(prunes)), along(prunes, "width_after"))
        cost.set(xlim=(-1, len(prunes)), xlabel=f"{name} left after each prune", ymargin=0.1)
        cost.set(ylabel="rise of the loss, nats per token", title=costliest(prunes))
        ends = ("first prune", prunes[0], GREY), ("last prune", prunes[-1], BLUE)
        for when, e, color in ends[-len(prunes) :]:  # one, if it is the first and the last
            gone = 100 * (1 - e["width_after"] / e["width_before"])
            for layer, y in enumerate(e["scores"]):  # quantiles at 0, 5, ... 100%
                x = np.linspace(0, 100, len(y))
                score.plot(x, y, color=color, label=None if layer else when)
                go = np.append(x[x < gone], gone)
                score.plot(go, np.interp(go, x, y), color=RED, lw=3)
        score.plot([], [], color=RED, lw=3, label="these go")
        score.legend(frameon=False)
        score.set(yscale="log", ylabel="score", xlabel=f"% of the {name}, weakest first")
        score.set_title(f"The {name} with the lowest scores go")
    return figure


def moments_of(log: dict[str, list[dict]]) -> list[tuple[int, int, list[dict]]]:
    """For each image: tokens, prunes done, and the prune that is due, if its units are shown: 60
    steps or so, and three images of each prune."""
    at, shown = along(log["prune"]), along(log["step"])[:: -math.ceil(len(log["step"]) / 60)]
    moments = [(now, sum(x <= now for x in at), []) for now in shown]
    for i, e in enumerate(log["prune"]):
        moments += [(at[i], i, [e])] * 2 + [(at[i], i + 1, [])]
    return sorted(moments, key=lambda moment: moment[:2])


def units_of(log: dict[str, list[dict]], done: int, due: list[dict]) -> dict[str, np.ndarray]:
    """Kind -> the states of its units, (layers or 1, width at first). Those left stand first."""
    first, now, units = widths(log, 0), widths(log, done), {}
    for e in log["prune"]:
        shape = first["n_layer"] if e["removed"][1:] else 1, first[e["kind"]]
        states = units.setdefault(e["kind"], np.full(shape, GONE))
        states[: now["n_layer"], : now[e["kind"]]] = USED
    for e in due:
        for states, removed in zip(units[e["kind"]], e["removed"]):
            states[removed] = CHOSEN
    return units


def draw_moment(panels, log: dict, now: int, done: int, due: list[dict]) -> None:
    """Draw a run after `now` tokens. panels: a title, each kind of unit, and the loss."""
    from matplotlib.colors import to_rgba_array

    for panel in panels:
        panel.clear()
        panel.axis("off")
    (title, *kinds, loss), paper = panels, panels[0].figure.get_facecolor()
    past = {name: [e for e in log[name] if e["tokens"] <= now] for name in log}
    past["prune"] = log["prune"][:done]
    step = [log["step"][0], *past["step"]][-1]
    title.set_title(CAPTIONS["prune" if due else step["phase"]], size=24, weight="bold")
    title.set_title(f"{compact(now)} tokens", loc="right")
    kinds[0].set_title(f"{compact(step['params'])} parameters", loc="right")
    for panel, (kind, states) in zip(kinds, units_of(log, done, due).items()):
        (groups, width), used = states.shape, states == USED
        colors = to_rgba_array((GREY + "40", RED, BLUE))[states]  # in the order of the states
        panel.imshow(colors, aspect="auto", interpolation="nearest")
        for y in range(1, groups):
            panel.axhline(y - 0.5, color=paper, lw=6)
        where = NAMES.get(kind, kind) + f", {used.any(1).sum()} layers" * (groups > 1)
        panel.set_title(f"{where}: {used.sum(1).max()} of {width}")
    val_loss = f": {past['eval'][-1]['val_loss']:.2f}" if past["eval"] else ""
    draw_losses(loss, past, "tokens", RED, "validation" + val_loss, color=BLUE)
    added = round(sum(rises(past["prune"])), 2) + 0.0  # no -0
    loss.set(xlim=(0, 1.01 * log["step"][-1]["tokens"]), ylim=span([log]))
    loss.set_title(f"loss, nats; prunes add {added:.2f}")
    loss.legend(loc="upper right", handlelength=1, fontsize=15, facecolor=paper, edgecolor="none")


def draw_film(out_dir: Path, moving: bool) -> list:
    """Images of a run as it goes on, on black; or only the last one, on white. Raises UserError."""
    log = by_name(out_dir, pruned=True)
    moments, images = moments_of(log), []
    heights = [0.01, *(min(4, 0.5 * len(u)) for u in units_of(log, 0, []).values()), 2.3]
    ink, paper, dpi = ("white", "#0d1117", 100) if moving else ("black", "white", 200)
    size = {"figsize": (7.2, 1.2 + sum(heights)), "height_ratios": heights, "dpi": dpi}
    figure, axes = open_figure(len(heights), 1, sharex=False, facecolor=paper, **size)
    from matplotlib import rc_context
    from PIL import Image

    style = {"text.color": ink, "axes.titlesize": 18, "axes.titlelocation": "left"}
    style |= {"lines.linewidth": 2.5, "lines.markersize": 8}
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    for moment in moments[::-1] if moving else moments[-1:]:
        with rc_context(style):
            draw_moment(axes[:, 0], log, *moment)
        figure.canvas.draw()
        figure.set_layout_engine("none")  # all moments keep the places of the last one
        images.insert(0, Image.fromarray(np.array(figure.canvas.buffer_rgba())).convert("RGB"))
    if moving:  # one palette for all: a small file
        palette = images[-1].quantize(64, Image.Quantize.MAXCOVERAGE)
        images = [image.quantize(palette=palette, dither=0) for image in images]
    return images


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("out_dirs", type=expanded, nargs="+", metavar="OUT_DIR")
    parser.add_argument("--to", type=expanded)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--flops", action="store_true", help="over training FLOPs, not tokens")
    what.add_argument("--units", action="store_true", help="what the prunes of one run cost")
    what.add_argument("--animate", action="store_true", help="the units of one run, as it goes on")
    args = parser.parse_args(argv)
    first, *others = args.out_dirs
    if others and (args.units or args.animate):
        raise UserError("--units and --animate take one OUT_DIR")
    name = "units.png" if args.units else "run.gif" if args.animate else "run.png"
    if missing := [out_dir for out_dir in args.out_dirs if not out_dir.is_dir()]:
        raise UserError(f"{missing[0]}: no such run")
    to = args.to or first
    to = to / name if to.is_dir() else to.with_suffix(to.suffix or Path(name).suffix)
    try:
        if args.animate:
            images = draw_film(first, moving=to.suffix == ".gif")
            times = [7000 // len(images)] * (len(images) - 1) + [2000]  # ms
            frames = {"save_all": True, "append_images": images[1:], "duration": times, "loop": 0}
            save = partial(images[0].save, **frames)
        else:
            over = "flops" if args.flops else "tokens"
            figure = draw_units(first) if args.units else draw(args.out_dirs, over)
            save = partial(figure.savefig, dpi=130)
        if to.is_symlink():  # what it leads to is not ours
            to.unlink()
        save(to)
    except (LookupError, TypeError, ValueError) as error:
        what = "a log of an older version, or damaged, or a name that ends otherwise"
        raise UserError(f"{first}: cannot be drawn to {to} ({what}): {error!r}") from error
    print(to)


if __name__ == "__main__":
    raise SystemExit(main())
