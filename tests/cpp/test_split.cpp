// Products with split matrices: against the same matrix in one piece where every column is refined, else against the
// definition in integers; every instruction set, one token or many, whole or by half tiles, bit for bit.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "half.hpp"
#include "kernels.hpp"
#include "packed.hpp"

using namespace dipper;

namespace {

// Where the records of another matrix might lie before this one's planes.
constexpr uint32_t kBaseLead = 48, kResidualLead = 16;

int32_t n_bits(Codes codes) { return codes == Codes::kQ4 ? 4 : codes == Codes::kQ5 ? 5 : 6; }

// A field of `bits` bits of row `row` in a plane, by docs/bundle-format.md section 2: where its byte is, and its shift.
std::pair<size_t, int32_t> field_at(int32_t n_rows, int32_t bits, int32_t row) {
  const int32_t tile = row / kTileRows;
  const bool half = std::min(kTileRows, n_rows - tile * kTileRows) == kHalfTileRows;
  const int32_t lane = row % 16;
  const int32_t bit = row % kTileRows / 16 * bits;
  const int32_t lane_bytes = bits == 1 ? 1 : (half ? 4 : 8) * bits / 8;
  return {static_cast<size_t>(tile * plane_tile_bytes(bits, false) + lane * lane_bytes + bit / 8), bit % 8};
}

uint32_t plane_bytes(int32_t n_rows, int32_t bits) {
  return static_cast<uint32_t>(n_rows / kTileRows * plane_tile_bytes(bits, false) +
                               (n_rows % kTileRows ? plane_tile_bytes(bits, true) : 0));
}

// A matrix in one piece and split.
struct Split {
  Packed whole;
  WeightView view;            // split
  std::vector<int32_t> code;  // [column][row]
  std::vector<uint8_t> base_bytes, residual_bytes;
  std::vector<const uint8_t*> base, residual;  // by column
};

Planes planes_of(int32_t n_rows, int32_t bits, int32_t up, uint32_t lead, uint32_t& record_bytes) {
  Planes planes;
  record_bytes = lead;
  int32_t shift = up;
  for (const int32_t b : bits == 3 ? std::vector<int32_t>{2, 1} : std::vector<int32_t>{bits}) {
    planes.plane[planes.n++] = {b, shift, record_bytes};
    shift += b;
    record_bytes += plane_bytes(n_rows, b);
  }
  return planes;
}

Split split_matrix(const Grid& grid, int32_t rows, int32_t cols, int32_t base_bits, uint32_t seed) {
  Split s;
  s.whole = random_matrix(grid, rows, cols, seed);
  const WeightView& whole = s.whole.view;
  const int32_t n_rows = whole.n_rows;
  const int32_t bits = n_bits(grid.codes);
  s.view = whole;
  s.view.plane_offset[1] = 0;  // not used
  s.view.residual_bits = bits - base_bits;
  uint32_t base_record = 0, residual_record = 0;
  s.view.base = planes_of(n_rows, base_bits, bits - base_bits, kBaseLead, base_record);
  s.view.residual = planes_of(n_rows, bits - base_bits, 0, kResidualLead, residual_record);
  s.base_bytes.resize(static_cast<size_t>(cols) * base_record);
  s.residual_bytes.resize(static_cast<size_t>(cols) * residual_record);
  for (int32_t c = 0; c < cols; ++c) {
    uint8_t* base = s.base_bytes.data() + static_cast<size_t>(c) * base_record;
    uint8_t* residual = s.residual_bytes.data() + static_cast<size_t>(c) * residual_record;
    s.base.push_back(base);
    s.residual.push_back(residual);
    const uint8_t* record = s.whole.columns[static_cast<size_t>(c)];
    for (int32_t r = 0; r < n_rows; ++r) {
      const auto [low, low_shift] = field_at(n_rows, 4, r);
      int32_t code = record[low] >> low_shift & 15;
      if (bits > 4) {
        const auto [high, high_shift] = field_at(n_rows, bits - 4, r);
        code |= (record[whole.plane_offset[1] + high] >> high_shift & ((1 << (bits - 4)) - 1)) << 4;
      }
      s.code.push_back(code);
      for (const auto& [planes, to] : {std::pair{&s.view.base, base}, std::pair{&s.view.residual, residual}}) {
        for (int32_t p = 0; p < planes->n; ++p) {
          const Plane& plane = planes->plane[p];
          const auto [at, shift] = field_at(n_rows, plane.bits, r);
          to[plane.offset + at] |= static_cast<uint8_t>((code >> plane.shift & ((1 << plane.bits) - 1)) << shift);
        }
      }
    }
  }
  return s;
}

// The inputs of one token as integers, and which of the columns it has refined.
struct Token {
  std::vector<int16_t> q;  // [padded_inputs(cols)]
  std::vector<BlockInputs> blocks;
  std::vector<uint8_t> refined;

