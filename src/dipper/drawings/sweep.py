"""`dipper simulate --figure`: what a sweep found, as throughput against DRAM and where a token's time goes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from dipper.figures import panels
from dipper.records import LEDGER, SimRecord
from dipper.sheets import dram_gb, way

__all__ = ["draw_sweep"]


def draw_sweep(records: Sequence[SimRecord], path: str | os.PathLike[str]) -> None:
    """A row of panels a device: throughput against DRAM, a line a way to run; where a token's time goes, as bars.

    Args:
        records: of `run_sweep`.
        path: .svg, .png or .pdf.

    Raises:
        ConfigError: matplotlib is missing.
    """
    devices = list(dict.fromkeys(r.device for r in records))
    most = max(sum(r.device == device for r in records) for device in devices)
    with panels(path, 2, n_rows=len(devices), width=6.6, height=max(4.4, 1.2 + 0.2 * most)) as axes:
        for i, device in enumerate(devices):
            shown = [r for r in records if r.device == device]
            _draw_speed(axes[2 * i], shown)
            _draw_time(axes[2 * i + 1], shown)


def _draw_speed(axis: Any, records: Sequence[SimRecord]) -> None:
    for label in dict.fromkeys(map(_told, records)):
        line = sorted((r for r in records if _told(r) == label), key=_gb)
        x = [_gb(r) for r in line]
        (drawn,) = axis.plot(x, [r.tok_per_s for r in line], marker="o", markersize=3, label=label)
        axis.plot(x, [r.tok_per_s_flat for r in line], linestyle=":", linewidth=0.9, color=drawn.get_color())
    axis.set(xlabel="DRAM held, GB", ylabel="tokens/s (dotted: reads cost their bytes alone)", ylim=(0, None))
    axis.set_title(f"{records[0].model} on {records[0].device}, {_kinds(records)}", fontsize="small")
    axis.legend(fontsize="xx-small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)


def _draw_time(axis: Any, records: Sequence[SimRecord]) -> None:
    left = [0.0] * len(records)
    for part in LEDGER:
        width = [1e3 * r.ledger_s[part] / r.n_tokens for r in records]
        if any(width):
            axis.barh(range(len(records)), width, left=left, label=part, height=0.75)
        left = [b + w for b, w in zip(left, width, strict=True)]
    axis.set_yticks(range(len(records)), [f"{_told(r)}, {_gb(r):.2f} GB" for r in records], fontsize="xx-small")
    axis.invert_yaxis()
    axis.set(xlabel="ms a token")
    axis.set_title("where the time goes", fontsize="small")
    axis.legend(fontsize="xx-small")


def _told(record: SimRecord) -> str:
    """A setting but for its DRAM."""
    words = [way(record.as_dict())]
    words += [] if record.density is None else [f"{record.density:.2f}"]
    words += [] if record.split == "uniform" else [record.split]
    return " ".join(words)


def _gb(record: SimRecord) -> float:
    return dram_gb(record.as_dict())


def _kinds(records: Sequence[SimRecord]) -> str:
    kinds = sorted({str(r.workload["kind"]) for r in records} - {"dense"})
    return f"masks {', '.join(kinds)}" if kinds else "dense"
