"""What every picture of runs needs: the events of a log, what they say, and a figure."""

from pathlib import Path

from run import UserError
from run.out_dir import read_log


def by_name(out_dir: Path, pruned: bool = False) -> dict[str, list[dict]]:
    """The events of a run, by name. pruned: it must have a prune. Raises UserError."""
    events = read_log(out_dir)
    log = {name: [e for e in events if e["event"] == name] for name in ("step", "eval", "prune")}
    for name in ("step", "eval", "prune")[: 2 + pruned]:
        if not log[name]:
            raise UserError(f"{out_dir}: its log has no {name} yet; nothing to draw")
    return log


def along(events: list[dict], key: str = "tokens") -> list:
    return [e[key] for e in events]


def rises(prunes: list[dict]) -> list[float]:
    """What each prune added to the loss, in nats per token."""
    return [e["loss_after"] - e["loss_before"] for e in prunes]


def widths(log: dict[str, list[dict]], kind: str, x: str = "tokens") -> tuple[list, list]:
    """The tokens (or FLOPs) from which each width of a kind holds, and the width; the end last."""
    prunes = [e for e in log["prune"] if e["kind"] == kind]
    first = prunes[0]["width_before"] if prunes else log["step"][0][kind]
    y = [first, *along(prunes, "width_after")]
    return [0, *along(prunes, x), log["step"][-1][x]], [*y, y[-1]]


def prunes_by_layer(log: dict[str, list[dict]]):
    """Each prune with two lists: the layer of each group that it cut, [0] for one group of all
    layers; and the layers that went. Layers keep the numbers that they had at first."""
    layers = list(range(widths(log, "n_layer")[1][0]))
    in_layers: dict[str, bool] = {}  # kind -> whether each layer has a group of it
    for e in log["prune"]:
        in_layers.setdefault(e["kind"], len(e["removed"]) == len(layers))
        gone = [layers[i] for i in e["removed"][0]] if e["kind"] == "n_layer" else []
        yield e, layers if in_layers[e["kind"]] else [0], gone
        layers = [layer for layer in layers if layer not in gone]


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
