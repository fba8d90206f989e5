"""`dipper simulate`: a model, devices, and lists of options become settings, their counts, and what each would do.

One recording a density serves all caches and devices; below gamma = 1 every setting is a run of its own. Options that
do not act with a method are left out for it, and settings that come out equal are simulated once.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from dipper.budget import DEFAULT_FETCH, EngineConfig, parse_bytes, rss_bytes
from dipper.bundle import UNIT_BYTES, Bundle
from dipper.device import Device
from dipper.errors import BudgetError, ConfigError
from dipper.layout import BaseBits
from dipper.records import SimRecord
from dipper.simulator import check_fits, miss_curve_split, sim_record
from dipper.workload import GeneratedWorkload, ModelWorkload, Setting, TraceWorkload, Workload

__all__ = ["Sweep", "has_weights", "open_model", "open_workload", "run_sweep"]

SPLITS = ("uniform", "miss-curve")
_ONLY_PRUNED = ("density", "d_in", "d_glu", "gamma", "split")
_ONLY_CACHED = ("cache", "cold", "cache_decay")
_ONLY_PLANES = ("fetch", "fetch_glu", "read_cost", "whole")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Lists of what to vary; every combination that makes sense is a setting. None: the engine's default.

    Attributes:
        methods, densities, gammas, caches, dram, mlp_dram, capacity: as the options of `dipper run`; `capacity` is the
            share of every region's columns that is cached, instead of a budget.
        d_in, d_glu: one split of the density, instead of `densities`.
        fetches: of planes.
        fetch_glu, read_cost, whole: of planes, at every fetch.
        splits: of the slots over regions: of `SPLITS`, or a file with a JSON list of weights by region.
        cold: the prompt does not warm the caches.
        host: DRAM of the process before any weight, such as "100MB"; None: this process's for a real bundle, else 0.
    """

    methods: tuple[str, ...] = ("dense-stream", "dip", "dip-ca")
    densities: tuple[float, ...] = (0.7,)
    d_in: float | None = None
    d_glu: float | None = None
    fetches: tuple[float, ...] = (DEFAULT_FETCH,)
    fetch_glu: float | None = None
    read_cost: int | None = None
    whole: tuple[int, ...] = ()
    gammas: tuple[float, ...] = (0.5,)
    caches: tuple[str, ...] = ("lfu",)
    dram: tuple[str | None, ...] = (None,)
    mlp_dram: tuple[str | None, ...] = (None,)
    capacity: tuple[float, ...] = ()
    splits: tuple[str, ...] = ("uniform",)
    cold: bool = False
    host: str | None = None

    def __post_init__(self) -> None:
        for split in self.splits:
            if split not in SPLITS:
                _given_split(split)
        if (self.d_in is None) != (self.d_glu is None):
            raise ConfigError("d_in and d_glu go together: give both or neither")
        for share in self.capacity:
            if not 0 <= share <= 1:
                raise ConfigError(
                    f"capacity is {share}: it is the share of a region's columns that is cached, between 0 and 1"
                )
        if self.capacity and (self.dram, self.mlp_dram) != ((None,), (None,)):
            raise ConfigError("--capacity says how many columns are cached, --dram and --mlp-dram do so too: give one")

    def options(self) -> list[dict[str, Any]]:
        """EngineConfig's options of every combination, `cache` and `split` beside them; no two alike."""
        split_density = (None,) if self.d_in is not None else self.densities
        product = itertools.product(
            self.methods, split_density, self.fetches, self.gammas, self.caches, self.dram, self.mlp_dram,
            self.capacity or (None,), self.splits,
        )  # fmt: skip
        rows = []
        for method, density, fetch, gamma, cache, dram, mlp_dram, capacity, split in product:
            row: dict[str, Any] = {"method": method, "dram": dram, "mlp_dram": mlp_dram, "capacity": capacity}
            row |= {"density": density, "d_in": self.d_in, "d_glu": self.d_glu, "cache": cache, "split": split}
            row |= {"gamma": gamma if method == "dip-ca" else None, "cold": self.cold or None}
            row |= {"fetch": fetch, "fetch_glu": self.fetch_glu, "whole": self.whole or None}
            row |= {"read_cost": self.read_cost}
            prunes = method in ("dip", "dip-ca")
            dropped = [] if prunes else [*_ONLY_PRUNED, "capacity"]
            dropped += [] if prunes or method == "planes" else _ONLY_CACHED
            dropped += [] if method == "planes" else _ONLY_PLANES
            row = {name: value for name, value in row.items() if name not in dropped}
            if method == "dense-resident":
                row["mlp_dram"] = None
            if method in ("dip-ca", "planes") and cache in ("none", "belady"):
                continue  # neither has a meaning where choices depend on the cache; `dip` shows them
            if split == "miss-curve" and method in ("dip", "dip-ca") and (cache == "none" or capacity == 0):
                continue  # there are no slots to share out; `uniform` shows it
            if self.capacity and method not in ("dip", "dip-ca"):
                continue  # it has no column cache: see `dense_left_out`
            row = {name: value for name, value in row.items() if value is not None}
            if row not in rows:
                rows.append(row)
        if not rows and self.dense_left_out == self.methods:
            raise ConfigError(
                f"--capacity is of column caches, which {', '.join(self.methods)} do not have: give --dram"
            )
        if not rows:
            raise ConfigError(
                f"methods {', '.join(self.methods)} with caches {', '.join(self.caches)} leave nothing to simulate: "
                "dip-ca and planes need a cache other than none and belady, miss-curve needs slots, --capacity a "
                "column cache"
            )
        return rows

    @property
    def dense_left_out(self) -> tuple[str, ...]:
        """Methods without a column cache, where `capacity` says how large that is."""
        return tuple(m for m in self.methods if m not in ("dip", "dip-ca")) if self.capacity else ()


