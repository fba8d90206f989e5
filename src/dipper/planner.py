"""Which settings run a model fastest on a device within a loss of quality: `dipper plan`, and `run --plan`.

Speed comes from the simulator. Quality comes from measured curves (`quality.toml`, written by
`experiments/quality.py`): change of perplexity by density, split of the density, gamma and bits. What was not measured
is told apart from what was: every figure is exact, measured, interpolated or extrapolated.

Quality has a closed form, speed has not: so the densities that are simulated are those at which a method's curve
crosses multiples of the loss allowed. The fastest of them are then tried with other cache policies and with slots
shared out by miss curves. All settings of a step go through one call of `Workload.traffic` a bundle.

    result = make_plan([bundle], Device.load("phone-ufs-3.1"), workload_of=workload_of, dram="600MB")
    print(plan_table(result))
    EngineConfig(**result.config)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import tomli

from .budget import EngineConfig, parse_bytes, plan_run, rss_bytes
from .bundle import Bundle
from .device import Device
from .errors import BudgetError, ConfigError
from .records import SimRecord
from .simulator import check_fits, miss_curve_split, sim_record
from .tables import align
from .workload import Setting, Traffic, Workload

__all__ = ["GAMMAS", "PlanResult", "Quality", "load_config", "make_plan", "measured_models", "plan_table", "quality_of"]

GAMMAS = (0.8, 0.5, 0.2)  # of dip-ca
TARGETS = (0.4, 1.0, 2.0, 4.0)  # losses whose densities are simulated, over the loss allowed
CACHES = ("lru",)  # tried for the fastest; all others run with lfu, which quality was measured with
N_REFINED = 2
CLOSE = 0.9  # of the faster kind of split: both kinds are tried further
CURVE_STEPS = 8  # of a miss curve
HOPELESS = 0.7  # of the fastest: neither gamma nor cache policies and miss curves make up for that
DENSITIES = (0.3, 0.95)  # simulated; below, curves say nothing, above, there is nothing to win
WORTH = 1.1  # over dense: a smaller gain is within the simulator's own error
SCHEMA = "dipper-plan/1"
_OPTIONS = {"method", "context", "d_in", "d_glu", "gamma", "cache", "split", "dram", "mlp_dram"}

_NEAR = 0.004  # densities this close are the same
_HALF = 0.05  # a cache within this of the measured share is as measured


# ------------------------------------------------------------------------------------------------ quality


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How much a setting loses against the source of the bundle, and how far that is known.

    Attributes:
        increase: of perplexity, relative: 0.05 is 5 % more.
        low, high: two standard errors around it where measured or interpolated; the least and the most of the measured
            models for a model that is none of them; None where nobody knows.
        kind: exact (dense, in the source's own grid), measured, interpolated (between measured densities, splits or
            gammas) or extrapolated.
        notes: what an extrapolation rests on.
    """

    increase: float
    low: float | None
    high: float | None
    kind: str
    notes: tuple[str, ...] = ()

    def words(self) -> str:
        """Such as "+5.0 % (4.2 to 5.8 %, interpolated)"."""
        band = "" if self.low is None or self.high is None else f"{100 * self.low:.1f} to {100 * self.high:.1f} %, "
        return f"{100 * self.increase:+.1f} %" + ("" if self.kind == "exact" else f" ({band}{self.kind})")


EXACT = Quality(increase=0.0, low=0.0, high=0.0, kind="exact")
_KINDS = ("exact", "measured", "interpolated", "extrapolated")  # the worst of several is the kind of their product


@dataclass(frozen=True, kw_only=True)
class _Pruning:
    """What pruning does apart from quantisation, as asked of the curves."""

    d_in: float
    d_glu: float
    gamma: float = 1.0
    cached: float = 0.5  # share of the columns that caches hold; of no influence at gamma 1
    cache: str = "lfu"
    uniform: bool = True  # every region caches the same share

    @property
    def density(self) -> float:
        """Of the MLP."""
        return (2 * self.d_in + self.d_glu) / 3


