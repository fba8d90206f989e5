// The streamed MLP: which columns a token uses, where their bytes come from, and the products.
//
// One region is a fetch (masks, cache, reads) followed by products over the fetched columns in ascending order. Weights
// are resident (all or some regions pinned), streamed whole through a ring, or cached by columns with misses read from
// flash. A split region's bases are resident where it is refined: every product then has all columns by their bases and
// some of them refined by residuals, which are cached by units, the misses read from flash.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "arena.hpp"
#include "column_cache.hpp"
#include "flash_reader.hpp"
#include "kernels.hpp"
#include "model.hpp"
#include "projection.hpp"
#include "selection.hpp"
#include "thread_pool.hpp"
#include "trace_writer.hpp"
#include "weight_stream.hpp"

namespace dipper {

// kSimulated: everything is pinned, and the caches are books only. Masks, counters and traces are kCached's, the
// products too, but nothing is read: what the reads would have been is counted.
enum class Residency { kResident, kStream, kCached, kSimulated };

// What a calibration adds to one pruned region; an empty vector: nothing of its kind.
struct RegionFit {
  std::vector<float> factor;   // [n_columns], positive: column j scores |x_j| * factor[j]
  std::vector<float> mean;     // [n_columns]: column j contributes (x_j - mean[j]) w_j when selected, ...
  std::vector<float> bias[2];  // [n_rows] by matrix: ... to a sum that starts here, at the matrix times `mean`

  uint64_t bytes() const { return sizeof(float) * (factor.size() + mean.size() + bias[0].size() + bias[1].size()); }
};

struct MlpOptions {
  Residency residency = Residency::kResident;
  bool prune = false;                                  // DIP, always kCached; dense otherwise
  std::vector<int32_t> k;                              // prune: columns kept, by region
  std::shared_ptr<const std::vector<RegionFit>> fits;  // prune: by region, or null
  float gamma = 1.0f;
  CachePolicy policy = CachePolicy::kLfu;
  float decay = 0.99f;
  std::vector<int32_t> capacity;  // kCached, kSimulated, refined regions: slots by region, a unit each
  std::vector<uint8_t> pinned;    // kStream: regions held in DRAM
  std::vector<uint8_t> refined;   // kStream: split regions of which the bases are held, residuals as tokens want them
  std::vector<int32_t> fetch;     // kStream: units that a token fetches, by refined region
  std::vector<float> run_cost;    // kStream: what starting a read costs there, in units' bytes
  int32_t stream_slots = 8;
  uint32_t stream_chunk_bytes = 1u << 20;

  bool refines(int32_t region) const {
    return residency == Residency::kStream && refined[static_cast<size_t>(region)] != 0;
  }
};

// Bytes that the MLP allocates, by what for.
struct MlpMemory {
  uint64_t calibration = 0;  // factors, means and biases
  uint64_t pinned = 0;       // whole regions
  uint64_t slots = 0;        // column caches
  uint64_t staging = 0;      // reads in flight: the ring, or the misses of a region
  uint64_t bookkeeping = 0;
};
MlpMemory plan_mlp_memory(const Model& model, const MlpOptions& options);
// What streaming once all that is not held reads from flash.
ReaderCounters stream_reads(const Model& model, const MlpOptions& options);

// Seconds of the calling thread by stage.
struct Ledger {
  double select = 0;  // masks, cache steps, read plans, admissions
  double submit = 0;  // handing reads to the kernel
  double wait = 0;    // for reads
  double gemv = 0;    // products of the MLP, its activation
  double attention = 0;
  double head = 0;
  double rest = 0;
};

struct MlpCounters {
  uint64_t selected = 0;  // columns, over tokens and regions
  uint64_t hits = 0;
  uint64_t misses = 0;
  uint64_t evictions = 0;
  uint64_t useful_bytes = 0;  // records that were read because they were wanted
  ReaderCounters simulated;   // kSimulated: reads not made
};

// How a block of tokens goes through the MLP.
struct BlockMasks {
  enum class Kind { kDense, kOwn, kForced } kind = Kind::kDense;
  bool touch_cache = false;         // kDense: warm the column caches with the masks the tokens would have had
  const int32_t* tokens = nullptr;  // [n_tokens] their ids, for the trace
  const uint8_t* input = nullptr;   // kForced: [n_tokens, hidden], nonzero = used; and [n_tokens, intermediate]
  const uint8_t* glu = nullptr;
};

class GluMlp {
 public:
  // Regions that are pinned for dense products are laid out by tiles, in `model` too.
  GluMlp(Model& model, const MlpOptions& options, const Kernels& kernels, ThreadPool& pool, Projector& projector,
         FlashReader& reader, int32_t block_tokens);

