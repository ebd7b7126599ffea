"""What the figures of the benchmarks share: a style, captions, and what they were measured on."""

from __future__ import annotations

import platform
import textwrap
from pathlib import Path
from typing import Any

import torch


def seaborn() -> Any:
    """The library, without a display, in colors that color-blind readers tell apart."""
    import matplotlib as mpl

    mpl.use("Agg")
    import seaborn as sns

    from robustdeq.reporting.figures.style import SVG, THEME

    sns.set_theme(**THEME, rc=SVG)
    return sns


def save(figure: Any, path: Path, caption: str) -> None:
    """Write a figure with its caption below it."""
    characters = int(figure.get_figwidth() * 15)
    text = textwrap.fill(" ".join(caption.split()), characters)
    figure.text(0.01, -0.01, text, ha="left", va="top", fontsize="small")
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


def machine(device: str) -> str:
    """The device, the number of threads and the version of torch, in words."""
    if torch.device(device).type == "cuda":
        device = torch.cuda.get_device_name(device)
    return (
        f"{device} ({platform.machine()}), {torch.get_num_threads()} thread, "
        f"torch {torch.__version__}"
    )
