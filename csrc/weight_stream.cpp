#include "weight_stream.hpp"

#include <algorithm>
#include <limits>
#include <numeric>

namespace dipper {

namespace {

constexpr uint32_t kMaxStreamRead = 1u << 20;
constexpr uint64_t kAlign = FlashReader::alignment();

StreamSpan span_of(uint64_t begin, uint64_t end) {
  const uint64_t from = begin / kAlign * kAlign;
  const uint64_t to = (end + kAlign - 1) / kAlign * kAlign;
  return {from, static_cast<uint32_t>(to - from), static_cast<uint32_t>(begin - from)};
}

}  // namespace

uint32_t n_reads(const StreamChunk& chunk) {
  const auto reads = [](uint32_t bytes) { return (bytes + kMaxStreamRead - 1) / kMaxStreamRead; };
  return reads(chunk.units.bytes) + reads(chunk.bases.bytes);
}

std::vector<StreamChunk> make_chunks(const Model& model, const std::vector<int32_t>& regions, uint32_t max_bytes,
                                     const std::vector<uint8_t>& based) {
  std::vector<StreamChunk> chunks;
  for (const int32_t r : regions) {
    const Region& region = model.regions[static_cast<size_t>(r)];
    const bool with_bases = region.split() && (based.empty() || based[static_cast<size_t>(r)] == 0);
    const int32_t per_unit = region.columns_per_unit;
    const int32_t step = region.natural ? std::lcm(kMaxGroup, per_unit) : region.n_columns;  // columns
    const int32_t n_steps = (region.n_columns + step - 1) / step;
    const uint64_t step_bytes = static_cast<uint64_t>(step / per_unit) * region.unit_bytes +
                                (with_bases ? static_cast<uint64_t>(step) * region.base_bytes : 0);
    const uint64_t widened = (with_bases ? 4 : 2) * kAlign;
    const auto room = static_cast<int32_t>(std::max<uint64_t>(1, (max_bytes - widened) / step_bytes));  // steps a chunk
    const int32_t n_chunks = (n_steps + room - 1) / room;
    for (int32_t c = 0; c < n_chunks; ++c) {
      const auto at = [&](int32_t i) {
        return std::min(region.n_columns, static_cast<int32_t>(static_cast<int64_t>(n_steps) * i / n_chunks) * step);
      };
      const int32_t first = at(c);
      const int32_t last = at(c + 1);
      StreamChunk chunk{r, first, last, {}, {}};
      chunk.units = span_of(region.unit_offset(first / per_unit), region.unit_offset((last + per_unit - 1) / per_unit));
      if (with_bases) chunk.bases = span_of(region.base_record(first), region.base_record(last));
      chunks.push_back(chunk);
    }
  }
  return chunks;
}

uint32_t ring_slot_bytes(const std::vector<StreamChunk>& chunks) {
  uint32_t most = 0;
  for (const StreamChunk& c : chunks) most = std::max(most, c.bytes());
  return most;
}

WeightStream::WeightStream(FlashReader& reader, std::vector<StreamChunk> chunks, uint8_t* ring, uint32_t slot_bytes,
                           int32_t n_slots)
    : reader_(reader),
      chunks_(std::move(chunks)),
      ring_(ring),
      slot_bytes_(slot_bytes),
      n_slots_(n_slots),
      tickets_(static_cast<size_t>(n_slots)) {}

void WeightStream::start(bool cyclic) {
  use_ = read_ = 0;
  end_ = cyclic ? std::numeric_limits<int64_t>::max() : static_cast<int64_t>(chunks_.size());
  running_ = !chunks_.empty();
  if (running_) read_ahead();
}

void WeightStream::read_ahead() {
  while (read_ < end_ && read_ - use_ < n_slots_) {
    const StreamChunk& c = chunks_[static_cast<size_t>(read_ % static_cast<int64_t>(chunks_.size()))];
    ranges_.clear();
    add_reads(c.units, slot(read_));
    add_reads(c.bases, slot(read_) + c.units.bytes);
    tickets_[static_cast<size_t>(read_ % n_slots_)] = reader_.submit(ranges_) + ranges_.size();
    ++read_;
  }
}

void WeightStream::add_reads(const StreamSpan& span, uint8_t* to) {
  for (uint32_t at = 0; at < span.bytes; at += kMaxStreamRead)
    ranges_.push_back({span.offset + at, std::min(kMaxStreamRead, span.bytes - at), to + at});
}

void WeightStream::release() {
  ++use_;
  if (use_ == end_) running_ = false;
  read_ahead();
}

}  // namespace dipper