def _given_split(path: str) -> tuple[float, ...]:
    """Weights by region from a file."""
    if not Path(path).is_file():
        raise ConfigError(
            f"split '{path}' is unknown: choose {', '.join(SPLITS)}, or a file with a JSON list of weights"
        )
    try:
        weights = tuple(float(weight) for weight in json.loads(Path(path).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no JSON list of numbers ({error}): give a weight by region") from None
    return weights


# ------------------------------------------------------------------------------------------------ inputs


def open_model(
    name: str,
    *,
    bits: int | None = None,
    other_bits: int | None = None,
    base_bits: BaseBits | None = None,
    unit_bytes: int | None = None,
) -> Bundle:
    """A bundle, or the layout of a model whose shape is published; its bits are as in `published_bundle`.

    Raises:
        BundleError: a folder that is no bundle.
        ConfigError: no such folder and no such model (the nearest is named), or bits for a real bundle.
    """
    from dipper.published import published_bundle

    if Path(name).exists():
        if (bits, other_bits, base_bits, unit_bytes) != (None,) * 4:
            raise ConfigError(f"--bits is for models of which only the shape is known; {name} has its own")
        return Bundle.open(name)
    return published_bundle(
        name, bits=bits or 4, other_bits=other_bits or 8, base_bits=base_bits or 0, unit_bytes=unit_bytes or UNIT_BYTES
    )


def has_weights(bundle: Bundle) -> bool:
    """Whether a bundle is on a disk, and not a layout alone."""
    return (bundle.path / "flash.bin").exists()


def open_workload(
    bundle: Bundle,
    *,
    n_prompt: int,
    n_tokens: int,
    trace: Path | None = None,
    text: Path | None = None,
    generated: bool = False,
    variant: str | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> Workload:
    """Where masks come from: a trace, the real model over a text, or the generator.

    Args:
        bundle: of the model.
        n_prompt, n_tokens: tokens that warm the caches, and tokens after them; a trace has its own.
        trace: of `dipper run --trace`.
        text: for the real model; None: dipper's own.
        generated: the generator even for a real model.
        variant: one model's fit of the generator instead of the mean.
        seed: of the generator.
        threads: of the real model.
    """
    given = {"--text": text is not None, "--generated": generated, "--variant": variant is not None}
    refused = [name for name, is_given in given.items() if is_given]
    if trace is not None:
        if refused:
            raise ConfigError(f"{refused[0]} has no effect with --trace, which has its own masks: drop one of them")
        if not has_weights(bundle):
            raise ConfigError(f"a trace is of a bundle, and {bundle.path} is the shape of a model alone: drop --trace")
        return TraceWorkload(bundle, trace)
    if generated or not has_weights(bundle):
        if text is not None:
            raise ConfigError("--text is for a real model: generated scores belong to no text")
        from dipper.generator import ScoreGenerator

        return GeneratedWorkload(
            bundle, ScoreGenerator.load(variant=variant), n_prompt=n_prompt, n_tokens=n_tokens, seed=seed
        )
    if variant is not None:
        raise ConfigError("--variant is of generated scores: add --generated, or drop it")
    from dipper.evaluate import read_text
    from dipper.tokenizer import Tokenizer

    if text is None:
        source = resources.files("dipper").joinpath("bench.txt").read_text(encoding="utf-8")
    else:
        source = read_text(text).text
    ids = list(Tokenizer.open(bundle.path).encode(source))
    if len(ids) < n_prompt + n_tokens:
        named = "dipper's own text" if text is None else str(text)
        raise ConfigError(
            f"{named} has {len(ids)} tokens, a prompt of {n_prompt} and {n_tokens} after it need "
            f"{n_prompt + n_tokens}: give a longer --text or ask for less"
        )
    return ModelWorkload(bundle, ids[:n_prompt], text=ids[n_prompt : n_prompt + n_tokens], threads=threads)


# ------------------------------------------------------------------------------------------------ running


def run_sweep(
    bundle: Bundle,
    workload: Workload,
    sweep: Sweep,
    devices: Sequence[Device],
    *,
    context: int | None = None,
    threads: int | None = None,
    on_skip: Callable[[str], None] | None = None,
) -> list[SimRecord]:
    """Simulates every combination on every device.

    Args:
        bundle: what is run.
        workload: its masks.
        sweep: the combinations.
        devices: where.
        context: positions of the KV cache; None: as many as the workload has.
        threads: of compute, whose scratch the DRAM holds; None: all cores of this machine.
        on_skip: told of a combination that its budget does not hold, and why; None: that is an error.

    Returns:
        A record of every combination that fits, which may be none.

    Raises:
        BudgetError: without `on_skip`: too little DRAM (the least of that combination is named), or more than the
            device has.
    """
    if on_skip is not None:
        for method in sweep.dense_left_out:
            on_skip(f"{method}: --capacity is of column caches; give --dram or --mlp-dram to compare with it")
    if sweep.host is not None:
        host = 0 if re.fullmatch(r"0\s*[a-zA-Z]*", sweep.host) else parse_bytes(sweep.host, bundle.total_bytes)
    else:
        host = rss_bytes() if has_weights(bundle) else 0  # once: this process grows as it simulates
    if context is None:
        context = workload.n_prompt + workload.n_tokens
    records = []
    for device in devices:
        settings: list[tuple[Setting, str]] = []
        for options in sweep.options():
            try:
                settings.append(_setting(bundle, workload, device, options, context, threads, host))
            except BudgetError as error:
                if on_skip is None:
                    raise
                on_skip(f"{device.name}, {_told(options)}: {error}")
        pruned = [setting for setting, _ in settings if setting.config.selects]
        counts = dict(zip(map(id, pruned), workload.traffic(pruned), strict=True))
        for setting, split in settings:
            record = sim_record(workload, setting, counts.get(id(setting)), device)
            records.append(dataclasses.replace(record, split=split))
    return records


def _told(options: dict[str, Any]) -> str:
    return " ".join(f"{value}" if name == "method" else f"{name} {value}" for name, value in options.items())


def _setting(
    bundle: Bundle,
    workload: Workload,
    device: Device,
    options: dict[str, Any],
    context: int,
    threads: int | None,
    host: int,
) -> tuple[Setting, str]:
    """A combination as a setting on a device, its slots shared out."""
    options = dict(options)
    split, cache, capacity = (options.pop(name, None) for name in ("split", "cache", "capacity"))
    config = EngineConfig(
        context=context, threads=threads, **options, **({"cache": cache} if cache in _ENGINE_CACHES else {})
    )
    shared = {"cache": cache, "host_bytes": host, "alignment": device.flash.alignment}
    setting = Setting.plan_for(bundle, config, capacity_share=capacity, **shared)
    if split is not None and split not in SPLITS:
        weights = _given_split(split)
        if capacity is not None:
            raise ConfigError(
                "--capacity caches the same share everywhere, --split says where more: give a budget with it"
            )
        setting = Setting.plan_for(bundle, dataclasses.replace(config, split=weights), **shared)
        split = "given"
    if split == "miss-curve":
        weights, _ = miss_curve_split(workload, setting.at_gamma_1(), device)
        if capacity is None:
            setting = Setting.plan_for(bundle, dataclasses.replace(config, split=weights), **shared)
        else:
            setting = setting.with_shares(weights)
    check_fits(setting, device)
    return setting, split or "uniform"


_ENGINE_CACHES = ("lru", "lfu", "lfu-decay", "static")