  int32_t coarse(int32_t first, int32_t last) const {
    int32_t sum = 0;
    for (auto c = static_cast<size_t>(first); c < static_cast<size_t>(last); ++c) sum += refined[c] ? 0 : q[c];
    return sum;
  }
};

// one_in: a column is refined with this chance; 0: none, 1: all.
Token random_token(const Grid& grid, int32_t cols, uint32_t one_in, uint32_t seed) {
  const std::vector<float> x = random_vector(static_cast<size_t>(cols), seed);
  std::mt19937 random(seed);
  Token t{std::vector<int16_t>(static_cast<size_t>(padded_inputs(cols))),
          std::vector<BlockInputs>(static_cast<size_t>((cols + grid.group - 1) / grid.group)),
          std::vector<uint8_t>(static_cast<size_t>(cols))};
  quantise_blocks(select_kernels("scalar"), x.data(), cols, grid.group, t.q.data(), t.blocks.data());
  for (uint8_t& r : t.refined) r = one_in != 0 && random() % one_in == 0;
  return t;
}

std::vector<float> start_of(int32_t n_rows) { return random_vector(static_cast<size_t>(n_rows), 99); }

// By the definition, in integers.
std::vector<float> defined(const Split& s, const Token& t) {
  const WeightView& w = s.view;
  const Grid& grid = w.grid;
  const int32_t r = w.residual_bits;
  std::vector<float> y = start_of(w.n_rows);
  for (int32_t b = 0; b < w.n_blocks; ++b) {
    const int32_t first = b * grid.group, last = std::min(w.n_cols, first + grid.group);
    const BlockInputs& in = t.blocks[static_cast<size_t>(b)];
    const int32_t middle = (((1 << r) - 1) * t.coarse(first, last)) >> 1;  // rounded down
    for (int32_t row = 0; row < w.n_rows; ++row) {
      int32_t sum = 0;
      for (int32_t c = first; c < last; ++c) {
        const auto column = static_cast<size_t>(c);
        const int32_t code = s.code[column * static_cast<size_t>(w.n_rows) + static_cast<size_t>(row)];
        sum += (code >> r << r) * t.q[column];
        if (t.refined[column]) sum += (code & ((1 << r) - 1)) * t.q[column];
      }
      sum += middle - grid.zero_point * in.sum;
      const auto at = [&](int32_t entry) {
        return static_cast<size_t>(entry) * static_cast<size_t>(w.n_rows) + static_cast<size_t>(row);
      };
      const size_t block = at(b), super = at(b / grid.super_blocks);
      float scale = half_to_float(w.d[grid.has_sub() ? super : block]);
      if (grid.scale == Scale::kI8) scale *= static_cast<float>(static_cast<int8_t>(w.sub[block]));
      if (grid.scale == Scale::kU8 || grid.scale == Scale::kU8M) scale *= static_cast<float>(w.sub[block]);
      float& out = y[static_cast<size_t>(row)];
      out = std::fma(scale, in.scale * static_cast<float>(sum), out);
      const float sum_x = in.scale * static_cast<float>(in.sum);
      if (grid.scale == Scale::kF16M) out = std::fma(half_to_float(w.dm[block]), sum_x, out);
      if (grid.scale == Scale::kU8M)
        out = std::fma(-half_to_float(w.dm[super]) * static_cast<float>(w.subm[block]), sum_x, out);
    }
  }
  return y;
}

std::vector<float> unsplit_gemv(const Kernels& k, const Split& s, const Token& t) {
  const WeightView& w = s.whole.view;
  std::vector<float> y = start_of(w.n_rows);
  for (int32_t b = 0; b < w.n_blocks; ++b) {
    const int32_t first = b * w.grid.group;
    const BlockColumns columns{b,
                               std::min(w.n_cols, first + w.grid.group) - first,
                               s.whole.columns.data() + first,
                               nullptr,
                               t.q.data() + first,
                               t.blocks[static_cast<size_t>(b)]};
    k.gemv_block(w, columns, 0, w.n_halves(), y.data());
  }
  return y;
}

// In shares that end at these half tiles, as threads take them; the next block's records are announced.
std::vector<float> split_gemv(const Kernels& k, const Split& s, const Token& t, const std::vector<int32_t>& ends) {
  const WeightView& w = s.view;
  std::vector<float> y = start_of(w.n_rows);
  for (int32_t b = 0; b < w.n_blocks; ++b) {
    const int32_t first = b * w.grid.group, last = std::min(w.n_cols, first + w.grid.group);
    std::vector<const uint8_t*> residual;
    std::vector<int16_t> q;
    for (auto c = static_cast<size_t>(first); c < static_cast<size_t>(last); ++c) {
      if (!t.refined[c]) continue;
      residual.push_back(s.residual[c]);
      q.push_back(t.q[c]);
    }
    const auto n = static_cast<int32_t>(q.size());
    if (n % 2 == 1) q.push_back(0);
    SplitColumns columns{b,
                         {last - first, s.base.data() + first, t.q.data() + first},
                         {n, residual.data(), q.data()},
                         t.blocks[static_cast<size_t>(b)],
                         t.coarse(first, last),
                         {}};
    if (last < w.n_cols)
      columns.next = {std::min(w.n_cols - last, w.grid.group), s.base.data() + last, t.q.data() + last};
    int32_t begin = 0;
    for (const int32_t end : ends) {
      k.gemv_split(w, columns, begin, end, y.data());
      begin = end;
    }
  }
  return y;
}

// [tokens][n_rows], in shares that end at these tiles.
std::vector<float> split_gemm(const Kernels& k, const Split& s, const std::vector<Token>& tokens, bool all_refined,
                              const std::vector<int32_t>& ends) {
  const WeightView& w = s.view;
  const auto stride = static_cast<size_t>(padded_inputs(w.n_cols));
  std::vector<float> y;
  std::vector<int16_t> q, refined;
  std::vector<BlockInputs> blocks;
  std::vector<int32_t> coarse;
  for (const Token& t : tokens) {
    const std::vector<float> start = start_of(w.n_rows);
    y.insert(y.end(), start.begin(), start.end());
    q.insert(q.end(), t.q.begin(), t.q.end());
    for (size_t c = 0; c < stride; ++c)
      refined.push_back(c < t.refined.size() && t.refined[c] ? t.q[c] : static_cast<int16_t>(0));
    blocks.insert(blocks.end(), t.blocks.begin(), t.blocks.end());
    for (int32_t b = 0; b < w.n_blocks; ++b)
      coarse.push_back(t.coarse(b * w.grid.group, std::min(w.n_cols, (b + 1) * w.grid.group)));
  }
  for (int32_t b = 0; b < w.n_blocks; ++b) {
    const int32_t first = b * w.grid.group;
    const SplitTokens columns{b,
                              std::min(w.n_cols, first + w.grid.group) - first,
                              s.base.data() + first,
                              s.residual.data() + first,
                              q.data() + first,
                              (all_refined ? q : refined).data() + first,
                              static_cast<int64_t>(stride),
                              blocks.data() + b,
                              all_refined ? nullptr : coarse.data() + b,
                              w.n_blocks,
                              static_cast<int32_t>(tokens.size())};
    int32_t begin = 0;
    for (const int32_t end : ends) {
      k.gemm_split(w, columns, begin, end, y.data(), w.n_rows);
      begin = end;
    }
  }
  return y;
}

std::vector<float> one_after_another(const Split& s, const std::vector<Token>& tokens) {
  std::vector<float> y;
  for (const Token& t : tokens) {
    const std::vector<float> one = split_gemv(select_kernels("scalar"), s, t, {s.view.n_halves()});
    y.insert(y.end(), one.begin(), one.end());
  }
  return y;
}

void check_products(const Split& s) {
  const WeightView& w = s.view;
  const Grid& grid = w.grid;
  std::vector<int32_t> every_half, every_tile;
  for (int32_t i = 1; i <= w.n_halves(); ++i) every_half.push_back(i);
  for (int32_t i = 1; i <= w.n_tiles(); ++i) every_tile.push_back(i);
  const std::vector<int32_t> halves{w.n_halves()}, tiles{w.n_tiles()};

  std::vector<Token> masked, whole;  // a register block of tokens, and a remainder
  for (uint32_t i = 0; i < 8; ++i) {
    masked.push_back(random_token(grid, w.n_cols, i % 4, 20 + i));  // none, all, half, a third of the columns
    whole.push_back(random_token(grid, w.n_cols, 1, 40 + i));
  }
  const std::vector<float> in_one_piece = unsplit_gemv(select_kernels("scalar"), s, whole[0]);
  CHECK(same_bits(defined(s, whole[0]), in_one_piece));
  const std::vector<float> many_masked = one_after_another(s, masked), many_whole = one_after_another(s, whole);
  std::vector<std::vector<float>> expected;
  for (size_t i = 0; i < 4; ++i) expected.push_back(defined(s, masked[i]));
  CHECK(!same_bits(expected[0], unsplit_gemv(select_kernels("scalar"), s, masked[0])));

  for (const std::string& isa : available_isas()) {
    const Kernels& k = select_kernels(isa);
    CHECK(same_bits(unsplit_gemv(k, s, whole[0]), in_one_piece));
    for (const std::vector<int32_t>& ends : {halves, every_half}) {
      CHECK(same_bits(split_gemv(k, s, whole[0], ends), in_one_piece));
      for (size_t i = 0; i < 4; ++i) CHECK(same_bits(split_gemv(k, s, masked[i], ends), expected[i]));
    }
    for (const std::vector<int32_t>& ends : {tiles, every_tile}) {
      CHECK(same_bits(split_gemm(k, s, masked, false, ends), many_masked));
      CHECK(same_bits(split_gemm(k, s, whole, false, ends), many_whole));  // masks that happen to hold all
      CHECK(same_bits(split_gemm(k, s, whole, true, ends), many_whole));
    }
  }
}

void test_products() {
  for (const Codes codes : {Codes::kQ4, Codes::kQ5, Codes::kQ6}) {
    const int32_t bits = n_bits(codes);
    for (const Scale scale : {Scale::kF16, Scale::kF16M, Scale::kU8, Scale::kI8, Scale::kU8M}) {
      for (const int32_t group : {16, 32}) {
        const bool has_offset = scale == Scale::kF16M || scale == Scale::kU8M;
        const Grid grid{codes, scale, group, has_offset ? 0 : 1 << (bits - 1), scale == Scale::kU8M ? 3 : 2};
        for (int32_t base_bits = std::max(1, bits - 4); base_bits <= std::min(4, bits - 1); ++base_bits) {
          const int failed = n_failed_checks();
          check_products(split_matrix(grid, 192, 64, base_bits, 7));  // a half tile at the end, whole blocks
          check_products(split_matrix(grid, 40, 33, base_bits, 8));   // half a tile alone, a lone column at the end
          check_products(split_matrix(grid, 256, 29, base_bits, 9));  // an odd rest
          if (n_failed_checks() != failed) {
            std::fprintf(stderr, "  codes of %d bits, scale %d, group %d, %d base bits\n", static_cast<int>(bits),
                         static_cast<int>(scale), static_cast<int>(group), static_cast<int>(base_bits));
          }
        }
      }
    }
  }
}

// The largest sums that there are: every code and input at an end of its range.
void test_extremes() {
  for (const Codes codes : {Codes::kQ4, Codes::kQ5, Codes::kQ6}) {
    const int32_t bits = n_bits(codes);
    const Grid grid{codes, Scale::kF16, 32, 1 << (bits - 1), 1};
    for (const int32_t base_bits : {bits - 1, bits - 3, bits - 4}) {
      if (base_bits < 1 || base_bits > 4) continue;
      Split s = split_matrix(grid, 192, 64, base_bits, 3);
      for (const uint8_t byte : {0, 255}) {
        std::fill(s.whole.records.begin(), s.whole.records.end(), byte);
        std::fill(s.base_bytes.begin(), s.base_bytes.end(), byte);
        std::fill(s.residual_bytes.begin(), s.residual_bytes.end(), byte);
        std::fill(s.code.begin(), s.code.end(), byte & ((1 << bits) - 1));
        for (const int16_t q : {-32767, 32767}) {
          for (const uint32_t one_in : {0u, 1u, 2u}) {
            Token t = random_token(grid, 64, one_in, 5);
            std::fill(t.q.begin(), t.q.end(), q);
            for (BlockInputs& in : t.blocks) in.sum = 32 * q;
            const std::vector<float> expected = defined(s, t);
            if (one_in == 1) CHECK(same_bits(unsplit_gemv(select_kernels("scalar"), s, t), expected));
            for (const std::string& isa : available_isas()) {
              const Kernels& k = select_kernels(isa);
              CHECK(same_bits(split_gemv(k, s, t, {3}), expected));
              CHECK(same_bits(split_gemm(k, s, {t}, false, {2}), expected));
            }
          }
        }
      }
    }
  }
}

// Shares of more tiles than a strip has, from the middle of a tile on.
void test_long_share() {
  const Split s = split_matrix({Codes::kQ5, Scale::kF16M, 32, 0, 1}, 200 * kTileRows, 64, 2, 11);
  const Token t = random_token(s.view.grid, 64, 2, 12);
  const std::vector<float> expected = defined(s, t);
  for (const std::string& isa : available_isas()) {
    const Kernels& k = select_kernels(isa);
    for (const std::vector<int32_t>& ends :
         std::vector<std::vector<int32_t>>{{400}, {100, 200, 300, 400}, {149, 400}, {1, 400}, {255, 257, 400}})
      CHECK(same_bits(split_gemv(k, s, t, ends), expected));
  }
}

// What is not a number stays none, and inputs of nothing give nothing.
void test_special_inputs() {
  const Grid grid{Codes::kQ4, Scale::kF16M, 32, 0, 1};
  const Split s = split_matrix(grid, 192, 32, 2, 4);
  Token t = random_token(grid, 32, 2, 6);
  std::fill(t.q.begin(), t.q.end(), int16_t{0});
  for (const std::string& isa : available_isas()) {
    const Kernels& k = select_kernels(isa);
    t.blocks[0] = {0.0f, 0};
    CHECK(same_bits(split_gemv(k, s, t, {3}), start_of(192)));
    t.blocks[0] = {std::nanf(""), 0};
    for (const float y : split_gemv(k, s, t, {3})) CHECK(std::isnan(y));
    for (const float y : split_gemm(k, s, {t}, false, {2})) CHECK(std::isnan(y));
  }
}

}  // namespace

int main() {
  test_products();
  test_extremes();
  test_long_share();
  test_special_inputs();
  return check_result();
}