  ~GluMlp();
  GluMlp(const GluMlp&) = delete;
  GluMlp& operator=(const GluMlp&) = delete;

  // y [hidden padded] = MLP(x) of one token through its own masks and the caches.
  void step(int32_t layer, const float* x, float* y, Ledger& ledger);

  // The same for n_tokens of one layer, weights streamed once. x [n_tokens, hidden] is masked in place; y [n_tokens,
  // y_stride]. Layers must come in order 0..n-1 between begin_block and end_block.
  void begin_block();
  void forward(int32_t layer, float* x, int32_t n_tokens, const BlockMasks& masks, float* y, int64_t y_stride,
               Ledger& ledger);

  void clear_caches();
  // After an error in the middle of a token or block: reads are let finish, the stream ends, caches whose slots may lag
  // behind their books are emptied.
  void abandon();
  // Fills a cache with these units of a region, read from flash.
  void pin(int32_t region, const std::vector<int32_t>& units);
  const MlpCounters& counters() const { return counters_; }
  void reset_counters();
  void start_trace(std::unique_ptr<TraceWriter> trace) { trace_ = std::move(trace); }
  // FlashError if it could not all be written.
  void finish_trace() {
    if (const std::unique_ptr<TraceWriter> trace = std::move(trace_)) trace->finish();
  }
  // Sums the squares of all inputs of every column that come by in blocks, from now on.
  void start_energies();
  const std::vector<std::vector<double>>& energies() const { return energies_; }  // by region, [n_columns]
  // What traces call the next token, or the first of the next block.
  void set_token(uint32_t position, int32_t token) {
    position_ = position;
    token_ = token;
  }
  // kSimulated: other masks and caches, empty, from now on. ConfigError where a calibration is in use, or in another
  // mode.
  void configure(const std::vector<int32_t>& k, float gamma, CachePolicy policy, float decay,
                 const std::vector<int32_t>& capacity);
  static uint64_t scratch_bytes(const Model& model, int32_t block_tokens);

 private:
  // Columns at hand, ascending: listed, each with its record and the read that brings it (ticket 0: already there), or
  // all of [first, first + n) with their records back to back from `base` on and one ticket.
  struct Batch {
    int32_t n = 0;
    const float* x = nullptr;  // [n] their inputs; null where a block of tokens has its own

    std::vector<int32_t> index;
    std::vector<const uint8_t*> record;
    std::vector<uint64_t> ticket;
    std::vector<float> listed_x;

    const uint8_t* base = nullptr;  // null: listed
    int32_t first = 0;
    uint64_t stride = 0;
    uint64_t dense_ticket = 0;
    bool awaits = false;  // some read may not be done

    int32_t column(int32_t i) const { return base != nullptr ? first + i : index[static_cast<size_t>(i)]; }
    // Records [i, i + count); `room` is where those of a dense batch are put.
    const uint8_t* const* records(int32_t i, int32_t count, const uint8_t** room) const {
      if (base == nullptr) return record.data() + i;
      for (int32_t j = 0; j < count; ++j) room[j] = base + static_cast<uint64_t>(i + j) * stride;
      return room;
    }
  };
  struct Span {  // columns of one block of inputs within a batch
    int32_t block;
    int32_t first;
    int32_t n;
    uint64_t ticket;
  };
  struct Spans {
    std::vector<Span> list;
    size_t n_first = 0;  // of the region's first half
  };
  // A region's products by matrix: sums over its first half of columns, which start at the bias and end as the whole,
  // and over its second.
  struct Sums {
    float* first[2];
    float* second[2];
    int64_t stride;  // between tokens
    float* const* of(bool in_second) const { return in_second ? second : first; }
  };

