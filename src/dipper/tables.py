"""What the command line shows of records: plain text, returned, never printed here.

Plain text on purpose: a table library would stand in the DRAM that a run accounts for. MB are 10^6 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dipper.records import LEDGER, BenchRow, EvalRecord, RunRecord, SimRecord, Stage

if TYPE_CHECKING:
    from dipper.compare import Row
    from dipper.reproduce import Check, Listed, Summary

__all__ = [
    "align",
    "bench_table",
    "checks_table",
    "compare_table",
    "eval_table",
    "evals_table",
    "experiments_table",
    "inspect_table",
    "ledger_table",
    "reproduced_table",
    "run_table",
    "sim_table",
    "tasks_table",
    "turn_line",
]

_NONE = "-"


# ------------------------------------------------------------------------------------------------ numbers


def _mb(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:.1f} MB"


def _size(n_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes:.0f} B"


def _or_none(value: float | None, form: str) -> str:
    return _NONE if value is None else form.format(value)


def _method(record: RunRecord | EvalRecord) -> str:
    words = [record.method]
    if record.density is not None:
        words.append(f"density {record.density:.2f}")
    if record.d_in is not None and record.d_glu is not None and record.d_in != record.d_glu:
        words[-1] += f" (input {record.d_in:.2f}, glu {record.d_glu:.2f})"
    if record.gamma is not None:
        words.append(f"gamma {record.gamma:g}")
    if record.cache is not None:
        words.append(f"cache {record.cache}")
    if record.provenance is not None and record.provenance.calibration is not None:
        words.append(f"calibration {record.provenance.calibration}")
    return ", ".join(words)


def align(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows of cells as columns two spaces apart: the first `left` flush left, the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _pairs(rows: Sequence[tuple[str, str]]) -> str:
    return align(rows, left=2)


# ------------------------------------------------------------------------------------------------ run


def run_table(record: RunRecord) -> str:
    """One run: speed, cache, flash, DRAM, time."""
    rows = [
        ("method", f"{_method(record)}; {record.n_threads} threads, {record.isa}"),
        ("speed", _speed(record)),
        *_flash(record),
        ("DRAM", _dram(record)),
        ("peak RSS", _mb(record.peak_rss_bytes)),
        ("time per token", _ledger(record)),
        *(("note", note) for note in record.notes),
    ]
    return _pairs(rows)


def _speed(record: RunRecord) -> str:
    rate = _or_none(record.tok_per_s, "{:.2f} tok/s")
    prompt = f"first token after {record.ttft_s:.2f} s ({record.n_prompt} prompt tokens)"
    return f"{rate}, {record.n_tokens} tokens, {prompt}, ended by {record.finish_reason}"


def _flash(record: RunRecord) -> list[tuple[str, str]]:
    rows = []
    if record.hit_rate is not None:
        rows.append(("hit rate", f"{100 * record.hit_rate:.1f} %"))
    if not record.reads_per_token:
        return [*rows, ("flash", "no reads while decoding")]
    mean = record.flash_bytes_per_token / record.reads_per_token
    useful = 100 * record.useful_bytes_per_token / record.flash_bytes_per_token
    rows.append(
        (
            "flash per token",
            f"{_size(record.flash_bytes_per_token)} in {record.reads_per_token:,.0f} reads of {_size(mean)} "
            f"({useful:.0f} % useful)",
        )
    )
    given = "not measured" if record.disk_gbps_at_size is None else f"{record.disk_gbps_at_size:.2f} GB/s"
    backend = f"{record.reader_backend}, {'O_DIRECT' if record.direct else 'through the page cache'}"
    drawn = _or_none(record.read_gbps, "{:.2f} GB/s")
    rows.append(("read", f"{drawn}; the disk gives at that size: {given} ({backend})"))
    return rows


def _dram(record: RunRecord) -> str:
    parts = ", ".join(f"{name} {n / 1e6:.1f}" for name, n in record.dram_bytes.items() if n)
    budget = "no budget" if record.dram_budget_bytes is None else f"budget {_mb(record.dram_budget_bytes)}"
    total = _mb(sum(record.dram_bytes.values()))
    return f"{total} ({budget}; {parts}); MLP {record.mlp_bits_per_weight:.2f} bits per weight"


def _ledger(record: RunRecord) -> str:
    n_steps = record.n_tokens - 1
    if n_steps < 1:
        return _NONE
    parts = " + ".join(f"{name} {1e3 * record.ledger_s[name] / n_steps:.2f}" for name in LEDGER)
    return f"{1e3 * record.decode_s / n_steps:.2f} ms = {parts}"


def turn_line(record: RunRecord) -> str:
    """One turn of a chat, in a line."""
    words = [f"[{_or_none(record.tok_per_s, '{:.2f}')} tok/s", f"first token after {record.ttft_s:.2f} s"]
    if record.hit_rate is not None:
        words.append(f"hits {100 * record.hit_rate:.0f} %")
    if record.reads_per_token:
        words.append(f"{_size(record.flash_bytes_per_token)} in {record.reads_per_token:,.0f} reads per token")
    return ", ".join(words) + "]"


def compare_table(records: Sequence[RunRecord], perplexities: dict[str, float] | None = None) -> str:
    """Several runs side by side, one a row."""
    head = ["method", "tok/s", "TTFT s", "hits", "flash/token", "reads/token", "DRAM MB", "peak RSS MB"]
    rows = [head + (["perplexity"] if perplexities else [])]
    for record in records:
        cells = [
            record.method,
            _or_none(record.tok_per_s, "{:.2f}"),
            f"{record.ttft_s:.2f}",
            _or_none(None if record.hit_rate is None else 100 * record.hit_rate, "{:.0f} %"),
            _size(record.flash_bytes_per_token),
            f"{record.reads_per_token:,.0f}",
            f"{sum(record.dram_bytes.values()) / 1e6:.0f}",
            f"{record.peak_rss_bytes / 1e6:.0f}",
        ]
        if perplexities:
            cells.append(_or_none(perplexities.get(record.method), "{:.2f}"))
        rows.append(cells)
    return align(rows)


# ------------------------------------------------------------------------------------------------ bench


def bench_table(rows: Sequence[BenchRow]) -> str:
    """A bench: one test of one mode a row, medians."""
    table = [
        [
            "mode",
            "state",
            "test",
            "tok/s",
            "± ",
            "hits",
            "flash/token",
            "reads/token",
            "disk GB/s",
            "of limit",
            "RSS MB",
        ]
    ]
    for row in rows:
        cells = row.as_dict()
        run, is_decode = row.run, row.test.startswith("tg")
        table.append(
            [
                row.mode,
                row.state,
                row.test,
                f"{row.median_ts:.2f}",
                f"{cells['stddev_ts']:.2f}",
                _or_none(None if run.hit_rate is None or not is_decode else 100 * run.hit_rate, "{:.0f} %"),
                _size(run.flash_bytes_per_token) if is_decode else _NONE,
                f"{run.reads_per_token:,.0f}" if is_decode else _NONE,
                _or_none(run.disk_gbps_at_size if is_decode else None, "{:.2f}"),
                _or_none(None if cells["of_limit"] is None else 100 * cells["of_limit"], "{:.0f} %"),
                f"{run.peak_rss_bytes / 1e6:.0f}",
            ]
        )
    return align(table, left=3)


def ledger_table(row: BenchRow) -> str:
    """Where a decoded token's time goes, one part a row, then what its bytes allow; empty for a row without ledger."""
    ledger = row.ledger
    if ledger is None:
        return ""
    rows = [["stage", "ms", "share", "DRAM/token", "GB/s", "of roof"]]
    rows += [_stage(stage) for stage in (*ledger.stages, ledger.total)]
    rows.append(["limit", _or_none(ledger.limit_ms, "{:.3f}"), _percent(ledger.of_limit), _NONE, _NONE, _NONE])
    run, roof = row.run, _or_none(ledger.roof_gbps, "{:.1f} GB/s")
    read = f"DRAM {_or_none(ledger.dram_ms, '{:.3f} ms')} at its roof, {roof}"
    if run.flash_bytes_per_token:
        flash = f"flash {_or_none(ledger.flash_ms, '{:.3f} ms')}, {_size(run.flash_bytes_per_token)}"
        read = f"the longer of {read}, and {flash} at {_or_none(run.disk_gbps_at_size, '{:.2f} GB/s')}"
    where = f"{row.mode}, {row.state}, {row.test} after {row.n_depth}: {run.n_threads} threads, {run.isa}"
    return f"{where}\n{align(rows)}\nlimit: {read}"


