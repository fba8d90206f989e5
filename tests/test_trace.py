"""Traces, format 2: frames of prompt and decode, token ids, scores or none, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from dipper.bundle import pack
from dipper.cache import reference_top_k
from dipper.engine import Engine, EngineConfig
from dipper.errors import ConfigError
from dipper.trace import Frame, read_trace

PROMPT, TEXT = [3, 14, 15, 9, 26], [5, 35, 8]
OPTIONS: dict[str, Any] = {"mlp_dram": "25b", "context": 16, "density": 0.5, "cache": "lru", "threads": 2}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    return pack(tiny.write_hf(folder / "hf", "llama"), folder / "llama.dipper", tokenizer=False)


def record(
    bundle: Path, path: Path, *, simulated: bool = False, advance: bool = False, **options: Any
) -> tuple[dict[str, Any], list[Frame], Any]:
    """A run's header, frames, and counters of the decoded tokens."""
    config = EngineConfig(**{**OPTIONS, **options}, trace=path)
    with Engine.open(bundle, config, simulated=simulated) as engine:
        engine.prefill(PROMPT)
        engine.reset_counters()
        if advance:
            engine.advance(TEXT)
        else:
            for token in TEXT:
                engine.step(token)
        counters = engine.counters()
    header, frames = read_trace(path)
    return header, list(frames), counters


def same(a: Frame, b: Frame, *, reads: bool = True) -> bool:
    names = ("mask", "hit", "scores") + (("reads",) if reads else ())
    plain = ("is_prompt", "position", "token", "region") + (("flash_bytes", "useful_bytes") if reads else ())
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names) and all(
        getattr(a, n) == getattr(b, n) for n in plain
    )


def test_prompt_frames_then_decoded_ones(bundle: Path, tmp_path: Path) -> None:
    header, frames, counters = record(bundle, tmp_path / "run.trace")
    regions = header["regions"]
    assert len(regions) == 6
    by_region = {r: [f for f in frames if f.region == r] for r in range(6)}
    assert len(frames) == 6 * (len(PROMPT) + len(TEXT))
    for r, found in by_region.items():
        assert [f.is_prompt for f in found] == [True] * len(PROMPT) + [False] * len(TEXT)
        assert [f.position for f in found] == list(range(len(PROMPT) + len(TEXT)))
        assert [f.token for f in found] == PROMPT + TEXT
        for f in found:
            assert len(f.mask) == regions[r]["k"]
            assert f.scores.shape == (regions[r]["n_columns"],)
            assert f.mask.tolist() == reference_top_k(f.scores, regions[r]["k"])
            assert not f.is_prompt or (len(f.reads), f.flash_bytes) == (0, 0)
    # What the prompt warmed is there; decoded frames have the counters.
    decoded = [f for f in frames if not f.is_prompt]
    assert decoded == frames[-len(decoded) :]
    assert [f.region for f in decoded] == list(range(6)) * len(TEXT)
    assert sum(int(f.hit.sum()) for f in decoded) == counters.hits > 0
    assert sum(int((~f.hit).sum()) for f in decoded) == counters.misses > 0
    assert sum(len(f.reads) for f in decoded) + len(TEXT) == counters.reads  # and an embedding row a token
    assert sum(f.useful_bytes for f in decoded) == sum(
        int((~f.hit).sum()) * regions[f.region]["record_bytes"] for f in decoded
    )


def test_a_trace_without_scores(bundle: Path, tmp_path: Path) -> None:
    _, with_scores, _ = record(bundle, tmp_path / "with.trace")
    _, without, _ = record(bundle, tmp_path / "without.trace", trace_scores=False)
    assert all(f.scores.size == 0 for f in without)
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(with_scores, without, strict=True))
    assert (tmp_path / "without.trace").stat().st_size < (tmp_path / "with.trace").stat().st_size / 2


def test_a_cold_run_has_no_prompt_frames(bundle: Path, tmp_path: Path) -> None:
    _, frames, _ = record(bundle, tmp_path / "cold.trace", cold=True)
    assert [f.position for f in frames if f.region == 0] == [5, 6, 7]
    assert not any(f.is_prompt for f in frames)


@pytest.mark.parametrize("gamma", [1.0, 0.4])
@pytest.mark.parametrize("advance", [False, True])
def test_a_simulated_engine_writes_the_same_masks(bundle: Path, tmp_path: Path, gamma: float, advance: bool) -> None:
    options = {"method": "dip-ca", "gamma": gamma}
    real, real_frames, real_counters = record(bundle, tmp_path / "real.trace", **options)
    header, frames, counters = record(bundle, tmp_path / "sim.trace", simulated=True, advance=advance, **options)
    assert header == real
    order = (
        sorted(frames, key=lambda f: (f.region, f.position)),
        sorted(real_frames, key=lambda f: (f.region, f.position)),
    )
    assert all(same(a, b, reads=False) for a, b in zip(*order, strict=True))
    assert (counters.hits, counters.misses, counters.evictions) == (
        real_counters.hits,
        real_counters.misses,
        real_counters.evictions,
    )


