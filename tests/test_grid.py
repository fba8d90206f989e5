"""Planes byte by byte, grids against their definition, quantisation against its promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dipper.grid import (
    CodedRows,
    Grid,
    base_weights,
    bf16_to_f32,
    can_split,
    dequantise,
    join_planes,
    pack_plane,
    pack_tiles,
    padded_rows,
    plane_bytes,
    quantise,
    quantised_grid,
    residual_squares,
    split_planes,
    tile_sizes,
    unpack_plane,
    unpack_tiles,
)

INTEGER_GRIDS = [
    Grid(codes="q4", zero_point=8, scale="f16"),
    Grid(codes="q4", scale="f16m"),
    Grid(codes="q5", zero_point=16, scale="f16"),
    Grid(codes="q5", scale="u8m", super_blocks=8),
    Grid(codes="q6", group=16, zero_point=32, scale="i8", super_blocks=16),
    Grid(codes="q6", group=16, scale="u8", super_blocks=4),
    Grid(codes="q8", scale="f16"),
]
FLOAT_GRIDS = [Grid(codes="f16"), Grid(codes="bf16"), Grid(codes="f32")]


def column(n_rows: int, code) -> np.ndarray:
    """One column whose row 16k + i holds code(k, i)."""
    return np.array([[code(r // 16 % 8, r % 16)] for r in range(n_rows)], np.uint8)


# --- planes, byte by byte


def test_four_bit_full_tile_bytes():
    packed = pack_plane(column(128, lambda k, i: (k + i) % 16), bits=4, shift=0)
    assert packed.tobytes().hex() == (
        "10325476" "21436587" "32547698" "436587a9" "547698ba" "6587a9cb" "7698badc" "87a9cbed"
        "98badcfe" "a9cbed0f" "badcfe10" "cbed0f21" "dcfe1032" "ed0f2143" "fe103254" "0f214365"
    )  # fmt: skip


def test_four_bit_half_tile_bytes():
    packed = pack_plane(column(64, lambda k, i: (k + i) % 16), bits=4, shift=0)
    assert packed.tobytes().hex() == "103221433254436554766587769887a998baa9cbbadccbeddcfeed0ffe100f21"


def test_two_bit_full_and_half_tile_bytes():
    codes = column(192, lambda k, i: 4 * 3 + (k + i) % 4)  # the low bits; the high ones must not leak in
    packed = pack_plane(codes, bits=2, shift=0)
    assert packed.tobytes().hex() == "e4e439394e4e9393" * 4 + "e4394e93" * 4


def test_two_bit_plane_takes_high_bits():
    packed = pack_plane(column(64, lambda k, i: ((k + i) % 4 << 4) | 15), bits=2, shift=4)
    assert packed.tobytes().hex() == "e4394e93" * 4


def test_one_bit_full_and_half_tile_bytes():
    codes = column(192, lambda k, i: 16 * (k == i % 8) + 15)
    packed = pack_plane(codes, bits=1, shift=4)
    assert packed.tobytes().hex() == "0102040810204080" * 2 + "0102040800000000" * 2


def test_eight_sixteen_and_thirty_two_bit_bytes():
    codes = np.zeros((64, 2), np.int8)
    codes[0], codes[63] = (1, -1), (-128, 127)
    packed = pack_plane(codes, bits=8, shift=0)
    assert packed[0].tobytes().hex() == "01" + "00" * 62 + "80"
    assert packed[1].tobytes().hex() == "ff" + "00" * 62 + "7f"
    assert pack_plane(np.full((1, 1), 1.5, np.float16), 16, 0).tobytes().hex() == "003e" + "0000" * 63
    assert pack_plane(np.full((1, 1), 0x3FC0, np.uint16), 16, 0).tobytes().hex() == "c03f" + "0000" * 63
    assert pack_plane(np.full((1, 1), 1.5, np.float32), 32, 0).tobytes().hex() == "0000c03f" + "00000000" * 63


def test_rows_are_padded_with_code_zero():
    packed = pack_plane(np.full((1, 1), 15, np.uint8), bits=4, shift=0)
    assert packed.tobytes().hex() == "0f" + "00" * 31


@pytest.mark.parametrize(
    ("n_rows", "sizes"), [(1, [64]), (64, [64]), (65, [128]), (128, [128]), (129, [128, 64]), (320, [128, 128, 64])]
)
def test_tiles(n_rows, sizes):
    assert tile_sizes(n_rows) == sizes
    assert padded_rows(n_rows) == sum(sizes)
    assert plane_bytes(n_rows, 4) == sum(sizes) // 2
    assert plane_bytes(n_rows, 1) == 16 * len(sizes)


def slow_plane(codes: np.ndarray, bits: int, shift: int) -> bytes:
    """Section 2 of the format, one field at a time."""
    out = b""
    for c in range(codes.shape[1]):
        row = 0
        for size in tile_sizes(len(codes)):
            n_fields = size // 16
            lane_bytes = max(n_fields * bits // 8, 1)
            for i in range(16):
                lane = 0
                for k in range(n_fields):
                    r = row + 16 * k + i
                    code = int(codes[r, c]) if r < len(codes) else 0
                    lane |= ((code >> shift) & ((1 << bits) - 1)) << (bits * k)
                out += lane.to_bytes(lane_bytes, "little")
            row += size
    return out


@settings(max_examples=40, deadline=None)
@given(
    n_rows=st.integers(1, 300),
    n_columns=st.integers(1, 5),
    plane=st.sampled_from([(4, 0), (1, 4), (2, 4), (2, 0), (1, 0)]),
    seed=st.integers(0, 1000),
)
def test_planes_equal_the_definition_and_come_back(n_rows, n_columns, plane, seed):
    bits, shift = plane
    codes = np.random.default_rng(seed).integers(0, 64, (n_rows, n_columns)).astype(np.uint8)
    packed = pack_plane(codes, bits, shift)
    assert packed.shape == (n_columns, plane_bytes(n_rows, bits))
    assert packed.tobytes() == slow_plane(codes, bits, shift)
    np.testing.assert_array_equal(unpack_plane(packed, bits, n_rows), (codes >> shift) & ((1 << bits) - 1))


def random_codes(grid: Grid, n_rows: int, n_columns: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if grid.is_float:
        values = rng.normal(size=(n_rows, n_columns)).astype(np.float32)
        return (
            (values.view(np.uint32) >> 16).astype(np.uint16) if grid.codes == "bf16" else values.astype(grid.code_dtype)
        )
    low, high = (-128, 128) if grid.codes == "q8" else (0, 1 << grid.bits)
    return rng.integers(low, high, (n_rows, n_columns)).astype(grid.code_dtype)


@settings(max_examples=60, deadline=None)
@given(
    grid=st.sampled_from(INTEGER_GRIDS + FLOAT_GRIDS), n_rows=st.integers(1, 400), n_columns=st.integers(1, 40),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_codes_round_trip_by_column_and_by_tile(grid, n_rows, n_columns, seed):
    codes = random_codes(grid, n_rows, n_columns, seed)
    planes = [pack_plane(codes, bits, shift) for bits, shift in grid.planes]
    back = join_planes(grid, planes, n_rows)
    assert back.dtype == grid.code_dtype
    np.testing.assert_array_equal(back, codes)
    np.testing.assert_array_equal(unpack_tiles(grid, pack_tiles(grid, codes), n_rows, n_columns), codes)


def test_resident_layout_is_by_tile_then_column_then_plane():
    grid = Grid(codes="q5", scale="f16")
    codes = random_codes(grid, 192, 3, 0)
    expected = b""
    for tile in (codes[:128], codes[128:]):
        for c in range(3):
            expected += slow_plane(tile[:, c : c + 1], 4, 0) + slow_plane(tile[:, c : c + 1], 1, 4)
    assert pack_tiles(grid, codes).tobytes() == expected


# --- base and residual

SPLITS = [
    ("q4", 1, ((2, 0), (1, 2)), ((1, 3),)),
    ("q4", 2, ((2, 0),), ((2, 2),)),
    ("q4", 3, ((1, 0),), ((2, 1), (1, 3))),
    ("q5", 1, ((4, 0),), ((1, 4),)),
    ("q5", 2, ((2, 0), (1, 2)), ((2, 3),)),
    ("q5", 3, ((2, 0),), ((2, 2), (1, 4))),
    ("q5", 4, ((1, 0),), ((4, 1),)),
    ("q6", 2, ((4, 0),), ((2, 4),)),
    ("q6", 3, ((2, 0), (1, 2)), ((2, 3), (1, 5))),
    ("q6", 4, ((2, 0),), ((4, 2),)),
]


@pytest.mark.parametrize(("codes", "base_bits", "residual", "base"), SPLITS)
def test_planes_of_base_and_residual(codes, base_bits, residual, base):
    assert can_split(codes, base_bits)
    assert split_planes(codes, base_bits) == (residual, base)


@pytest.mark.parametrize("codes", ["q4", "q5", "q6", "q8", "f16", "f32"])
def test_without_a_base_the_planes_are_the_grids(codes):
    grid = Grid(codes=codes, scale="none" if codes.startswith("f") else "f16")
    assert split_planes(codes, 0) == (grid.planes, ())
    assert not can_split(codes, 0)


@pytest.mark.parametrize(("codes", "base_bits"), [("q4", 4), ("q5", 5), ("q4", -1), ("q8", 2), ("f16", 2), ("bf16", 1)])
def test_impossible_splits_are_refused(codes, base_bits):
    assert not can_split(codes, base_bits)
    with pytest.raises(ValueError, match=f"^{codes} codes cannot be split with {base_bits} base bits$"):
        split_planes(codes, base_bits)


@pytest.mark.parametrize(("base_bits", "residual_bits"), [(1, 5), (5, 1)])
def test_a_part_of_five_bits_is_refused(base_bits, residual_bits):
    message = f"^q6 codes with {base_bits} base bits leave {residual_bits} residual bits, and a part has at most 4$"
    with pytest.raises(ValueError, match=message):
        split_planes("q6", base_bits)


@settings(max_examples=60, deadline=None)
@given(
    split=st.sampled_from(SPLITS), n_rows=st.integers(1, 300), n_columns=st.integers(1, 9), seed=st.integers(0, 1000)
)
def test_split_codes_come_back(split, n_rows, n_columns, seed):
    codes_name, base_bits, residual, base = split
    grid = Grid(codes=codes_name, scale="f16")
    codes = random_codes(grid, n_rows, n_columns, seed)
    places = residual + base
    planes = [pack_plane(codes, bits, shift) for bits, shift in places]
    np.testing.assert_array_equal(join_planes(grid, planes, n_rows, places), codes)
    r = grid.bits - base_bits
    fields = [unpack_plane(plane, bits, n_rows) << shift for plane, (bits, shift) in zip(planes, places, strict=True)]
    low, high = sum(fields[: len(residual)]), sum(fields[len(residual) :])
    np.testing.assert_array_equal(low, codes & ((1 << r) - 1))
    np.testing.assert_array_equal(high >> r, codes >> r)
    assert not (high & ((1 << r) - 1)).any()


@pytest.mark.parametrize("grid", [grid for grid in INTEGER_GRIDS if grid.codes != "q8"])
def test_residual_squares_equal_the_definition(grid):
    n_rows, n_inputs, base_bits = 7, 3 * grid.group * grid.super_blocks // 2 + 7, 2
    rng = np.random.default_rng(4)
    codes = random_codes(grid, n_rows, n_inputs, 4)
    scales = {
        name: (rng.normal(size=(n_rows, n)) if dtype.kind == "f" else rng.integers(0, 127, (n_rows, n))).astype(dtype)
        for name, dtype, n in grid.scale_arrays(n_inputs)
    }
    r = grid.bits - base_bits
    expected = np.zeros(n_inputs)
    for j in range(n_inputs):
        block = j // grid.group
        for i in range(n_rows):
            if "sub" in scales:
                s = float(scales["d"][i, block // grid.super_blocks]) * float(scales["sub"][i, block])
            else:
                s = float(scales["d"][i, block])
            expected[j] += (s * (int(codes[i, j]) % 2**r - (2**r - 1) / 2)) ** 2
    np.testing.assert_allclose(residual_squares(grid, CodedRows(codes, scales), base_bits), expected, rtol=1e-5)


@pytest.mark.parametrize("grid", [grid for grid in INTEGER_GRIDS if grid.codes != "q8"])
@pytest.mark.parametrize("base_bits", [2, 3])
def test_bases_are_the_weights_with_residuals_at_their_middle(grid, base_bits):
    n_rows, n_inputs = 5, 2 * grid.group + 3
    rng = np.random.default_rng(6)
    scales = {
        name: (rng.normal(size=(n_rows, n)) if dtype.kind == "f" else rng.integers(0, 127, (n_rows, n))).astype(dtype)
        for name, dtype, n in grid.scale_arrays(n_inputs)
    }
    codes = random_codes(grid, n_rows, n_inputs, 6)
    low = codes >> (grid.bits - base_bits) << (grid.bits - base_bits)
    high = low + (2 ** (grid.bits - base_bits) - 1)
    between = sum(dequantise(grid, CodedRows(ends.astype(np.uint8), scales)) for ends in (low, high)) / 2
    base = base_weights(grid, CodedRows(codes, scales), base_bits)
    np.testing.assert_allclose(base, between, rtol=1e-4, atol=1e-4)
    missing = dequantise(grid, CodedRows(codes, scales)).astype(np.float64) - base
    squares = residual_squares(grid, CodedRows(codes, scales), base_bits)
    np.testing.assert_allclose((missing**2).sum(0), squares, rtol=1e-3)


# --- grids


@pytest.mark.parametrize("grid", INTEGER_GRIDS)
def test_dequantise_equals_the_definition(grid):
    n_rows, n_inputs = 5, 3 * grid.group * grid.super_blocks // 2 + 7
    rng = np.random.default_rng(3)
    codes = random_codes(grid, n_rows, n_inputs, 3)
    scales = {}
    for name, dtype, n in grid.scale_arrays(n_inputs):
        low = -128 if dtype == np.int8 else 0
        scales[name] = (
            rng.normal(size=(n_rows, n)) if dtype.kind == "f" else rng.integers(low, 127, (n_rows, n))
        ).astype(dtype)
    weights = dequantise(grid, CodedRows(codes, scales))
    assert weights.dtype == np.float32
    f32 = np.float32
    blocks = np.arange(n_inputs) // grid.group
    supers = blocks // grid.super_blocks
    for r in range(n_rows):
        for j in range(n_inputs):
            if grid.scale in ("f16", "f16m"):
                scale = f32(scales["d"][r, blocks[j]])
                offset = f32(scales["m"][r, blocks[j]]) if grid.scale == "f16m" else f32(0)
            else:
                scale = f32(scales["d"][r, supers[j]]) * f32(scales["sub"][r, blocks[j]])
                offset = f32(0)
            if grid.scale == "u8m":
                offset = -(f32(scales["dm"][r, supers[j]]) * f32(scales["subm"][r, blocks[j]]))
            assert weights[r, j] == scale * (f32(codes[r, j]) - f32(grid.zero_point)) + offset


def test_bf16():
    assert bf16_to_f32(np.array([0x3F80, 0xC000, 0x0001], np.uint16)).tolist() == [1.0, -2.0, 2.0**-133]


def test_taking_rows_is_exact():
    rows = CodedRows(np.arange(6, dtype=np.uint8).reshape(3, 2), {"d": np.arange(3, dtype=np.float16)[:, None]})
    taken = rows.take(np.array([2, 0]))
    assert taken.codes.tolist() == [[4, 5], [0, 1]]
    assert taken.scales["d"].tolist() == [[2.0], [0.0]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codes": "q3"}, "codes is 'q3'"),
        ({"codes": "q4", "scale": "f8"}, "scale is 'f8'"),
        ({"codes": "q4"}, "do not go with scale 'none'"),
        ({"codes": "f16", "scale": "f16"}, "do not go with scale 'f16'"),
        ({"codes": "q4", "scale": "f16", "group": 0}, "group is 0, with codes 'q4' it is 16 or 32"),
        ({"codes": "q4", "scale": "f16", "group": 64}, "group is 64"),
        ({"codes": "f16", "group": 16}, "group is 16, with codes 'f16' it is 32"),
        ({"codes": "q4", "scale": "u8m", "super_blocks": 0}, "super_blocks is 0"),
        ({"codes": "q4", "scale": "f16", "zero_point": 300}, "zero_point is 300"),
    ],
)
def test_impossible_grids_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Grid(**fields)


# --- quantising


@pytest.mark.parametrize(("bits", "limit"), [(8, 3e-5), (4, 8e-3)])
def test_quantising_normal_weights(bits, limit):
    weights = np.random.default_rng(0).normal(0, 0.02, (256, 512)).astype(np.float32)
    grid, rows = quantise(weights, bits)
    assert grid == quantised_grid(bits, 512)
    error = ((dequantise(grid, rows) - weights) ** 2).sum() / (weights**2).sum()
    assert error < limit


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    n_rows=st.integers(1, 9),
    n_inputs=st.integers(1, 130),
    magnitude=st.sampled_from([0.02, 1.0, 300.0]),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
    seed=st.integers(0, 1000),
)
def test_quantising_stays_within_a_step(bits, n_rows, n_inputs, magnitude, shift, seed):
    weights = (np.random.default_rng(seed).normal(shift, 1, (n_rows, n_inputs)) * magnitude).astype(np.float32)
    grid, rows = quantise(weights, bits)
    assert rows.codes.shape == weights.shape
    assert {n: a.shape for n, a in rows.scales.items()} == {n: (n_rows, k) for n, _, k in grid.scale_arrays(n_inputs)}
    error = np.abs(dequantise(grid, rows) - weights).max()
    span = max(weights.max(), 0) - min(weights.min(), 0)
    assert error <= span / (15 if bits == 4 else 127)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantising_zeros_and_lone_outliers(bits):
    weights = np.zeros((3, 96), np.float32)
    weights[1, 40] = 7.0
    grid, rows = quantise(weights, bits)
    np.testing.assert_allclose(dequantise(grid, rows), weights, atol=0.01)
    assert not dequantise(grid, rows)[0].any()


def test_rows_do_not_depend_on_their_neighbours():
    weights = np.random.default_rng(1).normal(size=(40, 70)).astype(np.float32)
    whole = dequantise(*quantise(weights, 4))
    np.testing.assert_array_equal(dequantise(*quantise(weights[7:19], 4)), whole[7:19])


def test_quantising_beyond_sixteen_bits_is_refused():
    with pytest.raises(ValueError, match="beyond 16-bit scales"):
        quantise(np.full((1, 32), 1e6, np.float32), 8)
    with pytest.raises(ValueError, match="bits is 3"):
        quantise(np.ones((1, 32), np.float32), 3)