def _stage(stage: Stage) -> list[str]:
    return [
        stage.name,
        f"{stage.ms:.3f}",
        _percent(stage.share),
        _NONE if stage.dram_bytes is None else _mb(stage.dram_bytes),
        _or_none(stage.gbps, "{:.1f}"),
        _percent(stage.of_roof),
    ]


def _percent(share: float | None) -> str:
    return _or_none(None if share is None else 100 * share, "{:.1f} %")


# ------------------------------------------------------------------------------------------------ simulate


def _way(r: SimRecord) -> str:
    """The method, and how planes fetches."""
    if r.fetch is None:
        return r.method
    return f"{r.method} {r.fetch:g} : {r.fetch_glu:g}" + ("" if r.read_cost is None else f" runs {r.read_cost} B")


def sim_table(records: Sequence[SimRecord]) -> str:
    """Simulated settings, one a row; `flat` is the speed were a read to cost its bytes alone."""
    head = ["device", "method", "density", "gamma", "cache", "split", "DRAM MB", "bits/weight", "cached", "hits"]
    rows = [[*head, "flash/token", "reads/token", "tok/s", "flat", "TTFT s", "mJ/token", "bound by", "masks"]]
    for r in records:
        rows.append(
            [
                r.device,
                _way(r),
                _or_none(r.density, "{:.2f}"),
                _or_none(r.gamma if r.method == "dip-ca" else None, "{:g}"),
                r.cache or _NONE,
                r.split if r.cache else _NONE,
                f"{sum(r.dram_bytes.values()) / 1e6:.0f}",
                f"{r.mlp_bits_per_weight:.2f}",
                f"{100 * r.cached_fraction:.0f} %",
                _or_none(None if r.hit_rate is None else 100 * r.hit_rate, "{:.1f} %"),
                _size(r.flash_bytes_per_token),
                f"{r.reads_per_token:,.0f}",
                f"{r.tok_per_s:.2f}",
                f"{r.tok_per_s_flat:.2f}",
                f"{r.ttft_s:.2f}",
                _or_none(None if r.joules_per_token is None else 1e3 * r.joules_per_token, "{:.1f}"),
                _bound(r),
                str(r.workload["kind"]),
            ]
        )
    return align(rows, left=2)


