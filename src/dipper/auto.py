"""The method `auto`: what should be fastest on this machine's disk within a budget and a bounded loss of quality.

Everything resident where it fits. Else, of a split bundle, `planes` with settings that were measured to lose no more
than `LOSS` in this much DRAM (`planes.toml`, written by experiments/planes.py), unless dense streaming should be nearly
as fast; else `dense-stream`, which loses nothing. What was not measured for a model is not assumed of it. How long a
token takes is forecast from what the disk gives: a probe of the bundle's own file, or a device profile.

    choice = choose(Bundle.open("model.dipper"), EngineConfig(method="auto", dram="600MB"))
    print(choice.config.method, choice.why)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import tomli

from .budget import EngineConfig, Plan, plan_run
from .bundle import REGION_MATRICES, Bundle
from .device import Device
from .errors import BudgetError, ConfigError
from .forecast import forecast
from .probe import device_for

__all__ = ["LOSS", "Choice", "base_bits", "choose", "named_layers"]

LOSS = 0.023  # of perplexity, relative: the 0.1 that arXiv 2412.01380 allows Phi-3-medium
_WORTH = 0.95  # of dense streaming's time: a smaller gain is not worth a loss of quality


@dataclass(frozen=True)
class Choice:
    """A method with its settings, its plan, and why it."""

    config: EngineConfig
    plan: Plan
    why: str


def _table() -> list[dict[str, Any]]:
    content = tomli.loads(resources.files("dipper").joinpath("planes.toml").read_text(encoding="utf-8"))
    models: list[dict[str, Any]] = content.get("models", [])
    return models


@lru_cache(maxsize=1)
def _measured() -> dict[str, list[dict[str, Any]]]:
    """Points by the SHA-256 of a model's source."""
    return {table["source_sha256"]: table["points"] for table in _table()}


@lru_cache(maxsize=1)
def _orders() -> dict[str, list[dict[str, Any]]]:
    """Measured orders of layers, the most sensitive first, by the SHA-256 of a model's source."""
    return {table["source_sha256"]: table.get("orders", []) for table in _table()}


def base_bits(bundle: Bundle) -> list[int]:
    """Of the input and of the GLU regions, the most in each; 0: none is split."""
    regions = bundle.header["regions"]
    return [
        max(m["base_bits"] for r in regions if r["kind"] == kind for m in r["matrices"]) for kind in REGION_MATRICES
    ]


def named_layers(bundle: Bundle, config: EngineConfig) -> EngineConfig:
    """Whole layers given by order and number ("auto:6", "order.json:25%") become the layers themselves.

    Raises:
        ConfigError: no such order, or one of another model or base.
    """
    if not isinstance(config.whole, str):
        return config
    where, _, number = config.whole.rpartition(":")
    order = _measured_order(bundle) if where == "auto" else _order_in(Path(where), bundle)
    n_layers = bundle.model.n_layers
    n = round(float(number[:-1]) / 100 * n_layers) if number.endswith("%") else int(number)
    if n > len(order):
        raise ConfigError(f"--whole {config.whole} is more than the {len(order)} layers of the order: give fewer")
    return replace(config, whole=tuple(order[:n]))


def _measured_order(bundle: Bundle) -> list[int]:
    for table in _orders().get(bundle.header["source"].get("sha256", ""), []):
        if table["base_bits"] == base_bits(bundle):
            return list(table["order"])
    raise ConfigError(
        "--whole auto: how sensitive the layers are was not measured for this model and base: measure it with "
        "dipper sensitivity BUNDLE --text FILE -o order.json, then --whole order.json:N"
    )