@dataclass(frozen=True)
class _Curve:
    """log(nats over dense) of one family of points along the density, and the standard errors of their increases."""

    density: tuple[float, ...]  # ascending
    log_nats: tuple[float, ...]
    stderr: tuple[float, ...]

    @classmethod
    def of(cls, points: Iterable[dict[str, Any]]) -> _Curve:
        rows = sorted(
            ((2 * p["d_in"] + p["d_glu"]) / 3, math.log(max(math.log1p(p["increase"]), 1e-5)), p["stderr"])
            for p in points
        )
        density, log_nats, stderr = zip(*rows, strict=True)
        return cls(density, log_nats, stderr)

    def at(self, density: float) -> float:
        """Linear, beyond its ends as in its last piece: nats fall about exponentially with density."""
        i = int(np.clip(np.searchsorted(self.density, density), 1, len(self.density) - 1))
        (x0, x1), (y0, y1) = self.density[i - 1 : i + 1], self.log_nats[i - 1 : i + 1]
        return y0 + (y1 - y0) * (density - x0) / (x1 - x0)

    def over(self, other: _Curve, density: float) -> float:
        """This one less another where both were measured, held beyond this one's ends."""
        inside = float(np.clip(density, self.density[0], self.density[-1]))
        return self.at(inside) - other.at(inside)

    def has(self, density: float) -> bool:
        """Whether a point lies there."""
        return any(abs(density - d) < _NEAR for d in self.density)

    def spans(self, density: float) -> bool:
        """Whether points lie on both sides."""
        return self.density[0] - _NEAR < density < self.density[-1] + _NEAR


class _Model:
    """The measured points of one model: plain DIP, the best split of each density, and gamma below 1."""

    def __init__(self, table: dict[str, Any]) -> None:
        points = table["points"]
        fitted = [p for p in points if p.get("fitted")]
        rest = [p for p in points if not p.get("fitted")]
        self.name: str = table["name"]
        self.plain = _Curve.of(p for p in rest if p["gamma"] == 1)
        self.split = _Curve.of(fitted)
        self.by_gamma = {
            g: _Curve.of(p for p in rest if p["gamma"] == g) for g in sorted({p["gamma"] for p in rest} - {1.0})
        }
        self.cached = {p["cached"] for p in rest if "cached" in p}
        self._spreads = sorted(((2 * p["d_in"] + p["d_glu"]) / 3, p["d_in"] - p["d_glu"]) for p in fitted)
        # One split for all layers was calculated from the fit by layer there, not measured.
        self._by_layer = [(2 * p["d_in"] + p["d_glu"]) / 3 for p in fitted if p.get("by_layer")]

    def spread(self, density: float) -> float:
        """d_in - d_glu of the best split."""
        return float(np.interp(density, [d for d, _ in self._spreads], [spread for _, spread in self._spreads]))

    def quality(self, asked: _Pruning) -> Quality:
        """Nats of plain DIP times what the split and gamma make of them.

        The split's factor is a parabola (in the logarithm) that is 1 at equal densities and the measured one at the
        best split; gamma's factor is linear in log gamma.
        """
        density, gammas = asked.density, list(self.by_gamma)
        t = (asked.d_in - asked.d_glu) / self.spread(density)
        log_nats = self.plain.at(density) + self.split.over(self.plain, density) * (2 * t - t * t)
        logs = [*(math.log(g) for g in gammas), 0.0]
        overs = [*(curve.over(self.plain, density) for curve in self.by_gamma.values()), 0.0]
        log_nats += float(np.interp(math.log(asked.gamma), logs, overs))
        increase = math.expm1(min(math.exp(log_nats), 20.0))
        kind, notes = self._kind(asked, t)
        if kind == "extrapolated":
            return Quality(increase=increase, low=None, high=None, kind=kind, notes=notes)
        curve = self.split if asked.gamma == 1 and t > 0.5 else self.plain
        for gamma, other in self.by_gamma.items():
            curve = other if asked.gamma <= 1.01 * gamma and curve is self.plain else curve
        error = 2 * float(np.interp(density, curve.density, curve.stderr))
        return Quality(increase=increase, low=increase - error, high=increase + error, kind=kind, notes=notes)

    def _kind(self, asked: _Pruning, t: float) -> tuple[str, tuple[str, ...]]:
        """Measured, interpolated or extrapolated, and why the last; t: the split over the best one."""
        density, notes = asked.density, []
        is_equal, is_best = abs(t) < 0.05, abs(t - 1) < 0.1
        family, name = (self.plain, "equal d_in and d_glu") if is_equal else (self.split, "the best split")
        point = family.has(density) and (is_equal or is_best)
        if not is_equal and any(abs(density - d) < _NEAR for d in self._by_layer):
            point = False
        if asked.gamma < 1:
            near = [g for g in self.by_gamma if abs(g - asked.gamma) < 1e-3]
            if near:
                family, name = self.by_gamma[near[0]], f"gamma {near[0]:g}"
            point = bool(near) and family.has(density) and point
            if not is_equal:
                notes.append("gamma below 1 was measured with d_in = d_glu alone")
            if not any(abs(asked.cached - c) <= _HALF for c in self.cached):
                held = " or ".join(f"{100 * c:.0f} %" for c in sorted(self.cached))
                notes.append(f"gamma below 1 was measured with {held} of the columns cached alone")
            if asked.cache != "lfu" or not asked.uniform:
                notes.append("gamma below 1 was measured with lfu and the same share cached everywhere")
            if asked.gamma < min(self.by_gamma) - 1e-3:
                notes.append(f"gamma was measured down to {min(self.by_gamma):g}")
        if not family.spans(density):
            low, high = family.density[0], family.density[-1]
            notes.append(f"measured for {name} from density {low:.2f} to {high:.2f}")
        if not -0.05 < t < 1.1:
            notes.append("this difference of d_in and d_glu is beyond what was measured")
        if notes:
            return "extrapolated", tuple(notes)
        return ("measured" if point else "interpolated"), ()


