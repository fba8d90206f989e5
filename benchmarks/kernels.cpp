// Times one product kernel over random matrices and prints one JSON line; bench_kernels.py builds this and runs it.
//
//   bench_kernels kernel=gemv_block grid=Q4_0 isa=auto rows=14336 columns=4096 density=1 tokens=1 threads=1 mb=512
//                 seconds=0.3 passes=0
//
// `grid` is that of a GGUF type. As many matrices as fill `mb` MB (10^6 bytes, at least one matrix) are multiplied one
// after the other, which is a pass; `seconds` are the median pass of at least five, `passes` other than 0 just so many
// passes instead, for counting instructions of `bench_pass`. Bytes are those of the codes that a pass multiplies and of
// all scales.
//
// Threads share the work as the engine's do: rows, and over records an even team both halves of the columns.
#include "kernels.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "arena.hpp"
#include "stopwatch.hpp"
#include "thread_pool.hpp"

using namespace dipper;

namespace {

// ---------------------------------------------------------------------------------------------- what is measured

const std::map<std::string, Grid> kGrids{
    {"Q4_0", {Codes::kQ4, Scale::kF16, 32, 8, 1}},  {"Q4_1", {Codes::kQ4, Scale::kF16M, 32, 0, 1}},
    {"Q4_K", {Codes::kQ4, Scale::kU8M, 32, 0, 8}},  {"Q5_0", {Codes::kQ5, Scale::kF16, 32, 16, 1}},
    {"Q5_1", {Codes::kQ5, Scale::kF16M, 32, 0, 1}}, {"Q5_K", {Codes::kQ5, Scale::kU8M, 32, 0, 8}},
    {"Q6_K", {Codes::kQ6, Scale::kI8, 16, 32, 16}}, {"Q8_0", {Codes::kQ8, Scale::kF16, 32, 0, 1}},
    {"F16", {Codes::kF16, Scale::kNone, 32, 0, 1}}, {"BF16", {Codes::kBF16, Scale::kNone, 32, 0, 1}},
    {"F32", {Codes::kF32, Scale::kNone, 32, 0, 1}},
};

struct Case {
  std::string kernel = "gemv_block";
  std::string grid = "Q4_0";
  std::string isa = "auto";
  int32_t rows = 14336;
  int32_t columns = 4096;
  double density = 1.0;
  int32_t tokens = 1;
  int32_t threads = 1;
  double mb = 512;
  double seconds = 0.3;
  int32_t passes = 0;

  bool by_records() const { return kernel.ends_with("_block"); }
  bool is_gemm() const { return kernel.starts_with("gemm"); }
};

[[noreturn]] void refuse(const std::string& problem) { throw std::invalid_argument(problem); }

template <typename T>
void parse_number(const std::string& name, const std::string& text, T least, T most, T& out) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
  if (error != std::errc() || end != text.data() + text.size() || !(out >= least && out <= most))
    refuse(name + "=" + text + " is not a number in its range");
}

Case parse(int argc, char** argv) {
  constexpr int32_t kMost = 1 << 24;
  Case c;
  const std::map<std::string, std::function<void(const std::string&, const std::string&)>> setters{
      {"kernel", [&](const auto&, const auto& v) { c.kernel = v; }},
      {"grid", [&](const auto&, const auto& v) { c.grid = v; }},
      {"isa", [&](const auto&, const auto& v) { c.isa = v; }},
      {"rows", [&](const auto& n, const auto& v) { parse_number(n, v, 1, kMost, c.rows); }},
      {"columns", [&](const auto& n, const auto& v) { parse_number(n, v, 1, kMost, c.columns); }},
      {"density", [&](const auto& n, const auto& v) { parse_number(n, v, 1e-9, 1.0, c.density); }},
      {"tokens", [&](const auto& n, const auto& v) { parse_number(n, v, 1, kMost, c.tokens); }},
      {"threads", [&](const auto& n, const auto& v) { parse_number(n, v, 1, 1024, c.threads); }},
      {"mb", [&](const auto& n, const auto& v) { parse_number(n, v, 0.0, 1e6, c.mb); }},
      {"seconds", [&](const auto& n, const auto& v) { parse_number(n, v, 0.0, 1e3, c.seconds); }},
      {"passes", [&](const auto& n, const auto& v) { parse_number(n, v, 0, kMost, c.passes); }},
  };
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const size_t at = arg.find('=');
    const auto setter = setters.find(arg.substr(0, at));
    if (at == std::string::npos || setter == setters.end()) refuse("'" + arg + "' is no option: see kernels.cpp");
    setter->second(setter->first, arg.substr(at + 1));
  }
  constexpr const char* kKernels[] = {"gemv_block", "gemv_tiled", "gemm_block", "gemm_tiled"};
  if (std::ranges::find(kKernels, c.kernel) == std::end(kKernels)) refuse("kernel '" + c.kernel + "' is unknown");
  if (!kGrids.contains(c.grid)) refuse("grid '" + c.grid + "' is unknown");
  if (c.tokens != 1 && !c.is_gemm()) refuse(c.kernel + " multiplies one token");
  if (c.density != 1.0 && c.kernel != "gemv_block") refuse(c.kernel + " multiplies all columns");
  return c;
}

