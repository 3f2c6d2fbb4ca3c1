"""Draw runs from their logs: python -m tools.plot OUT_DIR [OUT_DIR ...] [--to FILE]

Loss, widths and learning rate over tokens, one colour a run, go to the first OUT_DIR, as run.png,
units.png or run.gif, unless --to names another file. With --animate, a .png shows the end alone."""

import math
from argparse import ArgumentParser
from pathlib import Path

import numpy as np

from data.command import UserError, command
from run.config import load_config
from run.log import compact, read_log
from schedule import Schedule
from tools import expanded, name_of

LINES = "-", "--", "-.", ":"  # of the first run, the second, ...: both show where they coincide
NAMES = {"d_ff": "neurons", "n_kv_head": "heads", "d_model": "channels", "n_layer": "layers"}
BLUE, RED, GREY = "#2f6fb7", "#e5484d", "#8b949e"
UNITS = np.array([[230] * 3, [47, 111, 183], [229, 72, 77]])  # gone, there (BLUE), going (RED)
CAPTIONS = {"enlarged": "A wide model trains", "prune": "Weak parts go", "recover": "It recovers"}


def by_name(out_dir: Path, pruned: bool = False) -> dict[str, list[dict]]:
    """The events of a run, by name. pruned: it must have a prune. Raises UserError."""
    run, events, log = {"run": name_of(out_dir)}, read_log(out_dir), {}
    for name in ("step", "eval", "prune"):
        log[name] = [e | run for e in events if e["event"] == name]
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


def widths(log: dict[str, list[dict]], done: list[dict]) -> dict[str, int]:
    """Kind -> its width after these prunes, the first ones of a log."""
    first = {e["kind"]: e["width_before"] for e in log["prune"][::-1]}
    return log["step"][0] | first | {e["kind"]: e["width_after"] for e in done}


def open_figure(rows: int, columns: int, **settings):
    """A figure and its axes over tokens, (rows, columns)."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    plt.switch_backend("Agg")
    plt.rcParams.update({"font.size": 9})
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained", **settings)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, lw=0.5)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1M, 2M
    return figure, axes


def draw_losses(panel, log: dict, x: str, jump: str, more: str = "", **style) -> None:
    """Draw the losses of a run, with its last one for a legend. Those around prunes are bars."""
    steps, evals, prunes = log.values()
    label = "".join(f"{e['run']} at {e['val_loss']:.3f}{more}" for e in evals[-1:])
    panel.plot(along(steps, x), along(steps, "loss"), lw=1, color=style["color"], alpha=0.4)
    panel.plot(along(evals, x), along(evals, "val_loss"), marker="o", ms=3.5, label=label, **style)
    ends = along(prunes, "loss_before"), along(prunes, "loss_after")
    panel.vlines(along(prunes, x), *ends, color=jump, lw=3, zorder=3)


def limits(logs: list[dict]) -> tuple[float, float]:
    """Where losses are drawn: of all prunes, and of validations but for a run's first tenth."""
    y = [e[k] for log in logs for e in log["prune"] for k in ("loss_before", "loss_after")]
    for log in logs:
        y += [e["val_loss"] for e in log["eval"] if e["tokens"] > log["step"][-1]["tokens"] / 10]
    return min(y) - 0.1, max(y) + 0.1