def _order_in(path: Path, bundle: Bundle) -> list[int]:
    """The order of a file of `dipper sensitivity`, for this bundle's model and base."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        order, of = found["order"], (found["source_sha256"], found["base_bits"])
    except OSError as error:
        raise ConfigError(
            f"--whole: {path} cannot be read ({error.strerror}): give a file of dipper sensitivity"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--whole: {path} is no file of dipper sensitivity: give one, or layers such as 27,2"
        ) from None
    if of != (bundle.header["source"].get("sha256"), base_bits(bundle)):
        raise ConfigError(f"--whole: {path} was measured on another model or base than {bundle.path}: measure this one")
    if sorted(order) != sorted(set(order) & set(range(bundle.model.n_layers))):
        raise ConfigError(f"--whole: the order in {path} has layers that the model lacks: measure it again")
    return list(order)


def measured_points(bundle: Bundle, bits_per_weight: float) -> list[dict[str, Any]]:
    """The measured settings that lose no more than `LOSS` in at most this much DRAM, of those with the most of it."""
    points = [
        point
        for point in _measured().get(bundle.header["source"].get("sha256", ""), [])
        if point["base_bits"] == base_bits(bundle)
        and point["increase"] <= LOSS
        and point["bits"] <= bits_per_weight + 0.01
    ]
    most = max((point["bits"] for point in points), default=0.0)
    return sorted((p for p in points if p["bits"] == most), key=lambda p: float(p["increase"]))


def choose(bundle: Bundle, config: EngineConfig, host_bytes: int | None = None) -> Choice:
    """Settles `auto`.

    Args:
        bundle: what is run.
        config: budget, context and whatever else holds for every method.
        host_bytes: as `plan_run`.

    Raises:
        BudgetError: not even dense streaming works within the budget.
        ConfigError: the device profile cannot be used.
        FlashError: the disk could not be read.
    """

    def planned(method: str, why: str, **options: Any) -> Choice:
        settled = replace(config, method=method, device_profile=None, **options)
        return Choice(settled, plan_run(bundle, settled, host_bytes), why)

    if config.mlp_dram is None:
        config = replace(config, dram=available_bytes() if config.dram is None else config.dram)
        try:
            return planned("dense-resident", "all of the model fits")
        except BudgetError:
            pass
    stream = planned("dense-stream", "")
    if not any(base_bits(bundle)):
        return replace(stream, why="the model does not fit, and its columns are not split (dipper pack --base-bits)")
    points = measured_points(bundle, stream.plan.mlp_limit_bits(bundle.mlp_weights))
    if not points:
        return replace(
            stream, why=f"no setting of planes is known to lose at most {100 * LOSS:.1f} % here in this much DRAM"
        )
    if not stream.plan.token_bytes:
        return replace(stream, why="all of the MLP fits")
    device = device_for(bundle.path, config.device_profile)

    def token_s(choice: Choice) -> float:
        return forecast(bundle, choice.plan, device).token_s

    refined = [
        planned(
            "planes",
            f"measured: perplexity {100 * point['increase']:+.1f} % at {point['bits']:.2f} bits per MLP weight",
            fetch=point["fetch"],
            fetch_glu=point["fetch_glu"],
            read_cost=point.get("read_cost"),
            whole=tuple(point["whole"]),
        )
        for point in points
    ]
    planes = min(refined, key=token_s)  # of equals the one that loses least
    planes_s, stream_s = token_s(planes), token_s(stream)
    expected = (
        f"{1e3 * planes_s:.0f} ms a token expected, {1e3 * stream_s:.0f} of dense streaming, on a disk of "
        f"{told(device)}"
    )
    if planes_s > _WORTH * stream_s:
        return replace(stream, why=f"planes is not worth its loss of quality: {expected}")
    return replace(planes, why=f"{planes.why}; {expected}")


def told(device: Device) -> str:
    """A disk in words, and where its figures are from."""
    flash = device.flash
    limits = f"{flash.gbps:.2f} GB/s and {flash.cost_per_read_us:.1f} µs a read"
    return f"{limits} ({device.title if device.name == 'probe' else device.name})"


def available_bytes() -> int:
    """Memory that the system could give now."""
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
