"""Device profiles: those that ship, what reads take, files and their errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipper.device import Compute, Device, Dram, Energy, Flash, names
from dipper.errors import ConfigError

FLASH = Flash(gbps=2.0, cost_per_read_us=5.0, latency_us=80.0, queue_depth=32, alignment=4096)
# (reads, bytes of a read, microseconds): rows in no order.
TABLE = (
    (64, 4096, 400.0),
    (1, 4096, 90.0),
    (8, 4096, 110.0),
    (1, 65536, 130.0),
    (64, 65536, 2200.0),
    (8, 65536, 330.0),
)
MEASURED = dataclasses.replace(FLASH, table=TABLE)
TEXT = """
name = "mine"
title = "A machine"

[dram]
bytes = 8000000000
gbps = 40

[flash]
gbps = 2.0
cost_per_read_us = 5
latency_us = 80.0
queue_depth = 32
alignment = 4096

[compute]
gemv_gweights_per_s = 50.0
gemm_gmacs_per_s = 400.0
"""


def device(**changes: object) -> Device:
    parts = {
        "dram": Dram(bytes=8 * 10**9, gbps=40),
        "flash": FLASH,
        "compute": Compute(gemv_gweights_per_s=50.0, gemm_gmacs_per_s=400.0),
    }
    return Device(name="mine", title="A machine", **{**parts, **changes})  # type: ignore[arg-type]


# --- what ships


@pytest.mark.parametrize("name", names())
def test_every_figure_of_a_shipped_profile_has_a_source(name: str) -> None:
    found = Device.load(name)
    assert (found.name, bool(found.title)) == (name, True)
    given = {
        f"{part}.{key}"
        for part in ("dram", "flash", "compute", "energy")
        for key, value in dataclasses.asdict(getattr(found, part)).items()
        if value != {f.name: f.default for f in dataclasses.fields(getattr(found, part))}[key]
    }
    assert given <= set(found.sources)
    known = {f"{part}.{f.name}" for part in ("dram", "flash", "compute", "energy") for f in _fields(found, part)}
    assert set(found.sources) <= known  # no source of a figure that is not there
    assert all(len(text) > 10 for text in found.sources.values())


def _fields(found: Device, part: str) -> tuple[dataclasses.Field[object], ...]:
    return dataclasses.fields(getattr(found, part))


def test_the_names_are_the_files() -> None:
    import dipper

    files = Path(dipper.__file__).with_name("devices").glob("*.toml")
    assert names() == tuple(sorted(file.stem for file in files))
    assert {"paper-phone", "snapdragon-8-gen-3"} <= set(names())


# --- seconds


def test_a_batch_is_latency_then_costs_then_bytes() -> None:
    assert float(FLASH.batch_s(1, 4096)) == pytest.approx(80e-6 + 4096 / 2e9, rel=1e-12)
    assert float(FLASH.batch_s(100, 409_600)) == pytest.approx(80e-6 + 99 * 5e-6 + 409_600 / 2e9, rel=1e-12)
    found = FLASH.batch_s(np.array([[0, 1], [0, 3]]), np.array([[0, 10], [0, 30]]))
    assert found.shape == (2, 2)
    assert found[:, 0].tolist() == [0.0, 0.0]
    # A read costs at least its part of the queue, even where no latency is given.
    eager = dataclasses.replace(FLASH, latency_us=0.0)
    assert float(eager.batch_s(1, 0)) == pytest.approx(5e-6, rel=1e-12)


def test_nothing_read_takes_nothing() -> None:
    for flash in (FLASH, MEASURED, FLASH.flat, MEASURED.flat):
        assert float(flash.batch_s(0, 0)) == 0.0
        assert flash.batch_s(np.zeros(3, np.int64), np.zeros(3, np.int64)).tolist() == [0.0] * 3
        assert flash.sustained_s(0, 0) == 0.0


@pytest.mark.parametrize("row", TABLE)
def test_a_table_is_met_where_it_was_measured(row: tuple[float, float, float]) -> None:
    reads, bytes_each, us = row
    assert float(MEASURED.batch_s(reads, reads * bytes_each)) == pytest.approx(us * 1e-6, rel=1e-12)


def test_between_its_rows_a_table_is_linear_in_logarithms() -> None:
    # Halfway between 1 and 64 reads there are 8, which has rows of its own; between 8 and 64 lies 8 sqrt 8.
    middle = 8 * 8**0.5
    assert float(MEASURED.batch_s(middle, middle * 4096)) == pytest.approx((110e-6 * 400e-6) ** 0.5, rel=1e-12)
    assert float(MEASURED.batch_s(8, 8 * 16384)) == pytest.approx((110e-6 * 330e-6) ** 0.5, rel=1e-12)


def test_beyond_the_table_time_grows_in_proportion() -> None:
    assert float(MEASURED.batch_s(640, 640 * 65536)) == pytest.approx(22_000e-6, rel=1e-12)
    assert float(MEASURED.batch_s(64, 64 * 131072)) == pytest.approx(4400e-6, rel=1e-12)
    assert float(MEASURED.batch_s(128, 128 * 131072)) == pytest.approx(8800e-6, rel=1e-12)
    # Below it a read takes what the smallest did.
    assert float(MEASURED.batch_s(1, 512)) == pytest.approx(90e-6, rel=1e-12)


@given(
    reads=st.integers(1, 2000),
    bytes_each=st.integers(64, 10**6),
    more=st.integers(0, 500),
    larger=st.integers(0, 10**5),
    measured=st.booleans(),
)
def test_more_reads_or_bytes_take_no_less(reads: int, bytes_each: int, more: int, larger: int, measured: bool) -> None:
    flash = MEASURED if measured else FLASH
    base = float(flash.batch_s(reads, reads * bytes_each))
    assert base > 0
    assert float(flash.batch_s(reads + more, (reads + more) * bytes_each)) >= base * (1 - 1e-12)
    assert float(flash.batch_s(reads, reads * (bytes_each + larger))) >= base * (1 - 1e-12)


def test_flat_is_bandwidth_alone() -> None:
    for flash in (FLASH, MEASURED):
        assert float(flash.flat.batch_s(500, 10**7)) == pytest.approx(10**7 / 2e9, rel=1e-12)
        assert flash.flat.table == ()
    throttled = dataclasses.replace(FLASH, sustained_gbps=0.5, sustained_reads_per_s=1000.0)
    # Bursts keep their bandwidth; in the long run bytes are limited, the number of reads is not.
    assert float(throttled.flat.batch_s(500, 10**7)) == pytest.approx(10**7 / 2e9, rel=1e-12)
    assert throttled.flat.sustained_s(10**9, 10**9) == 2.0
    assert (throttled.flat.gbps, throttled.flat.sustained_gbps, throttled.flat.sustained_reads_per_s) == (
        2.0,
        0.5,
        None,
    )
    assert (throttled.flat.queue_depth, throttled.flat.alignment) == (32, 4096)


def test_limits_in_the_long_run() -> None:
    assert FLASH.sustained_s(10**6, 10**12) == 0.0
    limited = dataclasses.replace(FLASH, sustained_gbps=0.5, sustained_reads_per_s=1000.0)
    assert limited.sustained_s(100, 10**9) == 2.0
    assert limited.sustained_s(10_000, 10**9) == 10.0


# --- files


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    whole = device(
        flash=dataclasses.replace(MEASURED, sustained_gbps=0.5),
        compute=Compute(gemv_gweights_per_s=50.0, gemm_gmacs_per_s=400.0, copy_gbps=3.0, token_us=7.0),
        energy=Energy(dram_pj_per_byte=20.0),
        sources={"dram.gbps": 'measured with "stream"'},
    )
    for i, profile in enumerate((device(), whole, *map(Device.load, names()))):
        path = tmp_path / f"{i}.toml"
        profile.save(path)
        assert Device.load(path) == profile
        assert Device.load(str(path)) == profile
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(f"{i}.toml" for i in range(len(names()) + 2))


def test_a_profile_by_hand() -> None:
    assert Device.from_text(TEXT, "mine.toml") == device()


def test_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as e:
        Device.load("snapdragon-8-gen3")
    known = ", ".join(names())
    assert str(e.value) == (
        f"there is no device 'snapdragon-8-gen3'; did you mean snapdragon-8-gen-3? known are {known}"
    )
    with pytest.raises(ConfigError) as e:
        Device.load("qqq")
    assert str(e.value) == f"there is no device 'qqq'; it is no file either; known are {known}"
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError) as e:
        Device.load(tmp_path / "bytes.toml")
    assert str(e.value) == (
        f"{tmp_path}/bytes.toml is no text: give a device profile, as dipper doctor --profile writes"
    )


BAD_ROWS = "flash.table must have rows of reads, bytes of a read, microseconds: three positive numbers"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gbps = 40", "gbs = 40", "dram has no figure 'gbs'; did you mean gbps?"),
        ("gbps = 40", "zzz = 40", "dram has no figure 'zzz'; known are bytes, gbps"),
        ("[dram]", "[ram]", "the profile has no figure 'ram'; did you mean dram?"),
        ("[dram]\nbytes = 8000000000\ngbps = 40", "", "dram lacks bytes, gbps: a device needs it"),
        ('name = "mine"', 'name = "mine"\ntitel = "A"', "the profile has no figure 'titel'; did you mean title?"),
        ("gbps = 40", "gbps = 0", "dram.gbps is 0: a device has more than none of it; give a positive figure"),
        ("gbps = 2.0", "gbps = -1", "flash.gbps is -1: a device has more than none of it; give a positive figure"),
        ("gbps = 2.0", "gbps = inf", "flash.gbps is inf: figures lie between 1e-09 and 1e+18; correct it"),
        ("gbps = 2.0", "gbps = 1e-320", "flash.gbps is 1e-320: figures lie between 1e-09 and 1e+18; correct it"),
        ("gbps = 2.0", "gbps = nan", "flash.gbps is nan: a device has more than none of it; give a positive figure"),
        (
            "gemv_gweights_per_s = 50.0",
            "gemv_gweights_per_s = 0.0",
            "compute.gemv_gweights_per_s is 0.0: a device has more than none of it; give a positive figure",
        ),
        ("latency_us = 80.0", "latency_us = -80.0", "flash.latency_us is -80.0: give zero or a positive figure"),
        ("gbps = 40", "", "dram lacks gbps: a device needs it"),
        ("latency_us = 80.0\nqueue_depth = 32", "", "flash lacks latency_us, queue_depth: a device needs it"),
        ('name = "mine"', "", "the profile lacks name: a device needs it"),
        ("gbps = 40", 'gbps = "40"', "dram.gbps is '40': it must be a number"),
        ("gbps = 40", "gbps = true", "dram.gbps is True: it must be a number"),
        ("[dram]\nbytes = 8000000000\ngbps = 40", "dram = 3", None),
        ("alignment = 4096", "alignment = 3000", "flash.alignment is 3000: reads are aligned to a power of two"),
        (
            "alignment = 4096",
            "alignment = 4096\ntable = [[1, 4096, 90], [8, 4096, 91], [1, 8192, 95]]",
            "flash.table has 3 rows for 2 numbers of reads and 2 sizes: give each pair once, at least two of either",
        ),
        (
            "alignment = 4096",
            "alignment = 4096\ntable = [[1, 4096, 90], [1, 8192, 0], [2, 4096, 90], [2, 8192, 90]]",
            BAD_ROWS,
        ),
        (
            "alignment = 4096",
            "alignment = 4096\ntable = [[1, 4096]]",
            BAD_ROWS,
        ),
        ("alignment = 4096", "alignment = 4096\ntable = [[1, 4096, inf], [1, 8192, 9]]", BAD_ROWS),
        ("alignment = 4096", "alignment = 4096\ntable = [[1, 4096, nan], [1, 8192, 9]]", BAD_ROWS),
        ("alignment = 4096", "alignment = 4096\ntable = [1, 2, 3]", BAD_ROWS),
        ("alignment = 4096", 'alignment = 4096\ntable = "abc"', BAD_ROWS),
        ("alignment = 4096", "alignment = 4096\ntable = 3", BAD_ROWS),
        (
            "alignment = 4096",
            "alignment = 4096\ntable = [[1, 4096, 90], [1, 8192, 90]]",
            "flash.table has 2 rows for 1 numbers of reads and 2 sizes: give each pair once, at least two of either",
        ),
        (
            "alignment = 4096",
            "alignment = 4096\ntable = [[1, 4096, 90], [1, 8192, 90], [2, 4096, 90], [2, 4096, 91]]",
            "flash.table has 4 rows for 2 numbers of reads and 2 sizes: give each pair once, at least two of either",
        ),
        ("queue_depth = 32", "queue_depth = 32.5", "flash.queue_depth is 32.5: it must be a whole number"),
        ("alignment = 4096", "alignment = 4096.0", "flash.alignment is 4096.0: it must be a whole number"),
        ("bytes = 8000000000", "bytes = 8e9", "dram.bytes is 8000000000.0: it must be a whole number"),
        ('name = "mine"', "name = 3", "the profile.name is 3: it must be a text"),
        ('name = "mine"', 'name = "mine"\nsources = 3', "the profile.sources is 3: it must be a table of texts"),
        (
            'name = "mine"',
            'name = "mine"\nsources = {flash = 3}',
            "sources.flash is 3: say in words where the figure is from",
        ),
        (
            "gbps = 2.0",
            'gbps = 2.0\nsustained_gbps = "fast"',
            "flash.sustained_gbps is 'fast': it must be a number",
        ),
        (
            "gbps = 2.0",
            "gbps = 2.0\nsustained_reads_per_s = 0",
            "flash.sustained_reads_per_s is 0: a device has more than none of it; give a positive figure",
        ),
    ],
)
def test_bad_profiles(old: str, new: str, message: str | None) -> None:
    assert TEXT.count(old) == 1
    text = TEXT.replace(old, new)
    if message is None:
        text, message = "dram = 3\n" + TEXT.replace(old, ""), "dram is 3: it must be a table"
    with pytest.raises(ConfigError) as e:
        Device.from_text(text, "mine.toml")
    assert str(e.value) == f"mine.toml: {message}"


def test_what_is_no_toml() -> None:
    with pytest.raises(ConfigError) as e:
        Device.from_text("name = ", "mine.toml")
    assert str(e.value) == (
        "mine.toml is no TOML (Invalid value (at end of document)): correct it, or copy one of dipper's profiles"
    )