  void fetch_cached(int32_t region, const float* values, Ledger& ledger);
  void fetch_residuals(int32_t region, const float* values, Ledger& ledger);
  void admit(int32_t region, Ledger& ledger);
  Sums input_sums() const { return {{gate_, up_}, {second_gate_, second_up_}, wide_}; }
  Sums glu_sums(float* y, int64_t y_stride) const { return {{y, nullptr}, {second_down_, nullptr}, y_stride}; }
  void step_region(int32_t region, const float* values, const Sums& sums, Ledger& ledger);
  void project(int32_t region, const float* x, int32_t n_tokens, bool masked, const Sums& sums, Ledger& ledger);
  void multiply(const Region& region, const Sums& sums, Ledger& ledger);
  void take_units(const Region& region, int32_t first, int32_t last, const uint8_t* units, const uint8_t* bases,
                  uint64_t ticket);
  void take_chunk(const Region& region, const WeightStream& stream, const uint8_t* bases);
  struct SplitBlock;
  SplitBlock split_block_at(const Region& region, int32_t block, int32_t group) const;
  void multiply_block_of(const WeightView& w, const MatrixInputs& in, int32_t block, const SplitBlock& at,
                         const SplitBlock& next, Share halves, float* sums) const;
  void multiply_split(const Region& region, const Sums& sums, Ledger& ledger);
  void step_split(int32_t region, const float* values, const Sums& sums, Ledger& ledger);
  void begin_token();
  WeightStream& of_token() { return token_stream_ ? *token_stream_ : *stream_; }
  void block_region(int32_t region, float* x, int32_t n_tokens, const BlockMasks& masks, const uint8_t* forced,
                    const Sums& sums, Ledger& ledger);
  void mask_block(int32_t region, float* x, int32_t n_tokens, const BlockMasks& masks, const uint8_t* forced);
  void multiply_block(const Region& region, const float* x, int32_t n_tokens, const Sums& sums, Ledger& ledger);
  void refine_block(int32_t region, const float* x, int32_t n_tokens, const BlockMasks& masks, const uint8_t* forced);
  void multiply_split_block(const Region& region, int32_t n_tokens, bool all_refined, const Sums& sums, Ledger& ledger);
  void split_block(int32_t region, const float* x, int32_t n_tokens, const BlockMasks& masks, const uint8_t* forced,
                   const Sums& sums, Ledger& ledger);
  void take_refined(const WeightView& w, const MatrixInputs& inputs, int32_t n_tokens);
  void add_halves(const Region& region, int32_t n_tokens, const Sums& sums);
  void activate(int32_t n_tokens);
  void add_energies(int32_t region, const float* x, int32_t n_tokens);
  void copy_streamed(int32_t region, const StreamChunk& chunk, const uint8_t* data);
  void make_spans(const Grid& grid, int32_t split, Spans& spans) const;
  bool wait_ticket(int thread, uint64_t ticket, Ledger& ledger);
  bool has_caches() const {
    return options_.residency == Residency::kCached || options_.residency == Residency::kSimulated;
  }
  void load_bases();
  void pin_first_units();
  void make_caches();
  // The reads for missing columns of a region -> plan_.
  void plan_misses(const Region& region, std::span<const int32_t> misses) {
    plan_records(region.offset, region.unit_bytes, misses, FlashReader::alignment(), miss_staging_, miss_offsets_,
                 plan_);
    if (options_.residency == Residency::kSimulated) {
      counters_.simulated.reads += plan_.ranges.size();
      counters_.simulated.bytes += plan_.staging_bytes;
    }
  }
  void trace(TraceWriter::Phase phase, uint32_t position, int32_t token, int32_t region, std::span<const int32_t> mask,
             const CacheStep& step, const float* scores);
  uint8_t* slot(int32_t region, int32_t slot) const {
    return slot_base_[static_cast<size_t>(region)] +
           static_cast<uint64_t>(slot) * model_.regions[static_cast<size_t>(region)].unit_bytes;
  }
  void load_pinned(Model& model);
  void tile_region(Region& region, uint8_t* to);
  // A part of a region's calibration, null where it has none.
  const float* fit(int32_t region, std::vector<float> RegionFit::*part) const {
    if (!options_.fits) return nullptr;
    const std::vector<float>& values = (*options_.fits)[static_cast<size_t>(region)].*part;
    return values.empty() ? nullptr : values.data();
  }
  const float* bias(int32_t region, size_t matrix, bool masked) const;
  void start_sums(int32_t region, bool masked, int32_t n_tokens, const Sums& sums) const;
  void take_dense(int32_t region, const uint8_t* base, int32_t first, int32_t last, uint64_t ticket, const float* x);