def test_configure_starts_a_trace_of_its_own(bundle: Path, tmp_path: Path) -> None:
    _, expected, _ = record(bundle, tmp_path / "alone.trace", simulated=True, density=0.7)
    first, second = tmp_path / "first.trace", tmp_path / "second.trace"
    with Engine.open(bundle, EngineConfig(**OPTIONS, trace=first), simulated=True) as engine:
        engine.prefill(PROMPT)
        engine.step(99)
        engine.configure(EngineConfig(**{**OPTIONS, "density": 0.7}, trace=second))
        assert first.exists()
        assert not second.exists()
        engine.prefill(PROMPT)
        for token in TEXT:
            engine.step(token)
        engine.finish_trace()
        assert second.exists()
        with pytest.raises(ConfigError) as e:
            engine.configure(EngineConfig(**{**OPTIONS, "context": 17}))
        assert str(e.value) == "the context is 16 and cannot become 17: open another engine"
    header, frames = read_trace(second)
    assert header["densities"] == [0.7, 0.7]
    assert all(same(a, b) for a, b in zip(frames, expected, strict=True))
    with pytest.raises(ConfigError) as e:
        Engine.open(bundle, EngineConfig(method="dense-stream", context=16), simulated=True)
    assert str(e.value) == "dense-stream has no masks and no caches to simulate: use dip, dip-ca or planes"


def test_what_is_no_trace(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.trace"
    record(bundle, path)
    data = path.read_bytes()
    other = tmp_path / "other.trace"
    other.write_bytes(data[:8] + struct.pack("<I", 3) + data[12:])
    with pytest.raises(ConfigError) as e:
        read_trace(other)
    assert str(e.value) == f"{other} has trace version 3, this dipper reads 2: upgrade dipper"
    other.write_bytes(data[:8] + struct.pack("<I", 1) + data[12:])
    with pytest.raises(ConfigError) as e:
        read_trace(other)
    assert str(e.value) == f"{other} has trace version 1, this dipper reads 2: record it again"
    other.write_bytes(b"DIPTRACX" + data[8:])
    with pytest.raises(ConfigError) as e:
        read_trace(other)
    assert str(e.value) == (
        f"{other} starts with b'DIPTRACX', not b'DIPTRACE': it is no trace; write one with dipper run --trace"
    )
    first = 16 + struct.unpack("<I", data[12:16])[0]
    for n_bytes in (first + 10, first + 60, len(data) - 1):  # in a frame's head, mask, and scores
        other.write_bytes(data[:n_bytes])
        with pytest.raises(ConfigError) as e:
            list(read_trace(other)[1])
        assert str(e.value) == f"{other} ends inside a frame: the trace is cut, record it again"


def test_a_trace_that_ends_in_its_header(bundle: Path, tmp_path: Path) -> None:
    path, cut = tmp_path / "run.trace", tmp_path / "cut.trace"
    record(bundle, path)
    data = path.read_bytes()
    end = 16 + struct.unpack("<I", data[12:16])[0]
    for n_bytes in (16, 17, 200, end - 1):
        cut.write_bytes(data[:n_bytes])
        with pytest.raises(ConfigError) as e:
            read_trace(cut)
        told = str(e.value)
        assert told.startswith(f"{cut} ends inside its header, or that is damaged (")
        assert told.endswith("): record it again")
    for n_bytes in (0, 7, 8, 15):
        cut.write_bytes(data[:n_bytes])
        with pytest.raises(ConfigError) as e:
            read_trace(cut)
        assert str(e.value) == (
            f"{cut} starts with {data[: min(n_bytes, 8)]!r}, not b'DIPTRACE': it is no trace; write one with dipper "
            "run --trace"
        )


def test_a_trace_that_is_refused_is_closed(bundle: Path, tmp_path: Path) -> None:
    path, cut = tmp_path / "run.trace", tmp_path / "cut.trace"
    record(bundle, path)
    data = path.read_bytes()

    def is_open() -> bool:
        return any(file.exists() and file.samefile(cut) for file in Path("/proc/self/fd").iterdir())

    for held in (data[:10], data[:200], data[:-1], b"DIPTRACX" + data[8:], data[:8] + b"\x09" + data[9:]):
        cut.write_bytes(held)
        with pytest.raises(ConfigError) as e:  # whose traceback may hold the frame that opened it
            list(read_trace(cut)[1])
        assert not is_open(), e.value