def _bound(record: SimRecord) -> str:
    """The part that takes the most of a token."""
    part = max(record.ledger_s, key=lambda name: record.ledger_s[name])
    return {"wait": "flash", "gemv": "MLP"}.get(part, part)


# ------------------------------------------------------------------------------------------------ eval, inspect


def eval_table(record: EvalRecord) -> str:
    """A perplexity and what it was taken on."""
    error = "one window, no error bar" if record.stderr is None else f"± {record.stderr:.3f}"
    joined = "rows joined by blank lines" if record.rows_joined else "as it is"
    bos = "no BOS" if record.bos_id is None else f"BOS {record.bos_id} before each"
    rows = [
        ("perplexity", f"{record.perplexity:.4f} ({error})"),
        ("method", f"{_method(record)}; {_where(record)}"),
        ("text", f"{record.text}, {joined}"),
        ("windows", f"{record.n_windows} of {record.window}, {record.n_tokens} tokens scored, {bos}"),
        ("tokens sha256", record.tokens_sha256),
    ]
    if record.hit_rate is not None:
        rows.append(("hit rate", f"{100 * record.hit_rate:.1f} %"))
    if record.kl is not None:
        rows.append(("KL to dense", f"{record.kl:.4f}{_or_none(record.kl_stderr, ' ± {:.4f}')} nats per token"))
    if record.same_top1 is not None:
        rows.append(("same top-1", f"{record.same_top1:.2%}{_or_none(record.same_top1_stderr, ' ± {:.2%}')}"))
    rows.append(("time", f"{record.seconds:.1f} s"))
    if record.against is not None:
        other, change = record.against["record"], record.against["relative"]
        error = _or_none(record.against["relative_stderr"], " ± {:.2%}")
        rows.append((f"against {other['method']}", f"{other['perplexity']:.4f}; {change:+.2%}{error}"))
    rows += [("note", note) for note in record.notes]
    return _pairs(rows)


def _where(record: EvalRecord) -> str:
    if record.engine == "native":
        return f"{record.n_threads} threads, {record.isa}"
    return f"PyTorch, {record.device}, {record.dtype}"


def evals_table(rows: Sequence[Row]) -> str:
    """Perplexities side by side, one a row."""
    head = [
        "model",
        "on",
        "method",
        "density",
        "touched",
        "MLP MB/token",
        "perplexity",
        "±",
        "to dense",
        "±",
        "KL",
        "top-1",
    ]
    cells = [
        [
            row.model,
            row.engine,
            row.method,
            _or_none(row.density, "{:.2f}"),
            _or_none(row.touched, "{:.3f}"),
            _or_none(None if row.mlp_bytes_per_token is None else row.mlp_bytes_per_token / 1e6, "{:.1f}"),
            f"{row.perplexity:.3f}",
            _or_none(row.stderr, "{:.3f}"),
            _or_none(row.relative, "{:+.2%}"),
            _or_none(row.relative_stderr, "{:.2%}"),
            _or_none(row.kl, "{:.4f}"),
            _or_none(row.same_top1, "{:.2%}"),
        ]
        for row in rows
    ]
    return align([head, *cells], left=3)