// ---------------------------------------------------------------------------------------------- weights and inputs

// Random bits; with `halves` small positive numbers when read as f16, bf16 or f32.
void fill(Arena& memory, bool halves, uint64_t seed) {
  std::mt19937_64 random(seed);
  for (size_t at = 0; at < memory.bytes(); at += sizeof(uint64_t)) {
    uint64_t bits = random();
    if (halves) bits = (bits & 0x03FF03FF03FF03FFull) | 0x2000200020002000ull;
    std::memcpy(memory.data() + at, &bits, std::min(sizeof bits, memory.bytes() - at));
  }
}

constexpr uint64_t aligned(uint64_t bytes) { return (bytes + 63) / 64 * 64; }

// `n` matrices of one shape: records of one matrix each, back to back, or codes by tiles; scales apart.
class Matrices {
 public:
  explicit Matrices(const Case& c) {
    shape_.grid = kGrids.at(c.grid);
    shape_.n_rows = padded_rows(c.rows);
    shape_.n_cols = c.columns;
    shape_.n_blocks = (c.columns + shape_.grid.group - 1) / shape_.grid.group;
    shape_.plane_offset[1] = shape_.column_bytes(0);
    by_records_ = c.by_records();
    code_bytes_ = uint64_t{shape_.column_bytes()} * static_cast<uint64_t>(c.columns);
    n_ = std::max(1, static_cast<int>(c.mb * 1e6 / static_cast<double>(code_bytes_ + scale_bytes())));
    codes_ = Arena(code_bytes_ * static_cast<uint64_t>(n_));
    scales_ = Arena(scale_stride() * static_cast<uint64_t>(n_));
    fill(codes_, is_float(shape_.grid.codes), 1);
    fill(scales_, true, 2);
  }

  int size() const { return n_; }
  const WeightView& shape() const { return shape_; }

  uint64_t scale_bytes() const { return 2 * (n_d() + n_dm()) + n_sub() + n_subm(); }

  WeightView operator[](int i) const {
    WeightView w = shape_;
    if (!by_records_) w.tiled = codes(i);
    uint8_t* at = scales_.data() + scale_stride() * static_cast<uint64_t>(i);
    w.d = reinterpret_cast<const uint16_t*>(at);
    w.dm = reinterpret_cast<const uint16_t*>(at += 2 * n_d());
    w.sub = at += 2 * n_dm();
    w.subm = at + n_sub();
    return w;
  }

  const uint8_t* record(int i, int32_t column) const {
    return codes(i) + uint64_t{shape_.column_bytes()} * static_cast<uint64_t>(column);
  }

 private:
  bool has(std::initializer_list<Scale> kinds) const {
    return std::ranges::find(kinds, shape_.grid.scale) != kinds.end();
  }
  uint64_t rows_of(int32_t n) const { return static_cast<uint64_t>(n) * static_cast<uint64_t>(shape_.n_rows); }
  uint64_t n_d() const {
    if (has({Scale::kNone})) return 0;
    return rows_of(shape_.grid.has_sub() ? shape_.n_super() : shape_.n_blocks);
  }
  uint64_t n_dm() const { return has({Scale::kF16M, Scale::kU8M}) ? n_d() : 0; }
  uint64_t n_sub() const { return shape_.grid.has_sub() ? rows_of(shape_.n_blocks) : 0; }
  uint64_t n_subm() const { return has({Scale::kU8M}) ? n_sub() : 0; }
  uint64_t scale_stride() const { return aligned(scale_bytes()); }
  const uint8_t* codes(int i) const { return codes_.data() + code_bytes_ * static_cast<uint64_t>(i); }

  WeightView shape_;
  bool by_records_ = false;
  uint64_t code_bytes_ = 0;
  int n_ = 0;
  Arena codes_, scales_;
};