@lru_cache(maxsize=1)
def _measured() -> tuple[dict[str, _Model], dict[str, Any]]:
    """Models by name, and the cost of quantising."""
    content = tomli.loads(resources.files("dipper").joinpath("quality.toml").read_text(encoding="utf-8"))
    return {table["name"]: _Model(table) for table in content["models"]}, content["quantisation"]


def measured_models() -> tuple[str, ...]:
    """Names of the models whose quality was measured, as their bundles have them."""
    return tuple(_measured()[0])


def quality_of(bundle: Bundle, config: EngineConfig, *, cached: float = 0.5) -> Quality:
    """What a configuration loses against the bundle's source, quantisation of 16-bit sources included.

    Args:
        bundle: real, or of a published shape; its model's name says which curves are its own.
        config: method, densities, gamma, cache policy and split; a calibration is not taken.
        cached: share of the columns that caches hold, which matters below gamma 1.
    """
    if not config.prunes:
        return _quantised(bundle, EXACT)
    d_in, d_glu = config.densities
    uniform = config.split is None
    return _quality(
        bundle,
        _Pruning(
            d_in=d_in, d_glu=d_glu, gamma=config.effective_gamma, cached=cached, cache=config.cache, uniform=uniform
        ),
    )


def _quality(bundle: Bundle, asked: _Pruning) -> Quality:
    models = _measured()[0]
    own = models.get(bundle.model.name)
    if own is not None:
        return _quantised(bundle, own.quality(asked))
    others = [model.quality(asked) for model in models.values()]
    found = [other.increase for other in others]
    notes = dict.fromkeys(note for other in others for note in other.notes)
    mean = Quality(
        increase=float(np.mean(found)),
        low=min(found),
        high=max(found),
        kind="extrapolated",
        notes=(
            f"not measured for {bundle.model.name}: mean, least and most of {len(models)} models of 0.1 to 0.5 B; "
            "larger ones lose less in the literature, so this is more likely too high than too low",
            *notes,
        ),
    )
    return _quantised(bundle, mean)


def _bits(bundle: Bundle) -> int | None:
    """Bits that packing quantised a 16-bit source's MLP to; None: it kept the source's own grid."""
    source = bundle.header["source"]
    if "shape_from" in source:  # a published shape, laid out as packing would
        n_bytes: int = sum(r["bytes"] for r in bundle.header["regions"])
        return round(8 * n_bytes / bundle.mlp_weights)
    bits = str(source["bits"])
    return None if bits == "source" else int(bits)


def _quantised(bundle: Bundle, pruned: Quality) -> Quality:
    """A quality with the cost of quantising on top; the two were not measured together: interpolated at best."""
    table, bits = _measured()[1], _bits(bundle)
    if bits is None:
        return pruned
    cost, error = table[str(bits)]["increase"], 2 * table[str(bits)]["stderr"]
    is_own = bundle.model.name.startswith(table["model"])
    note = () if is_own else (f"the cost of {bits} bits was measured on {table['model']} alone",)
    kind = "extrapolated" if not is_own else "measured" if pruned is EXACT else "interpolated"
    known = pruned.low is not None and pruned.high is not None and (is_own or pruned.kind == "extrapolated")

    def both(value: float | None, quantised: float) -> float | None:
        return (1 + value) * (1 + quantised) - 1 if known and value is not None else None

    return Quality(
        increase=(1 + pruned.increase) * (1 + cost) - 1,
        low=both(pruned.low, cost - error),
        high=both(pruned.high, cost + error),
        kind=max(kind, pruned.kind, key=_KINDS.index),
        notes=(*pruned.notes, *note),
    )


