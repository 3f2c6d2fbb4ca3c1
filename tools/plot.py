"""Draw runs from their logs: python -m tools.plot OUT_DIR [OUT_DIR ...] [--to FILE]

Loss, widths and learning rate over tokens, one colour a run, go to the first OUT_DIR, as run.png,
units.png or run.gif, unless --to names another file. With --animate, a .png shows the end alone."""

from pathlib import Path

import numpy as np

from run import UserError
from tools import ArgumentParser, expanded, program
from tools.figures import along, by_name, open_figure, prunes_by_layer, rises, widths
from tools.film import NAMES, RED, draw_film

# Of the first run, of the second, ...: where curves lie on each other, the lower one shows in gaps
LINES = "-", "--", "-.", ":"


def draw(out_dirs: list[Path], x: str = "tokens"):
    """A figure with the curves of runs over x, "tokens" or "flops". Raises UserError."""
    logs = [by_name(out_dir) for out_dir in out_dirs]
    kinds = list(dict.fromkeys(e["kind"] for log in logs for e in log["prune"]))
    heights = (3, *[1.2] * len(kinds), 1.2)
    size = 8, 1.1 * sum(heights)
    figure, axes = open_figure(len(heights), 1, figsize=size, height_ratios=heights)
    loss, *rest, lr = axes[:, 0]
    for i, (out_dir, log) in enumerate(zip(out_dirs, logs)):
        evals, steps, color = log["eval"], along(log["step"], x), f"C{i}"
        style = {"color": color, "ls": LINES[i % len(LINES)]}
        label = f"{out_dir.name} ends at {evals[-1]['val_loss']:.3f}"
        if log["prune"]:
            label += f", prunes cost {round(sum(rises(log['prune'])), 2) + 0.0:.2f}"  # no -0
        loss.plot(along(evals, x), along(evals, "val_loss"), marker="o", ms=3, label=label, **style)
        loss.plot(steps, along(log["step"], "loss"), color=color, alpha=0.35, lw=0.8)
        for prune in along(log["prune"], x):  # dots in turn, where two runs prune at one step
            loss.axvline(prune, color=color, lw=0.8, ls=(2 * i, (1, 2 * len(logs) - 1)))
        for panel, kind in zip(rest, kinds):
            panel.plot(*widths(log, kind, x), drawstyle="steps-post", **style)
        lr.plot(steps, along(log["step"], "lr"), **style)
    final = min(e["val_loss"] for log in logs for e in log["eval"])
    loss.set(ylim=(final - 0.15, final + 1.6), ylabel="loss, nats per token")
    loss.plot([], [], "o-", color="grey", ms=3, label="validation")
    loss.plot([], [], color="grey", alpha=0.35, lw=0.8, label="training")
    loss.plot([], [], ":", color="grey", label="prune" if kinds else None)
    loss.legend(frameon=False, loc="upper right")
    for panel, name in zip((*rest, lr), (*kinds, "learning rate")):
        panel.set(ylim=(0, None), ylabel=name)
    lr.set_xlabel("training FLOPs" if x == "flops" else "training tokens")
    return figure


def draw_units(out_dir: Path):
    """A figure: what the prunes of a kind cost, and the scores that chose. Raises UserError."""
    log = by_name(out_dir, pruned=True)
    n_layer = widths(log, "n_layer")[1][0]
    kinds = {kind: NAMES.get(kind, kind) for kind in along(log["prune"], "kind")}
    figure, axes = open_figure(len(kinds), 2, figsize=(11, 3.5 * len(kinds)), sharex=False)
    from matplotlib import colormaps

    for (kind, name), (cost, score) in zip(kinds.items(), axes):
        own = [(e, layers) for e, layers, _ in prunes_by_layer(log) if e["kind"] == kind]
        prunes, scores = [e for e, _ in own], [dict(zip(layers, e["scores"])) for e, layers in own]
        added, turn = rises(prunes), 90 * (len(prunes) > 12)
        bars = cost.bar(range(len(prunes)), added, 0.5, color=RED)
        cost.bar_label(bars, fmt="%.3f", padding=2, rotation=turn)
        cost.set(ymargin=0.1, ylabel="rise of the loss, nats per token")
        cost.set_title(f"The last prune of {name} cost {added[-1]:.2f} of {sum(added):.2f} nats")
        ends = {"first prune": 0, "last prune": len(prunes) - 1} if prunes[1:] else {"prune": 0}
        for (when, i), line in zip(ends.items(), ("-", "--")):
            gone = 100 * (1 - prunes[i]["width_after"] / prunes[i]["width_before"])
            for layer, y in scores[i].items():  # quantiles at 0, 5, ... 100%
                x = np.linspace(0, 100, len(y))
                color = colormaps["viridis"](layer / n_layer)
                words = when + f", layer {layer}" * (len(scores[i]) > 1)
                named = layer in (min(scores[i]), max(scores[i]))
                score.plot(x, y, line, color=color, label=words if named else None)
                go = np.append(x[x < gone], gone)
                score.plot(go, np.interp(go, x, y), color=RED, lw=3)
        score.plot([], [], color=RED, lw=3, label="these go")
        score.legend(frameon=False)
        score.set(yscale="log", ylabel="score", xlabel=f"% of the {name}, weakest first")
        score.set_title(f"The {name} with the lowest scores go")
        ticks = [f"{e['width_before']}\n→ {e['width_after']}" for e in prunes]
        cost.set_xticks(range(len(prunes)), ticks, rotation=turn, fontsize=8)
        cost.set(xlim=(-1, len(prunes)), xlabel=f"{kind} before and after each prune")
    return figure


@program
def main(parser: ArgumentParser, argv: list[str]) -> None:
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
            images[0].save(to, save_all=True, append_images=images[1:], duration=times, loop=0)
        else:
            x = "flops" if args.flops else "tokens"
            figure = draw_units(first) if args.units else draw(args.out_dirs, x)
            figure.savefig(to, dpi=130)
    except (LookupError, TypeError, ValueError) as error:
        what = "a log of an older version, or damaged, or a name that ends otherwise"
        raise UserError(f"{first}: cannot be drawn to {to} ({what}): {error!r}") from error
    print(to)


if __name__ == "__main__":
    raise SystemExit(main())
