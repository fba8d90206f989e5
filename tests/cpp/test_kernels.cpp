// Every instruction set against the scalar reference, bit for bit, and the scalar reference against plain double sums.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <tuple>
#include <vector>

#include "check.hpp"
#include "errors.hpp"
#include "half.hpp"
#include "kernels.hpp"
#include "model.hpp"
#include "packed.hpp"
#include "projection.hpp"
#include "thread_pool.hpp"

using namespace dipper;

namespace {

// The same matrix as a resident one: tile by tile, scales [tile][block][row].
WeightView as_tiled(Packed& p, std::vector<uint16_t>& d, std::vector<uint16_t>& dm, std::vector<uint8_t>& sub,
                    std::vector<uint8_t>& subm) {
  WeightView w = p.view;
  const Codes codes = w.grid.codes;
  p.tiled.clear();
  for (int32_t t = 0; t < w.n_tiles(); ++t) {
    const int32_t rows = std::min(kTileRows, w.n_rows - t * kTileRows);
    const bool half = rows == kHalfTileRows;
    for (const uint8_t* column : p.columns) {
      for (int plane = 0; plane < 2; ++plane) {
        const uint8_t* from = column + (plane ? w.plane_offset[1] : 0) +
                              static_cast<size_t>(t) * static_cast<size_t>(plane_tile_bytes(codes, plane, false));
        p.tiled.insert(p.tiled.end(), from, from + plane_tile_bytes(codes, plane, half));
      }
    }
    const auto reorder = [&](const auto& from, auto& to, int32_t n_entries) {
      for (int32_t b = 0; b < n_entries; ++b) {
        const auto* at =
            from.data() + static_cast<size_t>(b) * static_cast<size_t>(w.n_rows) + static_cast<size_t>(t) * kTileRows;
        to.insert(to.end(), at, at + rows);
      }
    };
    const int32_t n_d = w.grid.has_sub() ? w.n_super() : w.n_blocks;
    reorder(p.d, d, n_d);
    reorder(p.dm, dm, n_d);
    reorder(p.sub, sub, w.n_blocks);
    reorder(p.subm, subm, w.n_blocks);
  }
  w.tiled = p.tiled.data();
  w.d = d.data();
  w.dm = dm.data();
  w.sub = sub.data();
  w.subm = subm.data();
  return w;
}

// y = W[:, used] x[used] by blocks; used empty: all columns.
std::vector<float> sparse_gemv(const Kernels& k, const Packed& p, const std::vector<float>& x,
                               const std::vector<uint8_t>& used) {
  const WeightView& w = p.view;
  std::vector<float> y(static_cast<size_t>(w.n_rows));
  for (int32_t b = 0; b < w.n_blocks; ++b) {
    std::vector<const uint8_t*> records;
    std::vector<float> values;
    for (int32_t c = b * w.grid.group; c < std::min(w.n_cols, (b + 1) * w.grid.group); ++c) {
      const auto i = static_cast<size_t>(c);
      if (!used.empty() && !used[i]) continue;
      records.push_back(p.columns[i]);
      values.push_back(x[i]);
    }
    if (records.empty()) continue;
    const auto n = static_cast<int32_t>(values.size());
    std::vector<int16_t> q(values.size() + 1);
    const BlockInputs inputs = k.quantise(values.data(), n, q.data());
    const BlockColumns columns{b, n, records.data(), values.data(), q.data(), inputs};
    // In two shares, as two threads take them: also inside a tile.
    const int32_t split = w.n_halves() / 2;
    k.gemv_block(w, columns, 0, split, y.data());
    k.gemv_block(w, columns, split, w.n_halves(), y.data());
  }
  return y;
}

const std::vector<Grid> kGrids{{Codes::kQ4, Scale::kF16, 32, 8, 1},    {Codes::kQ4, Scale::kF16M, 32, 0, 1},
                               {Codes::kQ4, Scale::kU8M, 32, 0, 8},    {Codes::kQ5, Scale::kF16, 32, 16, 1},
                               {Codes::kQ5, Scale::kF16M, 32, 0, 1},   {Codes::kQ5, Scale::kU8M, 32, 0, 8},
                               {Codes::kQ6, Scale::kI8, 16, 32, 16},   {Codes::kQ8, Scale::kF16, 32, 0, 1},
                               {Codes::kQ8, Scale::kU8, 32, 0, 2},     {Codes::kF16, Scale::kNone, 32, 0, 1},
                               {Codes::kBF16, Scale::kNone, 32, 0, 1}, {Codes::kF32, Scale::kNone, 32, 0, 1}};

void test_products(const Grid& grid, int32_t rows, int32_t cols) {
  Packed p = random_matrix(grid, rows, cols, 7);
  const std::vector<float> x = random_vector(static_cast<size_t>(cols), 11);
  std::mt19937 random(3);
  std::vector<uint8_t> used(static_cast<size_t>(cols));
  for (uint8_t& u : used) u = random() % 3 == 0;
  std::vector<float> masked = x;
  for (size_t i = 0; i < masked.size(); ++i) masked[i] = used[i] ? x[i] : 0.0f;

  const Kernels& reference = select_kernels("scalar");
  const std::vector<float> dense = sparse_gemv(reference, p, x, {});
  const std::vector<float> sparse = sparse_gemv(reference, p, x, used);
  CHECK(!same_bits(dense, sparse));

  std::vector<uint16_t> d, dm;
  std::vector<uint8_t> sub, subm;
  const WeightView tiled = as_tiled(p, d, dm, sub, subm);
  const int64_t stride = padded_inputs(cols);
  std::vector<int16_t> q(static_cast<size_t>(stride));
  std::vector<BlockInputs> blocks(static_cast<size_t>(tiled.n_blocks));
  quantise_blocks(reference, x.data(), cols, grid.group, q.data(), blocks.data());

  // The reference against double sums over dequantised rows and the inputs that the codes meet.
  std::vector<double> met(x.begin(), x.end());
  for (size_t c = 0; c < met.size() && !is_float(grid.codes); ++c)
    met[c] = static_cast<double>(blocks[c / static_cast<size_t>(grid.group)].scale) * q[c];
  std::vector<float> row(static_cast<size_t>(cols));
  for (int32_t r = 0; r < tiled.n_rows; ++r) {
    dequantise_row(tiled, r, row.data());
    double sum = 0.0, size = 0.0;
    for (size_t c = 0; c < row.size(); ++c) {
      sum += static_cast<double>(row[c]) * met[c];
      size += std::fabs(static_cast<double>(row[c]) * met[c]);
    }
    CHECK(std::fabs(sum - static_cast<double>(dense[static_cast<size_t>(r)])) <= 3e-6 * size + 1e-12);
  }

  for (const std::string& isa : available_isas()) {
    const Kernels& k = select_kernels(isa);
    CHECK(same_bits(sparse_gemv(k, p, x, {}), dense));
    CHECK(same_bits(sparse_gemv(k, p, x, used), sparse));
    CHECK(same_bits(sparse_gemv(k, p, masked, {}), sparse));  // skipping a column is multiplying it by zero
    std::vector<float> y(static_cast<size_t>(tiled.n_rows));
    const int32_t split = tiled.n_halves() / 2;
    const MatrixInputs one{x.data(), q.data(), stride, blocks.data()};
    const BlockRange all{0, tiled.n_blocks};
    k.gemv_tiled(tiled, one, {0, 1}, 0, split, y.data());
    k.gemv_tiled(tiled, one, {1, tiled.n_blocks}, 0, split, y.data());
    k.gemv_tiled(tiled, one, all, split, tiled.n_halves(), y.data());
    CHECK(same_bits(y, dense));

    constexpr int32_t kTokens = 8;  // one register block and a remainder
    std::vector<float> many;
    std::vector<int16_t> many_q(static_cast<size_t>(kTokens * stride));
    std::vector<BlockInputs> many_blocks(static_cast<size_t>(kTokens * tiled.n_blocks));
    for (int32_t t = 0; t < kTokens; ++t) {
      const std::vector<float>& source = t % 2 ? masked : x;
      many.insert(many.end(), source.begin(), source.end());
      quantise_blocks(k, source.data(), cols, grid.group, many_q.data() + t * stride,
                      many_blocks.data() + t * tiled.n_blocks);
    }
    std::vector<float> out(static_cast<size_t>(kTokens) * static_cast<size_t>(tiled.n_rows));
    k.gemm_tiled(tiled, {many.data(), many_q.data(), stride, many_blocks.data()}, all, kTokens, 0, tiled.n_tiles(),
                 out.data(), tiled.n_rows);
    std::vector<float> out_block(out.size());
    for (int32_t b = 0; b < tiled.n_blocks; ++b) {
      const int32_t first = b * grid.group;
      const BlockTokens tokens{b,
                               std::min(cols, first + grid.group) - first,
                               p.columns.data() + first,
                               many.data() + first,
                               cols,
                               many_q.data() + first,
                               stride,
                               many_blocks.data() + b,
                               tiled.n_blocks,
                               kTokens};
      k.gemm_block(p.view, tokens, 0, p.view.n_tiles(), out_block.data(), p.view.n_rows);
    }
    CHECK(same_bits(out, out_block));
    for (int32_t t = 0; t < kTokens; ++t) {
      const auto at = out.begin() + t * tiled.n_rows;
      CHECK(same_bits({at, at + tiled.n_rows}, t % 2 ? sparse : dense));
    }
  }
}

// Two halves of the columns add up to the same bits however threads share them, for one token and for many; a matrix
// may have fewer columns than a half.
void test_halves_of_columns() {
  for (const auto& [grid, rows, cols] : {std::tuple{Grid{Codes::kQ6, Scale::kI8, 16, 32, 16}, 64, 16},
                                         std::tuple{Grid{Codes::kQ6, Scale::kI8, 16, 32, 16}, 320, 80},
                                         std::tuple{Grid{Codes::kQ4, Scale::kF16M, 32, 0, 1}, 448, 160},
                                         std::tuple{Grid{Codes::kF16, Scale::kNone, 32, 0, 1}, 192, 96}}) {
    Packed p = random_matrix(grid, rows, cols, 13);
    std::vector<uint16_t> d, dm;
    std::vector<uint8_t> sub, subm;
    const WeightView w = as_tiled(p, d, dm, sub, subm);
    constexpr int32_t kTokens = 3;
    const std::vector<float> x = random_vector(static_cast<size_t>(kTokens * cols), 14);
    const std::vector<float> start = random_vector(static_cast<size_t>(rows), 15);
    const auto product = [&](int n_threads, int32_t n_tokens) {
      ThreadPool pool(n_threads);
      Projector projector(select_kernels("auto"), pool, cols, kTokens);
      std::vector<float> y(static_cast<size_t>(n_tokens * w.n_rows)), second(y.size());
      const Projection projection{w, start.data(), rows, y.data(), w.n_rows, second.data(), split_column(cols)};
      projector.take(x.data(), cols, n_tokens);
      projector.project({&projection, 1});
      return y;
    };
    const std::vector<float> one = product(1, 1);
    const std::vector<float> many = product(1, kTokens);
    CHECK(same_bits({many.begin(), many.begin() + w.n_rows}, one));
    for (const int n_threads : {2, 3, 4}) {
      CHECK(same_bits(product(n_threads, 1), one));
      CHECK(same_bits(product(n_threads, kTokens), many));
    }
    double largest = 0.0;
    for (int32_t c = 0; c < cols; ++c)
      largest = std::max(largest, std::fabs(static_cast<double>(x[static_cast<size_t>(c)])));
    std::vector<float> row(static_cast<size_t>(cols));
    for (int32_t r = 0; r < rows; ++r) {
      dequantise_row(w, r, row.data());
      double sum = start[static_cast<size_t>(r)], weights = 0.0, size = std::fabs(sum);
      for (size_t c = 0; c < row.size(); ++c) {
        sum += static_cast<double>(row[c]) * x[c];
        size += std::fabs(static_cast<double>(row[c]) * x[c]);
        weights += std::fabs(row[c]);
      }
      // Inputs are rounded to half a unit of the largest's 32767th part, sums to fp32.
      CHECK(std::fabs(sum - one[static_cast<size_t>(r)]) <= weights * largest / 65533.0 + 3e-6 * size);
    }
  }
}

// Shares of more tiles than a strip has, from the middle of a tile on, with sums that are kept between passes.
void test_long_share() {
  const Grid grid{Codes::kQ4, Scale::kF16, 32, 8, 1};
  const Packed p = random_matrix(grid, 200 * kTileRows, 32, 11);
  const std::vector<float> x = random_vector(32, 12);
  for (const std::string& isa : available_isas()) {
    const Kernels& k = select_kernels(isa);
    std::vector<int16_t> q(32);
    const BlockInputs inputs = k.quantise(x.data(), 32, q.data());
    const BlockColumns columns{0, 32, p.columns.data(), x.data(), q.data(), inputs};
    std::vector<float> even(static_cast<size_t>(p.view.n_rows)), odd(even.size());
    for (int32_t first = 0; first < 400; first += 100) k.gemv_block(p.view, columns, first, first + 100, even.data());
    k.gemv_block(p.view, columns, 0, 149, odd.data());
    k.gemv_block(p.view, columns, 149, 400, odd.data());
    CHECK(same_bits(odd, even));
    std::fill(odd.begin(), odd.end(), 0.0f);
    k.gemv_block(p.view, columns, 0, 1, odd.data());
    k.gemv_block(p.view, columns, 1, 400, odd.data());  // 129 tiles lie in 256 halves from here
    CHECK(same_bits(odd, even));
  }
}

void test_quantise() {
  for (const int32_t n : {1, 2, 15, 16, 17, 31, 32}) {
    const auto size = static_cast<size_t>(n);
    std::vector<float> x = random_vector(size, static_cast<uint32_t>(n));
    for (const float factor : {1.0f, 1e-20f, 1e20f}) {
      std::vector<float> scaled = x;
      for (float& v : scaled) v *= factor;
      float largest = 0.0f;
      for (const float v : scaled) largest = std::max(largest, std::fabs(v));
      std::vector<int16_t> expected(size + 1, -1);
      const BlockInputs inputs = select_kernels("scalar").quantise(scaled.data(), n, expected.data());
      int32_t sum = 0;
      for (size_t i = 0; i < size; ++i) {
        sum += expected[i];
        CHECK(std::fabs(static_cast<double>(inputs.scale) * expected[i] - static_cast<double>(scaled[i])) <=
              static_cast<double>(largest) / 65533.0);
      }
      CHECK(inputs.sum == sum);
      CHECK(expected[size] == (n % 2 ? 0 : -1));  // a pair is made whole, and nothing more is written
      for (const std::string& isa : available_isas()) {
        std::vector<int16_t> q(size + 1, -1);
        const BlockInputs again = select_kernels(isa).quantise(scaled.data(), n, q.data());
        CHECK(q == expected);
        CHECK(again.sum == inputs.sum && again.scale == inputs.scale);
      }
    }
    for (const std::string& isa : available_isas()) {
      const Kernels& k = select_kernels(isa);
      std::vector<int16_t> q(size + 1);
      const std::vector<float> nothing(size);
      CHECK(k.quantise(nothing.data(), n, q.data()).scale == 0.0f);
      for (const float bad : {std::nanf(""), -std::nanf(""), INFINITY, -INFINITY}) {
        std::vector<float> broken = x;
        broken[size / 2] = bad;
        const BlockInputs inputs = k.quantise(broken.data(), n, q.data());
        CHECK(std::isnan(inputs.scale) && inputs.sum == 0);
      }
    }
  }
}

void test_vectors() {
  const Kernels& reference = select_kernels("scalar");
  for (const int32_t n : {1, 8, 16, 63, 576}) {
    const auto size = static_cast<size_t>(n);
    const std::vector<float> a = random_vector(size, 1), b = random_vector(size, 2);
    std::vector<float> norm(size), silu(size), gelu(size);
    reference.rms_norm(a.data(), b.data(), n, 1e-5f, norm.data());
    reference.silu_mul(a.data(), b.data(), n, silu.data());
    reference.gelu_tanh_mul(a.data(), b.data(), n, gelu.data());
    double squares = 0.0, exponentials = 0.0;
    for (const float v : a) {
      squares += static_cast<double>(v) * v;
      exponentials += std::exp(static_cast<double>(v));
    }
    for (size_t i = 0; i < size; ++i) {
      const double g = a[i], u = b[i];
      const double inverse = 1.0 / std::sqrt(squares / n + 1e-5);
      const double tanh_part = std::tanh(std::sqrt(2.0 / M_PI) * (g + 0.044715 * g * g * g));
      CHECK(std::fabs(norm[i] - g * inverse * u) <= 2e-6 * std::fabs(g * inverse * u) + 1e-9);
      CHECK(std::fabs(silu[i] - g / (1.0 + std::exp(-g)) * u) <= 2e-6 * std::fabs(g * u) + 1e-9);
      CHECK(std::fabs(gelu[i] - 0.5 * g * (1.0 + tanh_part) * u) <= 2e-6 * std::fabs(g * u) + 1e-9);
    }
    CHECK(std::fabs(reference.log_sum_exp(a.data(), n) - std::log(exponentials)) <=
          1e-6 * (1.0 + std::fabs(std::log(exponentials))));
    for (const std::string& isa : available_isas()) {
      const Kernels& k = select_kernels(isa);
      std::vector<float> out(size);
      k.rms_norm(a.data(), b.data(), n, 1e-5f, out.data());
      CHECK(same_bits(out, norm));
      k.silu_mul(a.data(), b.data(), n, out.data());
      CHECK(same_bits(out, silu));
      k.gelu_tanh_mul(a.data(), b.data(), n, out.data());
      CHECK(same_bits(out, gelu));
      CHECK(k.log_sum_exp(a.data(), n) == reference.log_sum_exp(a.data(), n));
      std::vector<float> broken = a;  // a maximum takes the number where the other is NaN, or not: as the reference
      broken[size / 2] = std::nanf("");
      CHECK(k.log_sum_exp(broken.data(), n) == reference.log_sum_exp(broken.data(), n));
    }
  }
}

void test_activation_extremes() {
  const float gate[4] = {-1e4f, -90.0f, 90.0f, 1e4f};
  const float up[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  for (const std::string& isa : available_isas()) {
    float silu[4], gelu[4];
    select_kernels(isa).silu_mul(gate, up, 4, silu);
    select_kernels(isa).gelu_tanh_mul(gate, up, 4, gelu);
    for (int i = 0; i < 4; ++i) {
      const float expected = gate[i] > 0 ? gate[i] : 0.0f;
      CHECK(std::fabs(silu[i] - expected) < 1e-30f + 1e-6f * std::fabs(expected));
      CHECK(std::fabs(gelu[i] - expected) < 1e-3f + 1e-6f * std::fabs(expected));
    }
  }
}

// Keys and values as one instruction set keeps them.
struct KvMemory {
  std::vector<uint8_t> k, v;
  std::vector<float> k_scale, v_scale;
  KvHead head;

  KvMemory(const std::string& isa, KvCodes codes, int32_t dim, int32_t n, const std::vector<float>& keys,
           const std::vector<float>& values)
      : k(static_cast<size_t>(4 * dim * ((n + 15) / 16 * 16))), v(k.size()), k_scale(k.size()), v_scale(k.size()) {
    head = {codes, k.data(), v.data(), k_scale.data(), v_scale.data()};
    for (int32_t p = 0; p < n; ++p)
      select_kernels(isa).keep(keys.data() + p * dim, values.data() + p * dim, p, dim, head);
  }
};

// The first query against double sums; as many of them at once as there are, on every instruction set, as one by one.
void check_attention(KvCodes codes, int32_t dim, int32_t n, const std::vector<float>& q, const std::vector<float>& k,
                     const std::vector<float>& v) {
  constexpr int32_t kFirst = 5;
  const KvMemory reference("scalar", codes, dim, n, k, v);
  std::vector<float> scores(static_cast<size_t>(score_floats(n - kFirst)));
  const auto attended = [&](const std::string& isa, const KvHead& head, int32_t first_query, int32_t n_queries) {
    std::vector<float> out(static_cast<size_t>(n_queries * dim), NAN);
    select_kernels(isa).attend(q.data() + first_query * dim, n_queries, head, dim, kFirst, n, 0.125f, scores.data(),
                               out.data());
    return out;
  };
  const std::vector<float> out = attended("scalar", reference.head, 0, 1);
  std::vector<double> expected(static_cast<size_t>(dim));
  double total = 0.0;
  for (int32_t p = kFirst; p < n; ++p) {
    double s = 0.0;
    for (int32_t i = 0; i < dim; ++i)
      s += static_cast<double>(q[static_cast<size_t>(i)]) * k[static_cast<size_t>(p * dim + i)];
    const double e = std::exp(s * 0.125);
    total += e;
    for (int32_t i = 0; i < dim; ++i) expected[static_cast<size_t>(i)] += e * v[static_cast<size_t>(p * dim + i)];
  }
  const double allowed = codes == KvCodes::kF32 ? 3e-6 : codes == KvCodes::kF16 ? 1e-3 : 3e-2;  // of values about 1
  for (size_t i = 0; i < expected.size(); ++i) CHECK(std::fabs(out[i] - expected[i] / total) < allowed);
  for (const std::string& isa : available_isas()) {
    const KvMemory memory(isa, codes, dim, n, k, v);
    CHECK(memory.k == reference.k && memory.v == reference.v);
    CHECK(same_bits(memory.k_scale, reference.k_scale) && same_bits(memory.v_scale, reference.v_scale));
    std::vector<float> one_by_one;
    for (int32_t queries = 1; queries * dim <= static_cast<int32_t>(q.size()); ++queries) {
      const std::vector<float> alone = attended("scalar", reference.head, queries - 1, 1);
      one_by_one.insert(one_by_one.end(), alone.begin(), alone.end());
      CHECK(same_bits(attended(isa, memory.head, 0, queries), one_by_one));
    }
  }
}

void test_attention() {
  for (const int32_t dim : {8, 64, 80}) {
    constexpr int32_t kPositions = 101;  // blocks of 64 and of 16, and a rest
    constexpr int32_t kQueries = 2 * kMaxQueries + 1;
    const std::vector<float> q = random_vector(static_cast<size_t>(kQueries * dim), 4);
    const std::vector<float> k = random_vector(static_cast<size_t>(dim * kPositions), 5),
                             v = random_vector(static_cast<size_t>(dim * kPositions), 6);
    for (const KvCodes codes : {KvCodes::kF32, KvCodes::kF16, KvCodes::kI8})
      check_attention(codes, dim, kPositions, q, k, v);
  }
}

// Halves there and back, on every instruction set.
void test_halves() {
  for (const std::string& isa : available_isas()) {
    for (const float value : {0.0f, -0.0f, 1.0f, -65504.0f, 1e9f, -1e9f, 65520.0f, 6.1e-5f, 5.9e-8f, 2.9e-8f, 3.1e-8f,
                              1.00048828125f, 1.00146484375f, 3.14159f}) {
      const std::vector<float> x(16, value);
      const KvMemory memory(isa, KvCodes::kF16, 16, 1, x, x);
      uint16_t half;
      std::memcpy(&half, memory.v.data(), sizeof half);
      const float back = half_to_float(half);
      const float clamped = std::clamp(value, -65504.0f, 65504.0f);
      CHECK(std::fabs(back - clamped) <= std::max(std::fabs(clamped) * 0x1p-11f, 0x1p-25f));
      CHECK(std::signbit(back) == std::signbit(value));
    }
  }
}

// What is not finite does not become a number when it is kept in eight bits.
void test_nan_in_int8() {
  for (const std::string& isa : available_isas()) {
    for (const float value : {NAN, INFINITY}) {
      std::vector<float> x(16, 1.0f);
      x[3] = value;
      CHECK(std::isnan(KvMemory(isa, KvCodes::kI8, 16, 1, x, x).v_scale[0]));
    }
    const std::vector<float> tiny(16, 1e-37f);
    const KvMemory memory(isa, KvCodes::kI8, 16, 1, tiny, tiny);
    CHECK(memory.v_scale[0] == 0.0f && memory.v[0] == 0);
  }
}

void test_unknown_isa() {
  CHECK_THROWS(select_kernels("sse9"), ConfigError,
               "instruction set 'sse9' is not available on this CPU: choose auto or one of ");
}

}  // namespace

int main() {
  std::string isas;
  for (const std::string& isa : available_isas()) isas += " " + isa;
  std::printf("compared with scalar:%s\n", isas.c_str());
#if defined(__aarch64__)
  CHECK(available_isas().front() == "neon");
#endif
  for (const Grid& grid : kGrids) {
    test_products(grid, 192, 96);  // a half tile at the end, whole blocks
    test_products(grid, 128, 80);  // a partial block (or not, for groups of 16)
    test_products(grid, 40, 33);   // padded rows, a lone column in the last block
  }
  test_halves_of_columns();
  test_long_share();
  test_quantise();
  test_vectors();
  test_activation_extremes();
  test_attention();
  test_halves();
  test_nan_in_int8();
  test_unknown_isa();
  return check_result();
}