def _splits_at(
    bundle: Bundle, loss: float, gamma: float, kinds: tuple[bool, ...] = (False, True)
) -> Iterator[tuple[float, float]]:
    """(d_in, d_glu) of the lowest densities, in hundredths, that lose no more; kinds: equal, of the best split."""
    models = _measured()[0]
    own = models.get(bundle.model.name)
    for is_best in kinds:
        low, high = (round(100 * d) for d in DENSITIES)
        for percent in range(low, high + 1):
            density = percent / 100
            spread = 0.0
            if is_best:
                spread = own.spread(density) if own else float(np.mean([m.spread(density) for m in models.values()]))
            d_in, d_glu = round(min(1.0, density + spread / 3), 2), round(max(0.01, density - 2 * spread / 3), 2)
            if _quality(bundle, _Pruning(d_in=d_in, d_glu=d_glu, gamma=gamma)).increase <= loss:
                yield d_in, d_glu
                break


# ------------------------------------------------------------------------------------------------ candidates


@dataclass(frozen=True, kw_only=True)
class _Terms:
    """What a plan is made for."""

    device: Device
    dram: str | int | None
    mlp_dram: str | None
    context: int
    host_bytes: int
    loss: float  # of quality, at most

    def setting(self, bundle: Bundle, **options: Any) -> Setting:
        """A setting under the budget and on the device; BudgetError as `plan_run` and `check_fits`."""
        config = EngineConfig(dram=self.dram, mlp_dram=self.mlp_dram, context=self.context, **options)
        setting = Setting.plan_for(bundle, config, host_bytes=self.host_bytes, alignment=self.device.flash.alignment)
        check_fits(setting, self.device)
        return setting


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A setting and its quality; once simulated also its record."""

    setting: Setting
    record: SimRecord | None = None

    @property
    def quality(self) -> Quality:
        plan = self.setting.plan
        return quality_of(self.setting.bundle, self.setting.config, cached=plan.cached_fraction)

    @property
    def simulated(self) -> SimRecord:
        assert self.record is not None, "simulate it first"
        return self.record

    @property
    def tok_per_s(self) -> float:
        return self.simulated.tok_per_s

    def key(self) -> tuple[Any, ...]:
        """Equal for the same setting."""
        return (id(self.setting.bundle), self.setting.config)


class _Search:
    """Candidates found so far, and what was left out and why."""

    def __init__(self, terms: _Terms, workload_of: Callable[[Bundle], Workload]) -> None:
        self.terms = terms
        self.found: list[_Candidate] = []
        self.skipped: list[dict[str, str]] = []
        self.refused: list[BudgetError] = []
        self._workload_of = workload_of
        self._workloads: dict[int, Workload] = {}

    def workload(self, bundle: Bundle) -> Workload:
        """Of a bundle, made once."""
        if id(bundle) not in self._workloads:
            self._workloads[id(bundle)] = self._workload_of(bundle)
        return self._workloads[id(bundle)]

    def skip(self, bundle: Bundle, what: str, why: str) -> None:
        entry = {"what": f"{what}{_with_bits(bundle)}", "why": why}
        if entry not in self.skipped:
            self.skipped.append(entry)

    def candidate(self, bundle: Bundle, **options: Any) -> _Candidate | None:
        """One that fits; None, and why, if none."""
        try:
            return _Candidate(setting=self.terms.setting(bundle, **options))
        except BudgetError as error:
            self.skip(bundle, options["method"], str(error))
            self.refused.append(error)
            return None

    def dense(self, bundle: Bundle) -> Iterator[_Candidate | None]:
        """Everything resident, and streamed."""
        if self.terms.mlp_dram is None:
            yield self.candidate(bundle, method="dense-resident")
        else:
            self.skip(bundle, "dense-resident", "--mlp-dram limits the MLP, which it holds whole")
        yield self.candidate(bundle, method="dense-stream")

    def plain(self, bundle: Bundle) -> Iterator[_Candidate | None]:
        """DIP at the densities that lose what is allowed."""
        if self.candidate(bundle, method="dip") is None:
            return
        quantised = quality_of(bundle, EngineConfig(method="dense-stream")).increase
        if self.terms.loss <= quantised:
            why = "no loss is allowed" if quantised == 0 else f"quantising alone costs {100 * quantised:+.2f} %"
            self.skip(bundle, "dip and dip-ca", why)
            return
        for d_in, d_glu in _splits_at(bundle, self.terms.loss, 1.0):
            yield self.candidate(bundle, **_pruning_options(d_in, d_glu, 1.0))

    def pruned(self, bundle: Bundle) -> Iterator[_Candidate | None]:
        """Densities where curves cross multiples of the loss allowed; fewer for gamma below 1."""
        plain = [c for c in self.found if c.setting.config.prunes and c.setting.bundle is bundle]
        if not plain or self.is_hopeless(bundle, plain):
            return
        enough = CLOSE * max(c.tok_per_s for c in plain)
        pairs = [c.setting.config.densities for c in plain if c.tok_per_s >= enough]
        kinds = tuple(sorted({d_in != d_glu for d_in, d_glu in pairs}))
        capacity = plain[0].setting.capacity
        columns = tuple(r["n_columns"] for r in bundle.header["regions"])
        gammas: tuple[float, ...] = (1.0, *GAMMAS)
        if not any(capacity) or capacity == columns:
            held = "all columns" if any(capacity) else "no columns"
            self.skip(bundle, "dip-ca", f"caches hold {held}, so gamma changes nothing")
            gammas = (1.0,)
        for gamma in gammas:
            targets = TARGETS if gamma == 1 else TARGETS[1:2] if gamma == max(GAMMAS) else TARGETS[1:3]
            for target in targets:
                for d_in, d_glu in _splits_at(bundle, self.terms.loss * target, gamma, kinds):
                    yield self.candidate(bundle, **_pruning_options(d_in, d_glu, gamma))

    def simulate(self, candidates: Iterable[_Candidate | None]) -> None:
        """Adds records; all settings of a bundle in one call, which share what the workload makes for them."""
        known = {c.key() for c in self.found}
        new = list({c.key(): c for c in candidates if c is not None and c.key() not in known}.values())
        for bundle in {id(c.setting.bundle): c.setting.bundle for c in new}.values():
            workload = self.workload(bundle)
            group = [c for c in new if c.setting.bundle is bundle]
            pruned = [c for c in group if c.setting.config.prunes]
            traffic = dict(zip(map(id, pruned), workload.traffic([c.setting for c in pruned]), strict=True))
            self.found += [self._recorded(workload, c, traffic.get(id(c))) for c in group]

    def _recorded(self, workload: Workload, candidate: _Candidate, traffic: Traffic | None) -> _Candidate:
        record = sim_record(workload, candidate.setting, traffic, self.terms.device)
        quality = candidate.quality
        notes = [*record.notes, f"perplexity {quality.words()}", *quality.notes]
        split = "uniform" if candidate.setting.config.split is None else "miss-curve"
        return replace(candidate, record=replace(record, split=split, notes=notes))

    def within(self, prunes: bool) -> list[_Candidate]:
        """Those that lose no more than allowed, fastest first; dense ones too where quantising alone loses more."""
        dense = min((c.quality.increase for c in self.found if not c.setting.config.prunes), default=0.0)
        loss = max(self.terms.loss, dense)
        kept = [c for c in self.found if c.setting.config.prunes == prunes and c.quality.increase <= loss]
        return sorted(kept, key=lambda c: (-c.tok_per_s, c.quality.increase))

    def is_hopeless(self, bundle: Bundle, plain: list[_Candidate]) -> bool:
        """Whether plain DIP is so far behind the fastest that nothing makes up for it; said among what was skipped."""
        fastest = max((*self.within(True), *self.within(False)), key=lambda c: c.tok_per_s)
        reached = max(c.tok_per_s for c in plain)
        if reached >= HOPELESS * fastest.tok_per_s:
            return False
        name = f"{fastest.setting.config.method}{_with_bits(fastest.setting.bundle)}"
        why = f"plain dip reaches {reached:.2f} tok/s, {name} {fastest.tok_per_s:.2f}: nothing makes up for that"
        self.skip(bundle, "other densities, dip-ca, caches and splits", why)
        return True

    def refined(self) -> Iterator[_Candidate | None]:
        """The fastest pruned ones with other cache policies and with slots where they save the most time."""
        fastest = max(c.tok_per_s for c in (*self.within(True), *self.within(False)))
        weights: dict[Any, tuple[float, ...] | None] = {}
        for candidate in self.within(True)[:N_REFINED]:
            if candidate.tok_per_s < HOPELESS * fastest:
                break
            setting, bundle = candidate.setting, candidate.setting.bundle
            if not any(setting.capacity):
                continue
            options = _pruning_options(*setting.config.densities, setting.gamma)
            for cache in CACHES:
                yield self.candidate(bundle, **options, cache=cache)
            key = (id(bundle), setting.k)
            if key not in weights:
                # One curve serves every gamma: below 1 it would need a closed-loop run a point.
                weights[key] = self._weights(setting.at_gamma_1())
            if (split := weights[key]) is not None:
                yield self.candidate(bundle, **options, split=split)

    def _weights(self, setting: Setting) -> tuple[float, ...] | None:
        bundle = setting.bundle
        try:
            return miss_curve_split(self.workload(bundle), setting, self.terms.device, steps=CURVE_STEPS)[0]
        except BudgetError as error:
            self.skip(bundle, "slots by miss curve", str(error))
            return None


def _pruning_options(d_in: float, d_glu: float, gamma: float) -> dict[str, Any]:
    options: dict[str, Any] = {"method": "dip" if gamma == 1 else "dip-ca", "d_in": d_in, "d_glu": d_glu}
    return options if gamma == 1 else {**options, "gamma": gamma}


def _with_bits(bundle: Bundle) -> str:
    bits = _bits(bundle)
    return "" if bits is None else f" at {bits} bits"


# ------------------------------------------------------------------------------------------------ the plan


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """The best settings, and everything that they were chosen from.

    Attributes:
        model, device: names.
        max_ppl_increase: the loss allowed, relative.
        best: the fastest within it, simulated; its notes say what is known of its quality.
        quality: of the best.
        bits: of the best's MLP where packing quantises; None: the source's own grid.
        config: options of `EngineConfig` for the best.
        rows: all that was simulated, fastest first: settings, tok_per_s, ttft_s, dram_bytes, ppl_increase, ...
        front: of the rows, those than which none is both faster and no worse; fastest first.
        skipped: what was not simulated, and why.
        notes: what a reader of the plan must know.
        header_sha256: of the best's bundle; None: of a published shape, which cannot be run.
    """

    model: str
    device: str
    max_ppl_increase: float
    best: SimRecord
    quality: Quality
    bits: int | None
    config: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    front: tuple[dict[str, Any], ...]
    skipped: tuple[dict[str, str], ...] = ()
    notes: tuple[str, ...] = field(default=())
    header_sha256: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON types, `schema` first; `load_config` reads it from a file."""
        quality = {**vars(self.quality), "notes": list(self.quality.notes)}
        config = {k: list(v) if isinstance(v, tuple) else v for k, v in self.config.items()}
        own = {"best": self.best.as_dict(), "quality": quality, "config": config}
        lists = {name: list(getattr(self, name)) for name in ("rows", "front", "skipped", "notes")}
        return {"schema": SCHEMA, **vars(self), **own, **lists}