def draw(out_dirs: list[Path], x: str = "tokens"):
    """A figure with the curves of runs over x, "tokens" or "flops". Raises UserError."""
    logs = [by_name(out_dir) for out_dir in out_dirs]
    every = [e for log in logs for e in log["prune"]]
    kinds = [*dict.fromkeys(along(every, "kind"))]
    minus = ["minus the first run"] * (x == "tokens" and len(logs) > 1)  # FLOPs seldom meet
    names = ["loss, nats per token", *minus, *kinds, "learning rate"]
    heights = [3, *[1.2] * len(names[1:])]
    size = {"figsize": (8.3, 1.1 * sum(heights)), "height_ratios": heights}
    figure, axes = open_figure(len(names), 1, sharex=True, **size)
    panels = dict(zip(names, axes[:, 0]))
    loss, *others, lr = panels.values()
    known = {e["tokens"]: e["val_loss"] for e in logs[0]["eval"]}
    for i, log in enumerate(logs):
        steps, evals, prunes = log.values()
        style = {"color": f"C{i}", "ls": LINES[i % 4]}
        cost = round(sum(rises(prunes)), 2) + 0.0  # no -0
        more = f", prunes cost {cost:.2f}" if prunes else ""
        draw_losses(loss, log, x, f"C{i}" if logs[1:] else RED, more, **style)
        if i and minus:  # not between validations, where a curve bends more than runs differ
            both = [e for e in evals if e["tokens"] in known]
            y = [e["val_loss"] - known[e["tokens"]] for e in both]
            others[0].plot(along(both, x), y, marker="o", ms=3.5, **style)
        for kind in kinds:
            cuts = [e for e in prunes if e["kind"] == kind]
            y = [widths(log, [])[kind], *along(cuts, "width_after"), steps[-1][kind]]
            panels[kind].step([0, *along(cuts, x), steps[-1][x]], y, where="post", **style)
        rate = Schedule(load_config(str(out_dirs[i]))).learning_rate
        first = range(1, steps[0]["step"])  # where the log begins, the warm-up may be over
        at = [step * steps[0][x] / steps[0]["step"] for step in first]
        lr.plot(at + along(steps, x), [*map(rate, first), *along(steps, "lr")], **style)
    for name, panel in panels.items():
        panel.set_ylabel(NAMES.get(name, name))
        panel.axhline(0, color="0.8", lw=1, zorder=0)
    loss.set_ylim(limits(logs))
    loss.plot([], [], color="0.7", lw=1, label="training (dots: validation)")
    loss.plot([], [], color="0.7", lw=5, label="before and after a prune (small sample)")
    loss.set_title(costliest(every) if every else None)
    loss.legend(loc="upper right", edgecolor="none")
    lr.set_xlabel("training FLOPs" if x == "flops" else "training tokens")
    return figure


def draw_units(out_dir: Path):
    """A figure: what the prunes of a kind cost, and the scores that chose. Raises UserError."""
    log = by_name(out_dir, pruned=True)
    kinds = dict.fromkeys(along(log["prune"], "kind"))
    figure, axes = open_figure(len(kinds), 2, figsize=(11, 3.5 * len(kinds)))
    for kind, (cost, score) in zip(kinds, axes):
        name, prunes = NAMES.get(kind, kind), [e for e in log["prune"] if e["kind"] == kind]
        bars = cost.bar(range(len(prunes)), rises(prunes), 0.5, color=RED)
        cost.bar_label(bars, fmt="%.3f", padding=2)
        cost.set_xticks(range(len(prunes)), along(prunes, "width_after"))
        cost.set(xlabel=f"{name} left after each prune", ylabel="rise of the loss, nats per token")
        cost.set_title(costliest(prunes))
        ends = [("first", prunes[0], GREY), ("last", prunes[-1], BLUE)]
        for when, e, color in ends[-len(prunes) :]:
            for y in e["scores"]:  # of a layer: quantiles at 0, 5, ... 100%
                score.plot(np.linspace(0, 100, len(y)), y, color=color)
            for layer in {1, len(e["scores"])} if e["scores"][1:] else ():
                left = {"ha": "right", "va": "center", "color": color}
                score.text(-1, e["scores"][layer - 1][0], f"layer {layer}", **left)
            gone = 100 * (1 - e["width_after"] / e["width_before"])
            what = f"{when} prune: the {name} left of this line go"
            score.axvline(gone, color=color, ls="--", label=what)
        score.legend(frameon=False)
        score.set(xlim=(-12, 104), yscale="log", ylabel="score")
        score.set_xlabel(f"% of the {name}, weakest first")
    return figure


