#include "glu_mlp.hpp"

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>

#include "errors.hpp"
#include "stopwatch.hpp"

namespace dipper {

namespace {

constexpr uint32_t kAlign = FlashReader::alignment();
constexpr int32_t kSharedRows = 4096;  // a vector of as many is worth waking the threads for

uint64_t aligned(uint64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

std::vector<int32_t> all_regions(const Model& model) {
  std::vector<int32_t> regions(model.regions.size());
  for (size_t r = 0; r < regions.size(); ++r) regions[r] = static_cast<int32_t>(r);
  return regions;
}

bool refines_any(const MlpOptions& options) {
  return options.residency == Residency::kStream &&
         std::find(options.refined.begin(), options.refined.end(), 1) != options.refined.end();
}

// Regions that the stream of a block brings, in whole or by their units: those not pinned.
std::vector<int32_t> streamed_regions(const Model& model, const MlpOptions& options) {
  std::vector<int32_t> regions;
  for (const int32_t r : all_regions(model)) {
    const bool held = options.residency == Residency::kResident || options.residency == Residency::kSimulated ||
                      (options.residency == Residency::kStream && options.pinned[static_cast<size_t>(r)]);
    if (!held) regions.push_back(r);
  }
  return regions;
}
// Those that every token needs whole.
std::vector<int32_t> token_regions(const Model& model, const MlpOptions& options) {
  std::vector<int32_t> regions = streamed_regions(model, options);
  std::erase_if(regions, [&](int32_t r) { return options.refines(r); });
  return regions;
}

std::vector<StreamChunk> chunks_of(const Model& model, const std::vector<int32_t>& regions, const MlpOptions& options) {
  return make_chunks(model, regions, options.stream_chunk_bytes, options.refined);
}

}  // namespace

MlpMemory plan_mlp_memory(const Model& model, const MlpOptions& options) {
  MlpMemory memory;
  const std::vector<int32_t> streamed = streamed_regions(model, options);
  for (size_t r = 0; r < model.regions.size(); ++r) {
    const Region& region = model.regions[r];
    if (!std::binary_search(streamed.begin(), streamed.end(), static_cast<int32_t>(r)))
      memory.pinned += aligned(region.bytes());
    if (options.refines(static_cast<int32_t>(r))) {
      memory.pinned += aligned(region.bases_bytes());
      memory.slots += static_cast<uint64_t>(options.capacity[r]) * region.unit_bytes;
      memory.staging =
          std::max(memory.staging, max_run_bytes(static_cast<uint64_t>(options.fetch[r]), options.run_cost[r],
                                                 region.unit_bytes, region.units_bytes(), kAlign));
      memory.bookkeeping += ColumnCache::bytes(region.n_units(), options.capacity[r]);
    }
    if (options.residency == Residency::kCached) {
      memory.slots += static_cast<uint64_t>(options.capacity[r]) * region.unit_bytes;
      memory.staging = std::max(memory.staging, max_staging_bytes(static_cast<uint64_t>(options.k[r]),
                                                                  region.unit_bytes, region.bytes(), kAlign));
      memory.bookkeeping += ColumnCache::bytes(region.n_columns, options.capacity[r]);
    }
    if (options.fits) memory.calibration += (*options.fits)[r].bytes();
  }
  if (!streamed.empty()) {
    const uint32_t slot = ring_slot_bytes(chunks_of(model, streamed, options));
    const uint64_t ring = static_cast<uint64_t>(slot) * static_cast<uint64_t>(options.stream_slots);
    // Misses and ring are needed at once where a token both refines regions and streams others.
    const bool at_once = refines_any(options) && !token_regions(model, options).empty();
    memory.staging = at_once ? memory.staging + ring : std::max(memory.staging, ring);
  }
  return memory;
}

ReaderCounters stream_reads(const Model& model, const MlpOptions& options) {
  ReaderCounters c;
  for (const StreamChunk& chunk : chunks_of(model, streamed_regions(model, options), options)) {
    c.reads += n_reads(chunk);
    c.bytes += chunk.bytes();
  }
  return c;
}

uint64_t GluMlp::scratch_bytes(const Model& model, int32_t block_tokens) {
  const auto wide = static_cast<uint64_t>(padded_rows(model.intermediate));
  const auto columns = static_cast<uint64_t>(std::max(model.intermediate, model.hidden));
  const auto narrow = static_cast<uint64_t>(padded_rows(model.hidden));
  // A column at hand: its index, record, ticket, input, read plan and admission.
  constexpr uint64_t kBatchBytes = 100;
  uint64_t split = 0;
  for (const Region& region : model.regions) {
    if (region.split()) split = 4 * columns;  // flags, 16-bit inputs and sums by block of what is refined
  }
  // gate, up and down in halves, hidden; masks
  return kBatchBytes * columns +
         static_cast<uint64_t>(block_tokens) * ((5 * wide + narrow + columns) * sizeof(float) + split);
}

GluMlp::GluMlp(Model& model, const MlpOptions& options, const Kernels& kernels, ThreadPool& pool, Projector& projector,
               FlashReader& reader, int32_t block_tokens)
    : model_(model), options_(options), kernels_(kernels), pool_(pool), projector_(projector), reader_(reader) {
  const bool split = std::any_of(model.regions.begin(), model.regions.end(), [](const Region& r) { return r.split(); });
  if (split && (options.residency == Residency::kCached || options.residency == Residency::kSimulated)) {
    throw ConfigError(
        "the columns of this bundle are split in base and residual, and dip drops whole columns: pack with "
        "--base-bits 0, or use --method planes");
  }
  const MlpMemory memory = plan_mlp_memory(model, options);
  pinned_memory_ = Arena(memory.pinned);
  slot_memory_ = Arena(memory.slots);
  staging_ = Arena(memory.staging);
  miss_staging_ = staging_.data();
  wide_ = padded_rows(model.intermediate);
  const auto tokens = static_cast<uint64_t>(block_tokens);
  const uint64_t narrow = static_cast<uint64_t>(padded_rows(model.hidden));
  const uint64_t wide = static_cast<uint64_t>(wide_);
  scratch_ = Arena(tokens * (5 * wide + narrow) * sizeof(float));
  gate_ = scratch_.floats();
  up_ = gate_ + tokens * wide;
  second_gate_ = up_ + tokens * wide;
  second_up_ = second_gate_ + tokens * wide;
  hidden_ = second_up_ + tokens * wide;
  second_down_ = hidden_ + tokens * wide;

  const std::vector<int32_t> streamed = streamed_regions(model, options);
  region_base_.assign(model.regions.size(), nullptr);
  base_memory_.assign(model.regions.size(), nullptr);
  slot_base_.assign(model.regions.size(), nullptr);
  uint8_t* pinned = pinned_memory_.data();
  uint8_t* slots = slot_memory_.data();
  for (size_t r = 0; r < model.regions.size(); ++r) {
    const Region& region = model.regions[r];
    if (!std::binary_search(streamed.begin(), streamed.end(), static_cast<int32_t>(r))) {
      region_base_[r] = pinned;
      pinned += aligned(region.bytes());
    }
    if (options_.refines(static_cast<int32_t>(r))) {
      base_memory_[r] = pinned;
      pinned += aligned(region.bases_bytes());
    }
    if (options.residency == Residency::kCached || options_.refines(static_cast<int32_t>(r))) {
      slot_base_[r] = slots;
      slots += static_cast<uint64_t>(options.capacity[r]) * region.unit_bytes;
    }
  }
  make_caches();
  if (!streamed.empty()) {
    std::vector<StreamChunk> chunks = chunks_of(model, streamed, options);
    const uint32_t slot = ring_slot_bytes(chunks);
    stream_ = std::make_unique<WeightStream>(reader, std::move(chunks), staging_.data(), slot, options.stream_slots);
    const std::vector<int32_t> by_token = token_regions(model, options);
    if (refines_any(options) && !by_token.empty()) {
      miss_staging_ += static_cast<uint64_t>(slot) * static_cast<uint64_t>(options.stream_slots);
      token_stream_ = std::make_unique<WeightStream>(reader, chunks_of(model, by_token, options), staging_.data(), slot,
                                                     options.stream_slots);
    }
  }
  load_pinned(model);
  load_bases();
  pin_first_units();
}

void GluMlp::make_caches() {
  caches_.clear();
  if (!has_caches() && !refines_any(options_)) return;
  for (size_t r = 0; r < model_.regions.size(); ++r)
    caches_.emplace_back(model_.regions[r].n_units(), options_.capacity[r], options_.policy, options_.decay);
}

void GluMlp::configure(const std::vector<int32_t>& k, float gamma, CachePolicy policy, float decay,
                       const std::vector<int32_t>& capacity) {
  if (options_.residency != Residency::kSimulated || options_.fits) {
    throw ConfigError("only a simulated engine without calibration changes its masks and caches: open another one");
  }
  if (k.size() != model_.regions.size() || capacity.size() != model_.regions.size()) {
    throw ConfigError("k for " + std::to_string(k.size()) + " regions and capacities for " +
                      std::to_string(capacity.size()) + ": the model has " + std::to_string(model_.regions.size()));
  }
  options_.k = k;
  options_.gamma = gamma;
  options_.policy = policy;
  options_.decay = decay;
  options_.capacity = capacity;
  make_caches();
  reset_counters();
}

GluMlp::~GluMlp() {
  try {
    reader_.wait_all();  // nothing may still be written into memory that goes now
  } catch (const FlashError&) {
    // A failed reader has drained what it had in flight.
  }
}

void GluMlp::abandon() {
  try {
    reader_.wait_all();
  } catch (const FlashError&) {
    // The error under way tells what happened; a failed reader refuses further work by itself.
  }
  if (stream_) stream_->abandon();
  if (token_stream_) token_stream_->abandon();
  for (ColumnCache& cache : caches_) cache.clear();
}

namespace {

// Reads of a span of the file, 1 MiB each.
void add_ranges(uint64_t offset, uint64_t bytes, uint8_t* to, std::vector<ReadRange>& ranges) {
  for (uint64_t at = 0; at < bytes; at += 1u << 20)
    ranges.push_back({offset + at, static_cast<uint32_t>(std::min<uint64_t>(1u << 20, bytes - at)), to + at});
}

}  // namespace

void GluMlp::load_pinned(Model& model) {
  if (options_.residency != Residency::kSimulated) {  // all of a region's columns are used
    for (size_t r = 0; r < model.regions.size(); ++r) {
      if (region_base_[r] == nullptr || model.regions[r].split()) continue;
      tile_region(model.regions[r],
                  const_cast<uint8_t*>(region_base_[r]));  // in pinned_memory_, which this object owns
      region_base_[r] = nullptr;
    }
  }
  std::vector<ReadRange> ranges;
  for (size_t r = 0; r < model.regions.size(); ++r) {
    if (region_base_[r] == nullptr) continue;
    add_ranges(model.regions[r].offset, aligned(model.regions[r].bytes()), const_cast<uint8_t*>(region_base_[r]),
               ranges);
  }
  if (!ranges.empty()) reader_.wait(reader_.submit(ranges) + ranges.size());
}

void GluMlp::load_bases() {
  std::vector<ReadRange> ranges;
  for (size_t r = 0; r < model_.regions.size(); ++r) {
    const Region& region = model_.regions[r];
    if (base_memory_[r] != nullptr)
      add_ranges(region.base_offset, aligned(region.bases_bytes()), base_memory_[r], ranges);
  }
  if (!ranges.empty()) reader_.wait(reader_.submit(ranges) + ranges.size());
}

// What refined regions hold at first: in the order that a calibration gave the units, the hottest.
void GluMlp::pin_first_units() {
  for (size_t r = 0; r < model_.regions.size(); ++r) {
    if (!options_.refines(static_cast<int32_t>(r))) continue;
    std::vector<int32_t> first(static_cast<size_t>(options_.capacity[r]));
    std::iota(first.begin(), first.end(), 0);
    pin(static_cast<int32_t>(r), first);
  }
}

namespace {

// [n_entries][n_rows] -> by tile, then entry, as resident matrices have their scales.
template <typename T>
void tile_scales(const T* scales, int32_t n_entries, int32_t n_rows) {
  if (scales == nullptr) return;
  const std::vector<T> rows(scales, scales + static_cast<int64_t>(n_entries) * n_rows);
  T* to = const_cast<T*>(scales);  // in Model::resident
  for (int32_t first = 0; first < n_rows; first += kTileRows) {
    const int32_t n = std::min(kTileRows, n_rows - first);
    for (int32_t e = 0; e < n_entries; ++e)
      to = std::copy_n(rows.data() + static_cast<int64_t>(e) * n_rows + first, n, to);
  }
}

}  // namespace

// A region whose columns are all used lies by tiles, as resident matrices do: one sequential stream, where records give
// as many as there are columns in a block. Its scales follow.
void GluMlp::tile_region(Region& region, uint8_t* to) {
  constexpr uint32_t kChunkBytes = 4u << 20;
  std::vector<uint8_t*> base;
  for (WeightView& w : region.matrices) {
    w.tiled = to;
    base.push_back(to);
    to += static_cast<uint64_t>(region.n_columns) * w.column_bytes();
  }
  const auto index = static_cast<int32_t>(&region - model_.regions.data());
  const std::vector<StreamChunk> chunks = make_chunks(model_, {index}, kChunkBytes);
  const Arena bounce(ring_slot_bytes(chunks));
  for (const StreamChunk& chunk : chunks) {
    std::vector<ReadRange> ranges;
    for (uint32_t at = 0; at < chunk.units.bytes; at += kMaxReadBytes)
      ranges.push_back(
          {chunk.units.offset + at, std::min<uint32_t>(kMaxReadBytes, chunk.units.bytes - at), bounce.data() + at});
    reader_.wait(reader_.submit(ranges) + ranges.size());
    for (size_t m = 0; m < region.matrices.size(); ++m) {
      const WeightView& w = region.matrices[m];
      const Codes codes = w.grid.codes;
      const auto tile_bytes = static_cast<uint64_t>(column_tile_bytes(codes, false));
      for (int32_t t = 0; t < w.n_tiles(); ++t) {
        const bool half = w.n_rows - t * kTileRows < kTileRows;
        const auto bytes = static_cast<uint64_t>(column_tile_bytes(codes, half));
        uint8_t* out = base[m] + static_cast<uint64_t>(t) * static_cast<uint64_t>(region.n_columns) * tile_bytes +
                       static_cast<uint64_t>(chunk.first) * bytes;
        const uint8_t* record = bounce.data() + chunk.units.skip;
        for (int32_t c = chunk.first; c < chunk.last; ++c, record += region.record_bytes) {
          for (int p = 0; p < 2; ++p) {
            const auto n = static_cast<size_t>(plane_tile_bytes(codes, p, half));
            std::memcpy(out, record + w.plane_offset[p] + t * plane_tile_bytes(codes, p, false), n);
            out += n;
          }
        }
      }
    }
  }
  for (const WeightView& w : region.matrices) {
    const int32_t n_d = w.grid.has_sub() ? w.n_super() : w.n_blocks;
    tile_scales(w.d, n_d, w.n_rows);
    tile_scales(w.dm, n_d, w.n_rows);
    tile_scales(w.sub, w.n_blocks, w.n_rows);
    tile_scales(w.subm, w.n_blocks, w.n_rows);
  }
}

void GluMlp::take_dense(int32_t region, const uint8_t* base, int32_t first, int32_t last, uint64_t ticket,
                        const float* x) {
  batch_.n = last - first;
  batch_.x = x;
  batch_.base = base;
  batch_.first = first;
  batch_.stride = model_.regions[static_cast<size_t>(region)].record_bytes;
  batch_.dense_ticket = ticket;
  batch_.awaits = ticket != 0;
}

bool GluMlp::wait_ticket(int thread, uint64_t ticket, Ledger& ledger) {
  if (thread == 0) {
    if (reader_.completed() >= ticket) return true;
    const Timed timed(ledger.wait);
    reader_.wait(ticket);
    return true;
  }
  for (int spins = 0; reader_.completed() < ticket; ++spins) {
    if (reader_.failed()) return false;
    if (spins < 1000) {
      cpu_relax();
    } else {
      std::this_thread::yield();
    }
  }
  return true;
}

void GluMlp::make_spans(const Grid& grid, int32_t split, Spans& spans) const {
  spans.list.clear();
  spans.n_first = 0;
  for (int32_t i = 0; i < batch_.n;) {
    Span s{batch_.column(i) / grid.group, i, 0, batch_.dense_ticket};
    const int32_t end = (s.block + 1) * grid.group;
    if (batch_.base != nullptr) {
      s.n = std::min(batch_.n - i, end - batch_.column(i));
    } else {
      for (; i + s.n < batch_.n && batch_.column(i + s.n) < end; ++s.n)
        s.ticket = std::max(s.ticket, batch_.ticket[static_cast<size_t>(i + s.n)]);
    }
    spans.n_first += s.block * grid.group < split;
    spans.list.push_back(s);
    i += s.n;
  }
}

void GluMlp::multiply(const Region& region, const Sums& sums, Ledger& ledger) {
  const double start = now_s();
  const double waited = ledger.wait;
  const size_t n_matrices = region.matrices.size();
  size_t spans_of[2] = {0, 0};
  const Grid& grid = region.matrices[0].grid;
  make_spans(grid, region.half_column(), spans_[0]);
  if (n_matrices == 2) {
    const Grid& other = region.matrices[1].grid;
    if (other.group != grid.group || is_float(other.codes) != is_float(grid.codes)) {
      make_spans(other, region.half_column(), spans_[1]);
      spans_of[1] = 1;
    }
  }
  bool packed[2] = {false, false};
  for (size_t m = 0; m < n_matrices; ++m) packed[spans_of[m]] |= !is_float(region.matrices[m].grid.codes);
  int32_t n_halves = 0;
  for (const WeightView& w : region.matrices) n_halves += w.n_halves();
  // Threads share rows and, where nothing is waited for, the two halves of the columns: runs of bytes are twice as
  // long. Reads complete in column order, so that while they do all work on the same half.
  const int n_sides = batch_.awaits || pool_.size() % 2 == 1 ? 1 : 2;
  pool_.run([&](int thread) {
    // One share of all matrices' rows together: a thread's part of a record is one run of bytes where it can be.
    const Share all = share(n_halves, thread / n_sides, pool_.size() / n_sides);
    const int side = thread % n_sides;
    for (size_t l = 0; l <= spans_of[1]; ++l) {
      const Spans& spans = spans_[l];
      size_t i = 0;
      size_t end = spans.list.size();
      if (n_sides == 2) (side == 0 ? end : i) = spans.n_first;
      for (; i < end; ++i) {
        const Span& s = spans.list[i];
        if (!wait_ticket(thread, s.ticket, ledger)) return;
        const uint8_t* room[2][kMaxGroup];
        const float* x = batch_.x + s.first;
        int16_t q[padded_inputs(kMaxGroup)];
        BlockColumns columns{s.block, s.n, batch_.records(s.first, s.n, room[0]), x, q, {}, nullptr, 0};
        if (packed[l]) columns.inputs = kernels_.quantise(x, s.n, q);
        if (i + 1 < end) {
          const Span& next = spans.list[i + 1];
          columns.next_record = batch_.records(next.first, next.n, room[1]);
          columns.n_next = next.n;
        }
        float* const* y = sums.of(i >= spans.n_first);
        int32_t before = 0;
        for (size_t m = 0; m < n_matrices; ++m) {
          const WeightView& w = region.matrices[m];
          const int32_t first = std::clamp(all.first - before, 0, w.n_halves());
          const int32_t last = std::clamp(all.last - before, 0, w.n_halves());
          before += w.n_halves();
          if (spans_of[m] == l && first < last) kernels_.gemv_block(w, columns, first, last, y[m]);
        }
      }
    }
  });
  ledger.gemv += now_s() - start - (ledger.wait - waited);
}

void GluMlp::fetch_cached(int32_t r, const float* values, Ledger& ledger) {
  const Region& region = model_.regions[static_cast<size_t>(r)];
  ColumnCache& cache = caches_[static_cast<size_t>(r)];
  const int32_t k = options_.k[static_cast<size_t>(r)];
  const float* factors = fit(r, &RegionFit::factor);
  const float* means = fit(r, &RegionFit::mean);
  const uint8_t* pinned = region_base_[static_cast<size_t>(r)];  // kSimulated, else null
  std::span<const float> scores{values, static_cast<size_t>(region.n_columns)};
  {
    const Timed timed(ledger.select);
    mask_.resize(static_cast<size_t>(k));
    try {
      top_k(scores, k, options_.gamma, cache.cached(), selection_, mask_.data(), factors);
    } catch (const ConfigError& e) {
      throw ConfigError(region_name(r) + ": " + e.what());
    }
    batch_.n = k;
    batch_.base = nullptr;
    batch_.dense_ticket = 0;
    batch_.awaits = false;
    batch_.index = mask_;
    batch_.record.resize(mask_.size());
    batch_.ticket.assign(mask_.size(), 0);
    batch_.listed_x.resize(mask_.size());
    batch_.x = batch_.listed_x.data();
    const std::span<const int32_t> slots = cache.slots();
    for (size_t i = 0; i < mask_.size(); ++i) {
      const int32_t c = mask_[i];
      batch_.listed_x[i] = means != nullptr ? values[c] - means[c] : values[c];
      const int32_t s = slots[static_cast<size_t>(c)];
      batch_.record[i] = pinned != nullptr ? pinned + static_cast<uint64_t>(c) * region.unit_bytes
                         : s >= 0          ? slot(r, s)
                                           : nullptr;
    }
    const CacheStep& step = cache.step(mask_);
    admissions_.assign(step.admissions.begin(), step.admissions.end());
    counters_.selected += mask_.size();
    counters_.hits += static_cast<uint64_t>(step.n_hits);
    counters_.misses += step.misses.size();
    for (const Admission& a : admissions_) counters_.evictions += a.evicted >= 0;
    counters_.useful_bytes += step.misses.size() * region.unit_bytes;
    plan_misses(region, step.misses);
    if (trace_) trace(TraceWriter::Phase::kDecode, position_, token_, r, mask_, step, values);
  }
  if (plan_.ranges.empty() || pinned != nullptr) return;
  uint64_t first_ticket = 0;
  {
    const Timed timed(ledger.submit);
    first_ticket = reader_.submit(plan_.ranges);
  }
  const Timed timed(ledger.select);
  batch_.awaits = true;
  size_t miss = 0;
  size_t admission = 0;
  admitted_record_.resize(admissions_.size());
  for (size_t i = 0; i < mask_.size(); ++i) {
    if (batch_.record[i] != nullptr) continue;
    batch_.record[i] = miss_staging_ + plan_.staging_offset[miss];
    batch_.ticket[i] = first_ticket + plan_.n_ranges_needed[miss];
    ++miss;
    if (admission < admissions_.size() && admissions_[admission].column == mask_[i])
      admitted_record_[admission++] = batch_.record[i];
  }
}

void GluMlp::trace(TraceWriter::Phase phase, uint32_t position, int32_t token, int32_t r, std::span<const int32_t> mask,
                   const CacheStep& step, const float* scores) {
  const Region& region = model_.regions[static_cast<size_t>(r)];
  const bool reads = phase == TraceWriter::Phase::kDecode;
  trace_->write({phase,
                 position,
                 token,
                 static_cast<uint32_t>(r),
                 mask,
                 step.misses,
                 reads ? std::span<const ReadRange>(plan_.ranges) : std::span<const ReadRange>(),
                 reads ? step.misses.size() * region.unit_bytes : 0,
                 {scores, static_cast<size_t>(region.n_columns)},
                 fit(r, &RegionFit::factor)});
}

// After the products: slots of evicted columns may be overwritten now.
void GluMlp::admit(int32_t region, Ledger& ledger) {
  const Timed timed(ledger.select);
  const uint32_t bytes = model_.regions[static_cast<size_t>(region)].unit_bytes;
  for (size_t i = 0; i < admissions_.size(); ++i)
    std::memcpy(slot(region, admissions_[i].slot), admitted_record_[i], bytes);
}

void GluMlp::step_region(int32_t r, const float* values, const Sums& sums, Ledger& ledger) {
  const Region& region = model_.regions[static_cast<size_t>(r)];
  if (region.matrices[0].tiled != nullptr) {
    project(r, values, 1, true, sums, ledger);
    return;
  }
  {
    const Timed timed(ledger.gemv);
    start_sums(r, true, 1, sums);
  }
  if (region.split()) {
    step_split(r, values, sums, ledger);
  } else if (has_caches()) {
    fetch_cached(r, values, ledger);
    multiply(region, sums, ledger);
    if (options_.residency == Residency::kCached) admit(r, ledger);
  } else {
    WeightStream& stream = of_token();
    for (bool more = true; more;) {
      const StreamChunk chunk = stream.current();
      take_dense(r, stream.data(), chunk.first, chunk.last, stream.ticket(), values + chunk.first);
      multiply(region, sums, ledger);
      const Timed timed(ledger.submit);
      stream.release();
      more = chunk.last < region.n_columns;
    }
  }
  const Timed timed(ledger.gemv);
  add_halves(region, 1, sums);
}

// A region that lies by tiles.
void GluMlp::project(int32_t r, const float* x, int32_t n_tokens, bool masked, const Sums& sums, Ledger& ledger) {
  const Timed timed(ledger.gemv);
  const Region& region = model_.regions[static_cast<size_t>(r)];
  const size_t last = region.matrices.size() - 1;  // one matrix, or two
  const auto product = [&](size_t m) -> Projection {
    const WeightView& w = region.matrices[m];
    return {w, bias(r, m, masked), w.n_rows, sums.first[m], sums.stride, sums.second[m], region.half_column()};
  };
  const Projection products[2] = {product(0), product(last)};
  projector_.take(x, region.n_columns, n_tokens);
  projector_.project({products, last + 1});
}

// The products of the means, whose columns add to them only by how far they are from their mean; null without means,
// and where all columns are used as they are (prefill).
const float* GluMlp::bias(int32_t r, size_t matrix, bool masked) const {
  const bool biased = masked && fit(r, &RegionFit::mean) != nullptr;
  return biased ? (*options_.fits)[static_cast<size_t>(r)].bias[matrix].data() : nullptr;
}

void GluMlp::start_sums(int32_t r, bool masked, int32_t n_tokens, const Sums& sums) const {
  const std::vector<WeightView>& matrices = model_.regions[static_cast<size_t>(r)].matrices;
  pool_.share_out(n_tokens, 2, [&](int32_t first, int32_t last) {
    for (size_t m = 0; m < matrices.size(); ++m) {
      const auto n_rows = static_cast<size_t>(matrices[m].n_rows);
      const float* start = bias(r, m, masked);
      for (int32_t t = first; t < last; ++t) {
        float* y = sums.first[m] + t * sums.stride;
        if (start != nullptr) {
          std::copy_n(start, n_rows, y);
        } else {
          std::fill_n(y, n_rows, 0.0f);
        }
        std::fill_n(sums.second[m] + t * sums.stride, n_rows, 0.0f);
      }
    }
  });
}

void GluMlp::add_halves(const Region& region, int32_t n_tokens, const Sums& sums) {
  for (size_t m = 0; m < region.matrices.size(); ++m) {
    const int32_t n_rows = region.matrices[m].n_rows;
    if (n_tokens == 1) {
      pool_.share_out(n_rows, kSharedRows, [&](int32_t first, int32_t last) {
        kernels_.add(sums.second[m] + first, last - first, sums.first[m] + first);
      });
    } else {
      pool_.share_out(n_tokens, 2, [&](int32_t first, int32_t last) {
        for (int32_t t = first; t < last; ++t)
          kernels_.add(sums.second[m] + t * sums.stride, n_rows, sums.first[m] + t * sums.stride);
      });
    }
  }
}

// hidden = act(gate) * up
void GluMlp::activate(int32_t n_tokens) {
  const auto act = model_.activation == Activation::kSilu ? kernels_.silu_mul : kernels_.gelu_tanh_mul;
  if (n_tokens == 1) {
    pool_.share_out(model_.intermediate, kSharedRows, [&](int32_t first, int32_t last) {
      act(gate_ + first, up_ + first, last - first, hidden_ + first);
    });
    return;
  }
  pool_.share_out(n_tokens, 2, [&](int32_t first, int32_t last) {
    for (int32_t t = first; t < last; ++t) {
      act(gate_ + t * wide_, up_ + t * wide_, model_.intermediate,
          hidden_ + static_cast<int64_t>(t) * model_.intermediate);
    }
  });
}

void GluMlp::step(int32_t layer, const float* x, float* y, Ledger& ledger) {
  if (options_.residency == Residency::kStream) begin_token();
  step_region(2 * layer, x, input_sums(), ledger);
  {
    const Timed timed(ledger.gemv);
    activate(1);
  }
  step_region(2 * layer + 1, hidden_, glu_sums(y, padded_rows(model_.hidden)), ledger);
}

void GluMlp::begin_token() {
  if (refines_any(options_)) {
    if (token_stream_ && !token_stream_->running()) token_stream_->start(true);
  } else if (stream_ && !stream_->running()) {
    stream_->start(true);
  }
}

void GluMlp::begin_block() {
  if (!stream_) return;
  if (refines_any(options_)) {
    if (token_stream_ && token_stream_->running()) {  // both use one ring
      reader_.wait_all();
      token_stream_->abandon();
    }
    stream_->start(false);
  } else if (options_.residency == Residency::kStream) {
    begin_token();
  } else {
    stream_->start(false);
  }
}

void GluMlp::mask_block(int32_t r, float* x, int32_t n_tokens, const BlockMasks& masks, const uint8_t* forced) {
  const int32_t n = model_.regions[static_cast<size_t>(r)].n_columns;
  ColumnCache* cache = caches_.empty() ? nullptr : &caches_[static_cast<size_t>(r)];
  const float* means = fit(r, &RegionFit::mean);
  if (masks.kind == BlockMasks::Kind::kForced) {
    for (int32_t t = 0; t < n_tokens; ++t) {
      float* row = x + static_cast<int64_t>(t) * n;
      const uint8_t* used = forced + static_cast<int64_t>(t) * n;
      for (int32_t c = 0; c < n; ++c) row[c] = used[c] ? (means != nullptr ? row[c] - means[c] : row[c]) : 0.0f;
    }
    return;
  }
  const bool own = masks.kind == BlockMasks::Kind::kOwn && options_.prune;
  const bool touch = masks.kind == BlockMasks::Kind::kDense && masks.touch_cache && cache != nullptr;
  if (!own && !touch) return;
  const int32_t k = options_.k[static_cast<size_t>(r)];
  block_masks_.resize(static_cast<size_t>(n_tokens) * static_cast<size_t>(k));
  std::vector<int32_t> hits(static_cast<size_t>(n_tokens));
  try {
    const uint64_t evictions = cache != nullptr ? cache->evictions() : 0;
    const auto phase = own ? TraceWriter::Phase::kDecode : TraceWriter::Phase::kPrompt;
    const EachStep each = [&](int32_t t, std::span<const int32_t> mask, const CacheStep& step) {
      if (own) plan_misses(model_.regions[static_cast<size_t>(r)], step.misses);
      if (trace_) {
        trace(phase, position_ + static_cast<uint32_t>(t), masks.tokens[t], r, mask, step,
              x + static_cast<int64_t>(t) * n);
      }
    };
    const bool told = trace_ != nullptr || (own && options_.residency == Residency::kSimulated);
    scan(x, n_tokens, n, k, own ? options_.gamma : 1.0f, cache, own, block_masks_.data(), hits.data(),
         fit(r, &RegionFit::factor), told ? each : EachStep());
    if (cache != nullptr) counters_.evictions += cache->evictions() - evictions;
  } catch (const ConfigError& e) {
    throw ConfigError(region_name(r) + ": " + e.what());
  }
  if (touch && cache->policy() == CachePolicy::kStatic && cache->size() == 0 && cache->capacity() > 0) {
    // A static cache never admits: its contents are what the first prompt used most.
    std::vector<uint32_t> uses(static_cast<size_t>(n));
    for (const int32_t c : block_masks_) ++uses[static_cast<size_t>(c)];
    std::vector<int32_t> hot(static_cast<size_t>(cache->capacity()));
    top_k_keys(uses, cache->capacity(), selection_, hot.data());
    cache->pin(hot);
  }
  if (!own) return;
  for (int32_t t = 0; t < n_tokens; ++t) {
    float* row = x + static_cast<int64_t>(t) * n;
    const int32_t* mask = block_masks_.data() + static_cast<int64_t>(t) * k;
    int32_t c = 0;
    for (int32_t i = 0; i < k; ++i) {
      for (; c < mask[i]; ++c) row[c] = 0.0f;
      if (means != nullptr) row[c] -= means[c];
      ++c;
    }
    for (; c < n; ++c) row[c] = 0.0f;
    counters_.hits += static_cast<uint64_t>(hits[static_cast<size_t>(t)]);
  }
  counters_.selected += block_masks_.size();
  for (const int32_t h : hits) counters_.misses += static_cast<uint64_t>(k - h);
}

// What a streamed chunk holds of the cache's contents goes to its slots.
void GluMlp::copy_streamed(int32_t r, const StreamChunk& chunk, const uint8_t* data) {
  const Region& region = model_.regions[static_cast<size_t>(r)];
  const uint32_t bytes = region.unit_bytes;
  const std::span<const int32_t> slots = caches_[static_cast<size_t>(r)].slots();
  const int32_t first = chunk.first / region.columns_per_unit;
  const int32_t end = (chunk.last + region.columns_per_unit - 1) / region.columns_per_unit;
  for (int32_t u = first; u < end; ++u) {
    const int32_t s = slots[static_cast<size_t>(u)];
    if (s >= 0) std::memcpy(slot(r, s), data + static_cast<uint64_t>(u - first) * bytes, bytes);
  }
}

void GluMlp::multiply_block(const Region& region, const float* x, int32_t n_tokens, const Sums& sums, Ledger& ledger) {
  const double start = now_s();
  const double waited = ledger.wait;
  for (size_t m = 0; m < region.matrices.size(); ++m)
    make_spans(region.matrices[m].grid, region.half_column(), spans_[m]);
  MatrixInputs inputs[2];  // made before the threads ask for them
  for (size_t m = 0; m < region.matrices.size(); ++m) inputs[m] = projector_.inputs(region.matrices[m].grid);
  pool_.run([&](int thread) {
    for (size_t m = 0; m < region.matrices.size(); ++m) {
      const WeightView& w = region.matrices[m];
      const MatrixInputs& in = inputs[m];
      const Share tiles = share(w.n_tiles(), thread, pool_.size());
      // Tile by tile, so that its outputs stay in cache over the blocks.
      for (int32_t t = tiles.first; t < tiles.last; ++t) {
        for (size_t i = 0; i < spans_[m].list.size(); ++i) {
          const Span& s = spans_[m].list[i];
          if (!wait_ticket(thread, s.ticket, ledger)) return;
          const int32_t column = batch_.column(s.first);
          const uint8_t* room[kMaxGroup];
          const BlockTokens tokens{s.block,
                                   s.n,
                                   batch_.records(s.first, s.n, room),
                                   x + column,
                                   region.n_columns,
                                   in.q + column,
                                   in.q_stride,
                                   in.blocks + s.block,
                                   w.n_blocks,
                                   n_tokens};
          kernels_.gemm_block(w, tokens, t, t + 1, sums.of(i >= spans_[m].n_first)[m], sums.stride);
        }
      }
      // The owner drives the reads that the others follow, also when there are too few tiles for it to have one.
      if (thread == 0 && !spans_[m].list.empty()) wait_ticket(0, spans_[m].list.back().ticket, ledger);
    }
  });
  ledger.gemv += now_s() - start - (ledger.wait - waited);
}

void GluMlp::block_region(int32_t r, float* x, int32_t n_tokens, const BlockMasks& masks, const uint8_t* forced,
                          const Sums& sums, Ledger& ledger) {
  const Region& region = model_.regions[static_cast<size_t>(r)];
  if (!energies_.empty()) add_energies(r, x, n_tokens);
  if (region.split()) {
    {
      const Timed timed(ledger.gemv);
      start_sums(r, false, n_tokens, sums);
    }
    split_block(r, x, n_tokens, masks, forced, sums, ledger);
    const Timed timed(ledger.gemv);
    add_halves(region, n_tokens, sums);
    return;
  }
  {
    const Timed timed(ledger.select);
    mask_block(r, x, n_tokens, masks, forced);
  }
  const bool masked = masks.kind != BlockMasks::Kind::kDense;
  if (region.matrices[0].tiled != nullptr) {
    project(r, x, n_tokens, masked, sums, ledger);
    return;
  }
  {
    const Timed timed(ledger.gemv);
    start_sums(r, masked, n_tokens, sums);
  }
  projector_.take(x, region.n_columns, n_tokens);
  if (const uint8_t* base = region_base_[static_cast<size_t>(r)]) {
    take_dense(r, base, 0, region.n_columns, 0, nullptr);
    multiply_block(region, x, n_tokens, sums, ledger);
  } else {
    // The caches of a block whose masks moved them take their new contents from the stream.
    const bool fills_slots =
        options_.residency == Residency::kCached && (masks.kind == BlockMasks::Kind::kOwn || masks.touch_cache);
    for (bool more = true; more;) {
      const StreamChunk chunk = stream_->current();
      take_dense(r, stream_->data(), chunk.first, chunk.last, stream_->ticket(), nullptr);
      multiply_block(region, x, n_tokens, sums, ledger);
      if (fills_slots) copy_streamed(r, chunk, stream_->data());
      stream_->release();
      more = chunk.last < region.n_columns;
    }
  }
  const Timed timed(ledger.gemv);
  add_halves(region, n_tokens, sums);
}

void GluMlp::forward(int32_t layer, float* x, int32_t n_tokens, const BlockMasks& masks, float* y, int64_t y_stride,
                     Ledger& ledger) {
  block_region(2 * layer, x, n_tokens, masks, masks.input, input_sums(), ledger);
  {
    const Timed timed(ledger.gemv);
    activate(n_tokens);
  }
  block_region(2 * layer + 1, hidden_, n_tokens, masks, masks.glu, glu_sums(y, y_stride), ledger);
}

void GluMlp::start_energies() {
  energies_.clear();
  for (const Region& region : model_.regions) energies_.emplace_back(static_cast<size_t>(region.n_columns), 0.0);
}

void GluMlp::add_energies(int32_t r, const float* x, int32_t n_tokens) {
  std::vector<double>& energies = energies_[static_cast<size_t>(r)];
  for (int32_t t = 0; t < n_tokens; ++t) {
    for (double& e : energies) {
      e += static_cast<double>(*x) * static_cast<double>(*x);
      ++x;
    }
  }
}

void GluMlp::clear_caches() {
  for (ColumnCache& cache : caches_) cache.clear();
  pin_first_units();
  reset_counters();
}

void GluMlp::pin(int32_t r, const std::vector<int32_t>& units) {
  const Region& region = model_.regions[static_cast<size_t>(r)];
  ColumnCache& cache = caches_[static_cast<size_t>(r)];
  cache.pin(units);
  if (options_.residency == Residency::kSimulated) return;
  constexpr size_t kAtOnce = 64;
  for (size_t first = 0; first < units.size(); first += kAtOnce) {
    const size_t last = std::min(units.size(), first + kAtOnce);
    miss_offsets_.clear();
    for (size_t i = first; i < last; ++i) miss_offsets_.push_back(region.unit_offset(units[i]));
    ReadPlan plan;
    plan_reads(miss_offsets_, region.unit_bytes, kAlign, kMaxReadBytes, nullptr, plan);
    Arena buffer(aligned(plan.staging_bytes));
    plan_reads(miss_offsets_, region.unit_bytes, kAlign, kMaxReadBytes, buffer.data(), plan);
    reader_.wait(reader_.submit(plan.ranges) + plan.ranges.size());
    for (size_t i = first; i < last; ++i) {
      std::memcpy(slot(r, cache.slot_of(units[i])), buffer.data() + plan.staging_offset[i - first], region.unit_bytes);
    }
  }
}

void GluMlp::reset_counters() {
  counters_ = {};
  for (ColumnCache& cache : caches_) cache.reset_counters();
}

}  // namespace dipper