def make_plan(
    bundles: Sequence[Bundle],
    device: Device,
    *,
    workload_of: Callable[[Bundle], Workload],
    dram: str | int | None = None,
    mlp_dram: str | None = None,
    max_ppl_increase: float = 0.05,
    context: int = 1024,
    host_bytes: int | None = None,
) -> PlanResult:
    """Searches method, bits, densities, gamma, cache policy and shares of the slots.

    Args:
        bundles: of one model: a real one, or a published shape at each number of bits to choose from.
        device: where it shall run.
        workload_of: what tokens select, asked once a bundle that has something to simulate.
        dram: of the process, as in `EngineConfig`; None, and no `mlp_dram`: all that the device has.
        mlp_dram: of the MLP alone.
        max_ppl_increase: over the source of the bundles, relative: 0.05 is 5 %.
        context: positions of the KV cache.
        host_bytes: what the process holds before any weight; None: this one, now.

    Raises:
        BudgetError: the DRAM does not suffice for any method; the smallest that does is named.
        ConfigError: options that contradict each other, no bundle, a context over the model's.
    """
    _check(bundles, device, dram, mlp_dram, max_ppl_increase, context)
    terms = _Terms(
        device=device,
        dram=device.dram.bytes if dram is None and mlp_dram is None else dram,
        mlp_dram=mlp_dram,
        context=context,
        host_bytes=rss_bytes() if host_bytes is None else host_bytes,
        loss=max_ppl_increase,
    )
    search = _Search(terms, workload_of)
    first = [c for bundle in bundles for part in (search.dense(bundle), search.plain(bundle)) for c in part]
    if not any(first):
        raise _smallest(bundles, search)
    search.simulate(first)
    search.simulate([c for bundle in bundles for c in search.pruned(bundle)])
    search.simulate(list(search.refined()))
    notes = []
    if dram is None and mlp_dram is None:
        notes.append(
            f"no budget given: all {device.dram.bytes / 1e9:.1f} GB of the device; give --dram what a process may take"
        )
    return _result(search, notes)