def draw_moment(panels, log: dict[str, list[dict]], step: int, other: list[dict] = ()) -> None:
    """Draw a run before a step, and in red what goes then. panels: caption, kinds of unit, loss.
    other: the validations of a run to compare with."""
    past = {name: [e for e in log[name] if e["step"] < step] for name in log}
    due = [e for e in log["prune"] if e["step"] == step]
    first, now = widths(log, []), widths(log, past["prune"])
    seen = sorted(past["prune"] + past["step"], key=lambda e: e["step"])
    last = [log["step"][0], *(e for e in seen if "params" in e)][-1]  # prunes of old runs lack it
    phase = "prune" if due or past["prune"] else "enlarged"
    if not any(e["step"] >= step for e in log["prune"]):
        phase = log["step"][-1]["phase"]  # recover, unless the run was stopped amid its prunes
    numbers = panels[-1].xaxis.get_major_formatter()
    for panel in panels:
        panel.clear()
        panel.set_axis_off()
    (caption, *bars, loss), kinds = panels, dict.fromkeys(along(log["prune"], "kind"))
    caption.set_title(CAPTIONS[phase], loc="left", size=12, weight="bold")
    caption.set_title(f"{compact(last['params'])} parameters", loc="right")
    for panel, kind in zip(bars, kinds):
        layered = any(e["removed"][1:] for e in log["prune"] if e["kind"] == kind)
        grid = np.zeros((first["n_layer"] if layered else 1, first[kind]), int)
        grid[: now["n_layer"], : now[kind]] = 1
        for e in due:
            for layer, going in enumerate(e["removed"] if e["kind"] == kind else ()):
                grid[layer, going] = 2
        panel.imshow(UNITS[grid], aspect="auto", interpolation="nearest")
        panel.hlines(np.arange(0.5, len(grid) - 1), *panel.get_xlim(), color="w", lw=2 / len(grid))
        name = NAMES.get(kind, kind) + " per layer" * layered
        panel.set_title(f"{name}: {now[kind]} of {first[kind]}", loc="left")
    loss.set_axis_on()
    draw_losses(loss, past, "tokens", RED, color=BLUE)
    theirs = {"step": [], "eval": [e for e in other if e["step"] < step], "prune": []}
    draw_losses(loss, theirs, "tokens", GREY, color=GREY, ls="--")
    if past["eval"]:
        loss.legend(loc="upper right", frameon=False, labelcolor="linecolor", borderpad=0)
    loss.set(xlim=(0, 1.01 * log["step"][-1]["tokens"]), ylim=limits([log]))
    loss.xaxis.set_major_formatter(numbers)
    loss.set_title(f"loss at {compact(last['tokens'])} tokens", loc="left")


def draw_film(out_dir: Path, to: Path, others: list[Path]) -> None:
    """Save a GIF of a run as it goes on; as another kind of file, its end. Raises UserError."""
    log = by_name(out_dir, pruned=True)
    other = [e for path in others[:1] for e in by_name(path)["eval"]]
    steps, prunes = along(log["step"], "step"), along(log["prune"], "step")
    rows = [0.01, *[0.5] * len({*along(log["prune"], "kind")}), 1]  # their heights
    figure, axes = open_figure(len(rows), 1, figsize=(3.6, 0.9 + sum(rows)), height_ratios=rows)
    from matplotlib.animation import PillowWriter

    shown = [step + 1 for step in steps[:: -math.ceil(len(steps) / 30)]]
    moments = sorted([*shown, *prunes, *prunes, *(step + 1 for step in prunes)])
    with (film := PillowWriter(fps=6)).saving(figure, to, dpi=150):
        for step in [*moments, *moments[-1:] * 9] if to.suffix == ".gif" else moments[-1:]:
            draw_moment(axes[:, 0], log, step, other)
            film.grab_frame()


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("out_dirs", type=expanded, nargs="+", metavar="OUT_DIR")
    parser.add_argument("--to", type=expanded)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--flops", action="store_true", help="over training FLOPs, not tokens")
    what.add_argument("--units", action="store_true", help="what the first run's prunes cost")
    what.add_argument("--animate", action="store_true", help="the first, and the second, go on")
    args = parser.parse_args(argv)
    first = args.out_dirs[0]
    name = "units.png" if args.units else "run.gif" if args.animate else "run.png"
    to = args.to or first
    to = to / name if to.is_dir() else to.with_suffix(to.suffix or Path(name).suffix)
    aside = to.with_name(f".{to.name}")  # then renamed: what a link leads to is not ours
    aside.unlink(missing_ok=True)
    try:
        if args.animate:
            draw_film(first, aside, args.out_dirs[1:])
        else:
            over = "flops" if args.flops else "tokens"
            figure = draw_units(first) if args.units else draw(args.out_dirs, over)
            figure.savefig(aside, dpi=130)
        aside.replace(to)
    except (LookupError, TypeError, ValueError) as error:
        what = "a log of an older version, or damaged, or a name that ends otherwise"
        raise UserError(f"{first}: cannot be drawn to {to} ({what}): {error!r}") from error
    print(to)


if __name__ == "__main__":
    raise SystemExit(main())
