"""The kind that simulates: what a device would make of a model's masks, real or generated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipper.errors import ConfigError
from dipper.kinds.kind import Context, Kind, Options, Result
from dipper.kinds.packed import bundle_of

if TYPE_CHECKING:
    from dipper.bundle import Bundle
    from dipper.device import Device
    from dipper.workload import Workload

__all__ = ["SIMULATE"]

_SWEPT = (
    "methods", "densities", "d_in", "d_glu", "fetches", "fetch_glu", "read_cost", "whole", "gammas", "caches", "dram",
    "mlp_dram", "capacity", "splits", "cold", "host",
)  # fmt: skip
_LISTS = ("methods", "densities", "fetches", "whole", "gammas", "caches", "dram", "mlp_dram", "capacity", "splits")
_LAID_OUT = ("bits", "other_bits", "base_bits", "unit_bytes")
_MASKS = ("n_prompt", "n_tokens", "text", "generated", "variant", "seed")
_DEVICE = ("flash_gbps", "cost_per_read_us", "alignment")


def _simulate(options: Options, context: Context) -> Result:
    """What `Sweep` makes of a device: `records` of every setting, and `skipped`, what no budget holds."""
    from dataclasses import replace

    from dipper.sweep import Sweep, run_sweep

    for name in _LISTS:
        if not isinstance(options.get(name, []), list):
            raise ConfigError(
                f"{name} of a cell of kind simulate is {options[name]!r}: give a list, [{options[name]!r}]"
            )
    bundle, workload = _workload(
        context,
        json.dumps({name: options[name] for name in (*_LAID_OUT, *_MASKS) if name in options}, sort_keys=True),
    )
    # This process's own size and this machine's cores are no phone's: they would make results differ by machine.
    swept: dict[str, Any] = {"host": "0", **{name: value for name, value in options.items() if name in _SWEPT}}
    swept = {name: tuple(value) if isinstance(value, list) else value for name, value in swept.items()}
    skipped: list[str] = []
    records = run_sweep(
        bundle, workload, Sweep(**swept), [_device_of(options)], context=options.get("context"), threads=1,
        on_skip=skipped.append,
    )  # fmt: skip
    return {"records": [replace(record, provenance=None).as_dict() for record in records], "skipped": skipped}


def _device_of(options: Options) -> Device:
    """A profile by name, with what the cell has instead of its figures."""
    import dataclasses

    from dipper.device import Device

    device = Device.load(options["device"])
    names = {"flash_gbps": "gbps", "cost_per_read_us": "cost_per_read_us", "alignment": "alignment"}
    changes: dict[str, Any] = {names[name]: options[name] for name in _DEVICE if name in options}
    if device.flash.table and set(changes) & {"gbps", "cost_per_read_us"}:
        changes["table"] = ()  # measured batches stand for both
    return dataclasses.replace(device, flash=dataclasses.replace(device.flash, **changes))


@lru_cache(maxsize=1)
def _workload(context: Context, options: str) -> tuple[Bundle, Workload]:
    """A model's bundle or shape, and its masks; options: JSON of `_LAID_OUT` and `_MASKS`.

    Of real weights every text but dipper's own is one of the data folder.
    """
    from dipper import published
    from dipper.sweep import open_model, open_workload

    given = json.loads(options)
    laid_out = {name: given.get(name) for name in _LAID_OUT}
    base_bits = laid_out["base_bits"]
    laid_out["base_bits"] = tuple(base_bits) if isinstance(base_bits, list) else base_bits
    masks = {name: given[name] for name in _MASKS if name in given}
    if not Path(context.model).exists() and context.model in published.names():
        if "text" in masks:
            raise ConfigError(f"{context.model} is a shape without weights, which reads no text: leave text out")
        bundle = open_model(context.model, **laid_out)
        return bundle, open_workload(bundle, **masks)
    if "text" in masks:
        masks["text"] = context.file(masks["text"])
    laid_out.pop("other_bits")  # packing has its own rule
    bundle = open_model(str(bundle_of(context, **laid_out)))
    threads = None if masks.get("generated") else context.threads
    return bundle, open_workload(bundle, threads=threads, **masks)


def _simulate_data(options: Mapping[str, Any]) -> tuple[str, ...]:
    return (options["text"],) if "text" in options else ()


SIMULATE = Kind(
    name="simulate",
    measure=_simulate,
    options=frozenset(("device", "context", *_SWEPT, *_LAID_OUT, *_MASKS, *_DEVICE)),
    required=frozenset(("device", "n_prompt", "n_tokens")),
    sources=("kinds/simulated", "devices/{device}.toml", "bench.txt", "generator.npz", "models.toml"),
    needs_data=_simulate_data,
)