def _check(
    bundles: Sequence[Bundle],
    device: Device,
    dram: str | int | None,
    mlp_dram: str | None,
    max_ppl_increase: float,
    context: int,
) -> None:
    if not bundles:
        raise ConfigError("there is nothing to plan for: give a bundle")
    if not 0 <= max_ppl_increase <= 10:
        raise ConfigError(
            f"max_ppl_increase is {max_ppl_increase}, outside [0, 10]: it is relative, 0.05 allows 5 % more perplexity"
        )
    limit = bundles[0].model.max_context
    if context > limit:
        raise ConfigError(f"a context of {context} is over the model's {limit}: lower --ctx")
    if len(bundles) > 1 and any("%" in str(amount) for amount in (dram, mlp_dram)):
        raise ConfigError(
            f"DRAM in % is of one bundle's bytes, and there are {len(bundles)} to choose from: give bytes such as 4GB"
        )
    wanted = 0 if dram is None else parse_bytes(dram, bundles[0].total_bytes)
    if wanted > device.dram.bytes:
        raise ConfigError(
            f"--dram gives {wanted / 1e6:.1f} MB, but {device.name} has {device.dram.bytes / 1e6:.1f} MB: lower it"
        )


def _smallest(bundles: Sequence[Bundle], search: _Search) -> BudgetError:
    """The refusal of the method that needs the least."""
    terms, needs = search.terms, []
    for bundle in bundles:
        for method in ("dense-stream", "dip"):
            free = EngineConfig(method=method, context=terms.context, mlp_dram="1000b")
            needs.append((plan_run(bundle, free, terms.host_bytes).minimum_bytes, method, bundle))
    _, method, bundle = min(needs, key=lambda need: need[0])
    try:
        terms.setting(bundle, method=method)
    except BudgetError as error:
        return error
    return search.refused[0]