  const Model& model_;
  MlpOptions options_;
  const Kernels& kernels_;
  ThreadPool& pool_;
  Projector& projector_;
  FlashReader& reader_;

  Arena pinned_memory_;
  Arena slot_memory_;
  Arena staging_;
  uint8_t* miss_staging_ = nullptr;             // where misses are read to
  std::vector<const uint8_t*> region_base_;     // pinned regions whose records lie as on flash, else null
  std::vector<uint8_t*> slot_base_;             // by region, where there are slots
  std::vector<uint8_t*> base_memory_;           // refined regions: their bases, else null
  std::vector<ColumnCache> caches_;             // by region, of units
  std::unique_ptr<WeightStream> stream_;        // of a block of tokens: all that is not pinned
  std::unique_ptr<WeightStream> token_stream_;  // of a token, where that is less: what is not refined either

  Batch batch_;
  Spans spans_[2];  // for the first and, where its grid wants others, the second matrix
  ReadPlan plan_;
  SelectionScratch selection_;
  std::vector<int32_t> mask_;
  std::vector<uint64_t> miss_offsets_;
  std::vector<Admission> admissions_;
  std::vector<const uint8_t*> admitted_record_;
  Refinement refinement_;
  // Columns at hand of a split region: their bases, one after the other; where each unit lies (null: not used), and the
  // reads that bring units.
  struct SplitAtHand {
    int32_t first = 0;
    int32_t last = 0;
    const uint8_t* bases = nullptr;  // of column `first` on

    const uint8_t* base(const Region& region, int32_t column) const {
      return bases + static_cast<uint64_t>(column - first) * region.base_bytes;
    }
  } split_;
  std::vector<const uint8_t*> unit_data_;
  std::vector<uint64_t> unit_ticket_;
  std::vector<int32_t> block_masks_;  // [n_tokens, k]

  Arena scratch_;
  std::vector<uint8_t> refined_columns_;  // [n_tokens, n_columns]: 1 where a token's column is refined
  std::vector<int16_t> refined_q_;        // [n_tokens, padded_inputs(n_columns)]
  std::vector<int32_t> coarse_;           // [n_tokens, n_blocks]
  int32_t refined_group_ = 0;             // of the blocks that these are for; 0: not made
  float* gate_ = nullptr;                 // [block_tokens, I padded]
  float* up_ = nullptr;
  float* second_gate_ = nullptr;  // Sums::second
  float* second_up_ = nullptr;
  float* second_down_ = nullptr;  // [block_tokens, D padded]
  float* hidden_ = nullptr;       // act(gate) * up, [block_tokens, I]
  int64_t wide_ = 0;              // I padded

  std::vector<std::vector<double>> energies_;
  MlpCounters counters_;
  std::unique_ptr<TraceWriter> trace_;
  uint32_t position_ = 0;
  int32_t token_ = 0;
};

}  // namespace dipper