struct Inputs {
  std::vector<float> x;  // [tokens, columns]
  std::vector<int16_t> q;
  std::vector<BlockInputs> blocks;
  int64_t stride;

  Inputs(const Kernels& kernels, const WeightView& w, int32_t n_tokens)
      : x(static_cast<size_t>(w.n_cols) * static_cast<size_t>(n_tokens)),
        q(static_cast<size_t>(padded_inputs(w.n_cols)) * static_cast<size_t>(n_tokens)),
        blocks(static_cast<size_t>(w.n_blocks) * static_cast<size_t>(n_tokens)),
        stride(padded_inputs(w.n_cols)) {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    for (float& v : x) v = normal(random);
    for (int64_t t = 0; t < n_tokens; ++t)
      quantise_blocks(kernels, x.data() + t * w.n_cols, w.n_cols, w.grid.group, q.data() + t * stride,
                      blocks.data() + t * w.n_blocks);
  }

  MatrixInputs view() const { return {x.data(), q.data(), stride, blocks.data()}; }
};

// The selected columns by block, as a token's mask gives them.
struct Selection {
  struct Span {
    int32_t block, first, n, first_q;
    BlockInputs inputs;
  };
  std::vector<int32_t> column;
  std::vector<float> x;
  std::vector<int16_t> q;
  std::vector<Span> spans;
  size_t n_first = 0;  // spans of the first half of the columns

  Selection(const Kernels& kernels, const WeightView& w, const Inputs& inputs, double density) {
    std::vector<int32_t> all(static_cast<size_t>(w.n_cols));
    std::iota(all.begin(), all.end(), 0);
    const auto n = std::max<int64_t>(1, std::llround(density * w.n_cols));
    std::ranges::sample(all, std::back_inserter(column), n, std::mt19937(4));  // ascending
    for (const int32_t c : column) x.push_back(inputs.x[static_cast<size_t>(c)]);
    q.resize(2 * column.size() + 2);
    int32_t first_q = 0;
    for (int32_t i = 0; i < static_cast<int32_t>(n);) {
      Span s{column[static_cast<size_t>(i)] / w.grid.group, i, 0, first_q, {}};
      while (i < n && column[static_cast<size_t>(i)] / w.grid.group == s.block) ++i;
      s.n = i - s.first;
      s.inputs = kernels.quantise(x.data() + s.first, s.n, q.data() + first_q);
      first_q += static_cast<int32_t>(padded_inputs(s.n));
      n_first += s.block * w.grid.group < split_column(w.n_cols);
      spans.push_back(s);
    }
  }
};

// ---------------------------------------------------------------------------------------------- products

class Bench {
 public:
  explicit Bench(const Case& c)
      : case_(c),
        kernels_(select_kernels(c.isa)),
        matrices_(c),
        inputs_(kernels_, matrices_.shape(), c.tokens),
        selection_(kernels_, matrices_.shape(), inputs_, c.density),
        pool_(c.threads) {
    const auto n_sums = static_cast<size_t>(matrices_.shape().n_rows) * static_cast<size_t>(c.tokens);
    for (std::vector<float>& y : sums_) y.resize(n_sums);
    for (int m = 0; m < matrices_.size() && c.by_records(); ++m) {
      for (const int32_t column : selection_.column) records_.push_back(matrices_.record(m, column));
    }
  }

  const char* isa() const { return kernels_.name; }
  int n_matrices() const { return matrices_.size(); }
  ThreadPool& pool() { return pool_; }
  double macs() const {
    return static_cast<double>(case_.rows) * static_cast<double>(selection_.column.size()) * case_.tokens *
           n_matrices();
  }
  double bytes() const {
    const double codes =
        static_cast<double>(matrices_.shape().column_bytes()) * static_cast<double>(selection_.column.size());
    return (codes + static_cast<double>(matrices_.scale_bytes())) * n_matrices();
  }

  void pass() {
    for (int m = 0; m < matrices_.size(); ++m) {
      const WeightView w = matrices_[m];
      pool_.run([&](int thread) {
        if (case_.kernel == "gemv_block") return gemv_block(w, m, thread);
        if (case_.kernel == "gemv_tiled") {
          const Share halves = share(w.n_halves(), thread, pool_.size());
          return kernels_.gemv_tiled(w, inputs_.view(), {0, w.n_blocks}, halves.first, halves.last, sums_[0].data());
        }
        const Share tiles = share(w.n_tiles(), thread, pool_.size());
        if (case_.kernel == "gemm_block") return gemm_block(w, m, tiles);
        kernels_.gemm_tiled(w, inputs_.view(), {0, w.n_blocks}, case_.tokens, tiles.first, tiles.last, sums_[0].data(),
                            w.n_rows);
      });
    }
  }

