#include "weight_stream.hpp"

#include <algorithm>
#include <limits>

namespace dipper {

namespace {

constexpr uint32_t kMaxStreamRead = 1u << 20;

}  // namespace

uint32_t n_reads(const StreamChunk& chunk) { return (chunk.bytes + kMaxStreamRead - 1) / kMaxStreamRead; }

std::vector<StreamChunk> make_chunks(const Model& model, const std::vector<int32_t>& regions, uint32_t max_bytes,
                                     const std::vector<uint8_t>& based) {
  constexpr uint64_t kAlign = FlashReader::alignment();
  std::vector<StreamChunk> chunks;
  for (const int32_t r : regions) {
    const Region& region = model.regions[static_cast<size_t>(r)];
    if (region.split()) {
      const bool units_alone = !based.empty() && based[static_cast<size_t>(r)];
      const uint64_t bytes = units_alone ? region.bases_at() : (region.bytes() + kAlign - 1) / kAlign * kAlign;
      chunks.push_back({r, 0, region.n_columns, region.offset, static_cast<uint32_t>(bytes), 0});
      continue;
    }
    const int32_t n_blocks = (region.n_columns + kMaxGroup - 1) / kMaxGroup;
    const uint64_t block_bytes = static_cast<uint64_t>(kMaxGroup) * region.record_bytes;
    const auto room =
        static_cast<int32_t>(std::max<uint64_t>(1, (max_bytes - 2 * kAlign) / block_bytes));  // blocks a read
    const int32_t n_chunks = (n_blocks + room - 1) / room;
    for (int32_t c = 0; c < n_chunks; ++c) {
      const int32_t first = static_cast<int32_t>(static_cast<int64_t>(n_blocks) * c / n_chunks) * kMaxGroup;
      const int32_t last = std::min(
          region.n_columns, static_cast<int32_t>(static_cast<int64_t>(n_blocks) * (c + 1) / n_chunks) * kMaxGroup);
      const uint64_t begin = region.unit_offset(first) / kAlign * kAlign;
      const uint64_t end = (region.unit_offset(last) + kAlign - 1) / kAlign * kAlign;
      chunks.push_back({r, first, last, begin, static_cast<uint32_t>(end - begin),
                        static_cast<uint32_t>(region.unit_offset(first) - begin)});
    }
  }
  return chunks;
}

uint32_t ring_slot_bytes(const std::vector<StreamChunk>& chunks) {
  uint32_t most = 0;
  for (const StreamChunk& c : chunks) most = std::max(most, c.bytes);
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
    for (uint32_t at = 0; at < c.bytes; at += kMaxStreamRead)
      ranges_.push_back({c.file_offset + at, std::min(kMaxStreamRead, c.bytes - at), slot(read_) + at});
    tickets_[static_cast<size_t>(read_ % n_slots_)] = reader_.submit(ranges_) + ranges_.size();
    ++read_;
  }
}

void WeightStream::release() {
  ++use_;
  if (use_ == end_) running_ = false;
  read_ahead();
}

}  // namespace dipper