def _row(candidate: _Candidate, loss: float) -> dict[str, Any]:
    record, quality = candidate.simulated, candidate.quality
    same = ("method", "density", "d_in", "d_glu", "gamma", "cache", "split", "tok_per_s", "ttft_s", "hit_rate")
    traffic = ("flash_bytes_per_token", "reads_per_token", "mlp_bits_per_weight", "cached_fraction")
    row = {"bits": _bits(candidate.setting.bundle), **{name: getattr(record, name) for name in same}}
    row["split"] = record.split if candidate.setting.config.prunes else None
    return {
        **row,
        "dram_bytes": candidate.setting.plan.total_bytes,
        **{name: getattr(record, name) for name in traffic},
        "ppl_increase": quality.increase,
        "ppl_low": quality.low,
        "ppl_high": quality.high,
        "quality": quality.kind,
        "within": quality.increase <= loss,
        "workload": record.workload["kind"],
    }


def _front(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows, fastest first, that lose less than every faster one."""
    front: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (-row["tok_per_s"], row["ppl_increase"])):
        if not front or row["ppl_increase"] < front[-1]["ppl_increase"]:
            front.append(row)
    return front


def _result(search: _Search, notes: list[str]) -> PlanResult:
    terms, dense, pruned = search.terms, search.within(False), search.within(True)
    best = max((*dense, *pruned), key=lambda c: (c.tok_per_s, -c.quality.increase))
    fastest_dense = max(dense, key=lambda c: c.tok_per_s, default=None)
    if fastest_dense is not None and best.tok_per_s < WORTH * fastest_dense.tok_per_s:
        best = fastest_dense  # what pruning gains is within the simulator's error, what it loses is not
    rows = sorted((_row(c, terms.loss) for c in search.found), key=lambda row: (-row["tok_per_s"], row["ppl_increase"]))
    bundle, config = best.setting.bundle, best.setting.config
    options: dict[str, Any] = {"method": config.method, "context": terms.context}
    if config.prunes:
        names = ("d_in", "d_glu", "gamma", "cache", "split")
        options |= {n: v for n in names if (v := getattr(config, n)) is not None}
    options |= {n: v for n in ("dram", "mlp_dram") if (v := getattr(config, n)) is not None}
    return PlanResult(
        model=bundle.model.name,
        device=terms.device.name,
        max_ppl_increase=terms.loss,
        best=best.simulated,
        quality=best.quality,
        bits=_bits(bundle),
        config=options,
        rows=tuple(rows),
        front=tuple(_front(rows)),
        skipped=tuple(search.skipped),
        notes=(*notes, *_verdict(best, dense, pruned, terms.loss), *best.quality.notes),
        header_sha256=bundle.header.get("header_sha256"),
    )


def _verdict(best: _Candidate, dense: list[_Candidate], pruned: list[_Candidate], loss: float) -> Iterator[str]:
    """What pruning gains over dense, in a sentence, and what a bound does to the choice."""
    if best.quality.increase > loss:
        yield (
            f"nothing keeps to {100 * loss:+.2f} % of perplexity: quantising alone costs "
            f"{100 * best.quality.increase:+.2f} %; this loses the least"
        )
    if not best.setting.config.prunes:
        name = best.setting.config.method
        if not pruned:
            yield f"{name} it is: no pruned setting keeps to {100 * loss:+.1f} % of perplexity"
        else:
            yield (
                f"pruning does not pay here: {name} {best.tok_per_s:.2f} tok/s, the fastest pruned setting within the "
                f"bound {pruned[0].tok_per_s:.2f}"
            )
    elif dense:
        gain = best.tok_per_s / dense[0].tok_per_s
        over = f"{gain:.2f} × {dense[0].setting.config.method} ({dense[0].tok_per_s:.2f} tok/s)"
        yield over if gain >= WORTH else f"{over}: so small a gain is within the simulator's error, and dense is exact"
    if best.quality.high is not None and best.quality.increase <= loss < best.quality.high:
        yield f"perplexity may rise by {100 * best.quality.high:.1f} %, more than the {100 * loss:.1f} % allowed"


def load_config(path: str | os.PathLike[str], bundle: Bundle) -> dict[str, Any]:
    """Options of `EngineConfig` from a plan's file.

    Args:
        path: JSON of `PlanResult.as_dict`.
        bundle: to be run; the plan must have been made for it.

    Raises:
        ConfigError: no plan, of another bundle, or damaged.
    """
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
        schema, sha256, options = held["schema"], held["header_sha256"], dict(held["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read as a plan ({type(error).__name__}: {error}): write one with dipper plan --out"
        ) from None
    unknown = set(options) - _OPTIONS
    if unknown:
        raise ConfigError(f"{path} has options that no plan has ({', '.join(sorted(unknown))}): plan anew")
    if schema != SCHEMA:
        raise ConfigError(f"{path} is {schema}, not {SCHEMA}: write a plan with dipper plan --out")
    if sha256 is None or sha256 != bundle.header.get("header_sha256"):
        raise ConfigError(
            f"{path} is a plan for another bundle ({held.get('model')}), not for {bundle.path}: plan this one anew"
        )
    try:
        if options.get("split") is not None:
            options["split"] = tuple(options["split"])
        EngineConfig(**options)
    except TypeError as error:
        raise ConfigError(f"{path} has options that the engine does not know ({error}): plan anew") from None
    return options


# ------------------------------------------------------------------------------------------------ in words


def plan_table(result: PlanResult) -> str:
    """The best in words, then the front, then what was left out."""
    best, config = result.best, result.config
    words = [best.method, *([f"{result.bits} bits"] if result.bits else [])]
    if best.d_in is not None and best.d_glu is not None and best.density is not None:
        words.append(f"density {best.density:.2f} (input {best.d_in:.2f}, glu {best.d_glu:.2f})")
        words += [f"gamma {best.gamma:g}"] if best.gamma != 1 else []
        words.append(f"cache {best.cache}, slots {best.split}")
    flash = "no reads while decoding"
    if best.reads_per_token:
        flash = f"{best.flash_bytes_per_token / 1e6:.1f} MB in {best.reads_per_token:,.0f} reads per token"
    hits = "" if best.hit_rate is None else f", hits {100 * best.hit_rate:.0f} %"
    budget = " and ".join(
        f"{name.replace('_', '-')} {_amount(config[name])}" for name in ("dram", "mlp_dram") if name in config
    )
    total = sum(best.dram_bytes.values())
    pairs = [
        ("plan", f"{result.model} on {result.device}, perplexity {100 * result.max_ppl_increase:+.1f} % at most"),
        ("best", ", ".join(words)),
        ("speed", f"{best.tok_per_s:.2f} tok/s, first token after {best.ttft_s:.2f} s ({best.n_prompt} prompt tokens)"),
        ("perplexity", result.quality.words()),
        ("DRAM", f"{total / 1e6:.1f} MB ({budget}); MLP {best.mlp_bits_per_weight:.2f} bits per weight"),
        ("flash", flash + hits),
        *(("note", note) for note in result.notes),
        *(("left out", f"{entry['what']}: {entry['why']}") for entry in result.skipped),
    ]
    return "\n\n".join((align(pairs, left=2), _front_table(result)))


def _amount(amount: str | int) -> str:
    return f"{amount / 1e6:.1f} MB" if isinstance(amount, int) else amount


def _front_table(result: PlanResult) -> str:
    head = ["method", "bits", "cache", "slots", "d_in", "d_glu", "gamma", "tok/s", "TTFT s", "DRAM MB", "hits"]
    rows = [[*head, "perplexity", "known", "within"]]
    for row in result.front:
        hits = "-" if row["hit_rate"] is None else f"{100 * row['hit_rate']:.0f} %"
        rows.append(
            [
                row["method"],
                "-" if row["bits"] is None else str(row["bits"]),
                row["cache"] or "-",
                row["split"] or "-",
                *("-" if row[name] is None else f"{row[name]:.2f}" for name in ("d_in", "d_glu", "gamma")),
                f"{row['tok_per_s']:.2f}",
                f"{row['ttft_s']:.2f}",
                f"{row['dram_bytes'] / 1e6:.1f}",
                hits,
                f"{100 * row['ppl_increase']:+.1f} %",
                row["quality"],
                "yes" if row["within"] else "no",
            ]
        )
    return align(rows, left=4)