 private:
  const uint8_t* const* records(int matrix, int32_t first) const {
    return records_.data() + static_cast<size_t>(matrix) * selection_.column.size() + static_cast<size_t>(first);
  }

  void gemv_block(const WeightView& w, int matrix, int thread) {
    const int n_sides = pool_.size() % 2 == 0 ? 2 : 1;
    const int side = thread % n_sides;
    const Share halves = share(w.n_halves(), thread / n_sides, pool_.size() / n_sides);
    const std::vector<Selection::Span>& spans = selection_.spans;
    const size_t begin = side == 1 ? selection_.n_first : 0;
    const size_t end = n_sides == 2 && side == 0 ? selection_.n_first : spans.size();
    for (size_t i = begin; i < end; ++i) {
      const Selection::Span& s = spans[i];
      BlockColumns columns{s.block,
                           s.n,
                           records(matrix, s.first),
                           selection_.x.data() + s.first,
                           selection_.q.data() + s.first_q,
                           s.inputs,
                           nullptr,
                           0};
      if (i + 1 < end) {
        columns.next_record = records(matrix, spans[i + 1].first);
        columns.n_next = spans[i + 1].n;
      }
      kernels_.gemv_block(w, columns, halves.first, halves.last, sums_[side].data());
    }
  }

  void gemm_block(const WeightView& w, int matrix, Share tiles) {
    for (int32_t t = tiles.first; t < tiles.last;
         ++t) {  // as the engine: a tile's outputs stay in cache over the blocks
      for (const Selection::Span& s : selection_.spans) {
        const int32_t column = s.block * w.grid.group;
        const BlockTokens tokens{s.block,
                                 s.n,
                                 records(matrix, s.first),
                                 inputs_.x.data() + column,
                                 w.n_cols,
                                 inputs_.q.data() + column,
                                 inputs_.stride,
                                 inputs_.blocks.data() + s.block,
                                 w.n_blocks,
                                 case_.tokens};
        kernels_.gemm_block(w, tokens, t, t + 1, sums_[0].data(), w.n_rows);
      }
    }
  }

  Case case_;
  const Kernels& kernels_;
  Matrices matrices_;
  Inputs inputs_;
  Selection selection_;
  ThreadPool pool_;
  std::vector<const uint8_t*> records_;  // [matrices, selected columns]
  std::vector<float> sums_[2];           // [tokens, rows]; of the columns' halves
};

// What instructions are counted of: a name that tools find.
extern "C" [[gnu::noinline]] void bench_pass(Bench& bench) { bench.pass(); }

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

std::vector<double> run(const Case& c, Bench& bench) {
  constexpr size_t kLeast = 5;
  std::vector<double> seconds;
  const auto timed = [&] {
    const double start = now_s();
    bench_pass(bench);
    seconds.push_back(now_s() - start);
  };
  if (c.passes > 0) {
    while (seconds.size() < static_cast<size_t>(c.passes)) timed();
    return seconds;
  }
  bench_pass(bench);
  for (const double start = now_s(); seconds.size() < kLeast || now_s() - start < c.seconds;) timed();
  return seconds;
}

}  // namespace

int main(int argc, char** argv) try {
  const Case c = parse(argc, argv);
  Bench bench(c);
  const ThreadPool::PinnedCaller pinned(bench.pool());
  const std::vector<double> passes = run(c, bench);
  const double seconds = median(passes);
  std::printf(
      "{\"kernel\": \"%s\", \"grid\": \"%s\", \"isa\": \"%s\", \"rows\": %d, \"columns\": %d, \"density\": %g, "
      "\"tokens\": %d, \"threads\": %d, \"matrices\": %d, \"bytes\": %.0f, \"macs\": %.0f, \"passes\": %zu, "
      "\"seconds\": %.6g, \"gbps\": %.5g, \"gmacs\": %.5g}\n",
      c.kernel.c_str(), c.grid.c_str(), bench.isa(), c.rows, c.columns, c.density, c.tokens, c.threads,
      bench.n_matrices(), bench.bytes(), bench.macs(), passes.size(), seconds, 1e-9 * bench.bytes() / seconds,
      1e-9 * bench.macs() / seconds);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 1;
}
