"""The report's plots, as PNG data for one self-contained HTML page."""

import base64
import io
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from latentrt.validation.judge.findings import Findings

_INK, _MUTED = "#1d2733", "#8a94a0"
_COLORS = {"torch model": "#7a8b99", "exported graph": "#d9902f", "engine": "#2166ac", "flip": "#c0392b"}
_STYLE = {
    "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _MUTED, "axes.grid": True,
    "grid.color": "#e6eaee", "grid.linewidth": 0.7, "axes.axisbelow": True, "text.color": _INK, "axes.labelcolor": _INK,
    "xtick.color": _INK, "ytick.color": _INK, "legend.frameon": False, "figure.dpi": 150, "axes.titlesize": 10,
}  # fmt: skip
_FLOOR = 1e-9  # zeros on logarithmic axes


def all_plots(findings: Findings) -> dict[str, str]:
    """Data URIs by name: layers, kl, margins, load. A plot without data is left out."""
    plots = {"kl": _draw(_kl, findings)}
    if findings.layers:
        plots["layers"] = _draw(_layers, findings)
    if findings.series.get("routing", {}).get("engine"):
        plots |= {"margins": _draw(_margins, findings), "load": _draw(_load, findings)}
    return plots


def _draw(plot: Callable, findings: Findings) -> str:
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10, 3.3), layout="constrained")
        plot(findings, axes)
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
        plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _layers(findings: Findings, axes) -> None:
    for stage, layers in findings.layers.items():
        x = [e.layer for e in layers]
        color = _COLORS[stage]
        axes[0].plot(x, [max(e.hidden_free, _FLOOR) for e in layers], "o-", color=color, label=stage, ms=4)
        axes[0].plot(x, [max(e.hidden_routed, _FLOOR) for e in layers], "x--", color=color, ms=4, lw=0.9)
        for tensor, line in (("hidden", "o-"), ("attention", "^:")):
            alone = [s for s in findings.alone.get(stage, ()) if s["tensor"] == tensor]
            found = [max(s["spread"].found.whole, _FLOOR) for s in alone]
            axes[1].plot([s["layer"] for s in alone], found, line, color=color, ms=4, lw=0.9 if tensor == "attention" else None)
    limits = [s for s in findings.alone.get("engine", ()) if s["tensor"] == "hidden"]
    if limits:
        x, y = [s["layer"] for s in limits], [max(s["spread"].limit.whole, _FLOOR) for s in limits]
        axes[1].plot(x, y, color=_COLORS["flip"], lw=1, ls="--", label="engine's limit")
        axes[1].legend(loc="best", fontsize=8)
    axes[0].set(title="Error growing through the layers (dashed: routing forced)", ylabel="relative error of the hidden state")
    axes[1].set(title="Each layer alone (dotted: its attention)", ylabel="relative error")
    axes[0].legend(loc="best", fontsize=8)
    for axis in axes:
        axis.set_yscale("log")
        axis.set_xlabel("layer")
        axis.xaxis.get_major_locator().set_params(integer=True)


def _kl(findings: Findings, axes) -> None:
    windows = findings.series["kl"]
    kl = np.concatenate(windows)
    finite = np.clip(np.where(np.isfinite(kl), kl, 1e3), 1e-16, None)
    axes[0].hist(finite, bins=np.logspace(np.log10(finite.min()), np.log10(finite.max() * 1.01), 50), color=_COLORS["engine"])
    mean, p99 = float(kl.mean()), float(np.percentile(kl, 99))
    for value, label, style in ((mean, f"mean {mean:.2g}", "-"), (p99, f"p99 {p99:.2g}", "--")):
        if np.isfinite(value) and value > 0:
            axes[0].axvline(value, color=_COLORS["flip"], ls=style, lw=1, label=label)
    axes[0].legend(fontsize=8)
    axes[0].set_xscale("log")
    axes[0].set(title="KL divergence of the next-token distribution", xlabel="nats", ylabel="tokens")
    length = max(map(len, windows))
    by_position = np.array([np.mean([w[i] for w in windows if i < len(w)]) for i in range(length)])
    width = max(1, length // 64)
    smooth = [by_position[i : i + width].mean() for i in range(0, length, width)]
    axes[1].plot(np.arange(0, length, width), np.maximum(smooth, 1e-16), color=_COLORS["engine"], lw=1.2)
    axes[1].set_yscale("log")
    axes[1].set(title="Mean KL by position", xlabel="position in the window", ylabel="nats")


def _margins(findings: Findings, axes) -> None:
    layers = findings.series["routing"]["engine"]
    same = [(c.logit_changes[~c.flipped], c.score_margins[~c.flipped]) for c in layers]
    x, y = (np.concatenate(v) for v in zip(*same, strict=True))
    axes[0].scatter(
        np.maximum(x, _FLOOR), np.maximum(y, _FLOOR), s=3, color=_COLORS["engine"], alpha=0.25, lw=0, label="same experts"
    )
    flips = [f for c in layers for f in c.flips]
    for explained, marker, label in ((True, "o", "flip, explained"), (False, "X", "flip, not explained")):
        chosen = [f for f in flips if f.explained is explained]
        if chosen:
            axes[0].scatter(
                [max(f.logit_change, _FLOOR) for f in chosen], [max(f.score_margin, _FLOOR) for f in chosen], s=18,
                color=_COLORS["flip"], marker=marker, label=label, lw=0,
            )  # fmt: skip
    axes[0].set(xscale="log", yscale="log", xlabel="largest change of a router logit", ylabel="gate margin (score, reference)")
    axes[0].set_title("Gate margins of the engine's tokens")
    axes[0].legend(fontsize=8, loc="lower left")
    share = [c.agreement * 100 for c in layers]
    names = [str(c.layer) for c in layers]
    bars = axes[1].bar(names, share, color=_COLORS["engine"], width=0.6)
    axes[1].bar_label(bars, [f"{s:.1f}" if s < 100 else "100" for s in share], fontsize=8 if len(share) < 30 else 5)
    axes[1].set(title="Tokens with the same set of experts", xlabel="layer", ylabel="%")
    axes[1].set_ylim(max(0.0, min(share) - 10), 101.5)
    if len(names) > 20:
        axes[1].tick_params(axis="x", labelrotation=90, labelsize=6)


def _load(findings: Findings, axes) -> None:
    layers = findings.series["routing"]["engine"]
    load = np.array([c.load for c in layers]) * 100  # [layers, E]
    image = axes[0].imshow(load, aspect="auto", cmap="Blues", vmin=0)
    axes[0].grid(False)
    axes[0].set_yticks(range(len(layers)), [str(c.layer) for c in layers], fontsize=8 if len(layers) < 30 else 5)
    axes[0].set(title="Expert load in the reference, % of all choices", xlabel="expert", ylabel="layer")
    axes[0].figure.colorbar(image, ax=axes[0], fraction=0.04)
    even = 100 / load.shape[1]
    axes[1].boxplot(load.T, tick_labels=[str(c.layer) for c in layers], widths=0.5, medianprops={"color": _COLORS["engine"]})
    axes[1].axhline(even, color=_COLORS["flip"], lw=1, ls="--", label=f"even load {even:.2g} %")
    axes[1].legend(fontsize=8)
    axes[1].set(title="Spread over the experts", xlabel="layer", ylabel="% of choices")
    if len(layers) > 20:
        axes[1].tick_params(axis="x", labelrotation=90, labelsize=6)