def tasks_table(results: Sequence[dict[str, Any]]) -> str:
    """Answers to tasks, one task of one method a row."""
    rows = [["model", "method", "density", "task", "n", "acc", "±", "acc_norm", "±", "perplexity", "±"]]
    for result in results:
        for name, figures in result["tasks"].items():
            shares = [
                _or_none(figures.get(key), "{:.4f}") for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
            ]
            losses = [_or_none(figures.get(key), "{:.3f}") for key in ("perplexity", "perplexity_stderr")]
            own = [result["model"], result["method"], _or_none(result["density"], "{:.2f}"), name, str(figures["n"])]
            rows.append([*own, *shares, *losses])
    return align(rows, left=2)


def _column_label(way: dict[str, int]) -> str:
    """How the records of a region lie: one of a description's `units`."""
    if not way["base_record_bytes"]:
        return f"{way['record_bytes']:,} B"
    return (
        f"{way['record_bytes']:,} B + {way['base_record_bytes']:,} B base ({way['columns_per_unit']} in a unit of "
        f"{way['unit_bytes']:,} B)"
    )


def inspect_table(description: dict[str, Any], verified: bool) -> str:
    """A bundle's `describe()`."""
    model, source = description["model"], description["source"]
    shape = f"{model['n_layers']} layers, hidden {model['hidden_size']}, intermediate {model['intermediate_size']}"
    rows = [
        ("bundle", f"{description['path']} (version {description['version']}, {description['created_by']})"),
        ("model", f"{model['name']} ({model['architecture']}): {shape}, vocabulary {model['vocab_size']}"),
        ("source", f"{source['name']} ({source['kind']}, --bits {source['bits']})"),
    ]
    for tier, parts in description["bytes"].items():
        held = ", ".join(f"{name} {_size(n)}" for name, n in parts.items() if n)
        rows.append((tier, f"{_size(sum(parts.values()))}: {held}"))
    for kind, ways in description["units"].items():
        rows.append((f"{kind} column", " or ".join(map(_column_label, ways))))
    rows.append(("grids", "; ".join(f"{name} {' + '.join(labels)}" for name, labels in description["grids"].items())))
    if any(map(any, description["base_bits"].values())):
        split = (f"{name} {' or '.join(map(str, bits))}" for name, bits in description["base_bits"].items())
        rows.append(("base bits", "; ".join(split)))
    rows.append(("MLP", f"{description['bits_per_mlp_weight']:.2f} bits per weight, scales included"))
    rows.append(("checksums", "every byte read and right" if verified else "not read (--no-verify)"))
    return _pairs(rows)


# ------------------------------------------------------------------------------------------------ experiments


def experiments_table(listed: Sequence[Listed]) -> str:
    """Experiments: what each answers to, takes and needs, and how much of it there is of each model."""
    return "\n\n".join(_experiment(one) for one in listed)


def _experiment(one: Listed) -> str:
    e = one.experiment
    told = [f"answers to: {e.published}"] if e.published else []
    told.append(f"about {e.minutes:g} minutes a model{f' ({e.on})' if e.on else ''}")
    needs = [f"{extra} (not installed)" if extra in one.lacking else extra for extra in e.needs]
    told += [f"needs {', '.join(needs)}"] if needs else []
    width = max((len(model) for model in one.models), default=0)
    lines = [f"{e.name}: {e.title}", *(f"  {line}" for line in told)]
    for model, counts in one.models.items():
        states = [f"{counts[name]} {name}" for name in ("stale", "missing", "orphaned") if counts[name]]
        done = f"{counts['done']} of {counts['n']} done"
        lines.append(f"  {model.ljust(width)}  {', '.join([done, *states])}")
    return "\n".join(lines)


def reproduced_table(summaries: Sequence[Summary]) -> str:
    """What a run measured, an experiment and model a row."""
    rows = [["experiment", "model", "results", "cells", "measured", "kept", "stale", "failed", "seconds"]]
    for one in summaries:
        numbers = [one.wanted, one.measured, one.kept, one.stale, len(one.failed)]
        rows.append([one.experiment, one.model, str(one.path), *map(str, numbers), f"{one.seconds:.1f}"])
    return align(rows, left=3)


def checks_table(checks: Sequence[Check]) -> str:
    """What a check found, an experiment and model a row."""
    rows = [["experiment", "model", "checked", "the same", "otherwise", "failed", "no result"]]
    for one in checks:
        n_wrong, n_failed = len(one.differences), len(one.failed)
        counts = (one.checked, one.checked - n_wrong - n_failed, n_wrong, n_failed, one.missing)
        rows.append([one.experiment, one.model, *map(str, counts)])
    return align(rows, left=2)
