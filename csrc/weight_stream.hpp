// Dense weights in the order they are used, read ahead through a ring of buffers: the disk works while the CPU
// multiplies.
#pragma once

#include <cstdint>
#include <vector>

#include "flash_reader.hpp"
#include "model.hpp"

namespace dipper {

// A part of the file that is read to a buffer; offset and bytes are aligned.
struct StreamSpan {
  uint64_t offset = 0;
  uint32_t bytes = 0;
  uint32_t skip = 0;  // from the span's start to what is wanted
};

// Consecutive columns of one region: their units and, of a split region where they are wanted, their bases behind
// these. Starts at a multiple of 32 columns and of a unit, so that no block and no unit is split. A region whose units
// hold columns in another order is one chunk.
struct StreamChunk {
  int32_t region;
  int32_t first;  // column
  int32_t last;
  StreamSpan units;
  StreamSpan bases;

  uint32_t bytes() const { return units.bytes + bases.bytes; }
};

// Cuts regions into chunks of at most max_bytes where these hold the fewest columns that go, even in size. based: by
// region, whether its bases are elsewhere already; empty: none.
std::vector<StreamChunk> make_chunks(const Model& model, const std::vector<int32_t>& regions, uint32_t max_bytes,
                                     const std::vector<uint8_t>& based = {});
// Reads that bring a chunk.
uint32_t n_reads(const StreamChunk& chunk);
// Room that the largest of the chunks needs in a ring.
uint32_t ring_slot_bytes(const std::vector<StreamChunk>& chunks);

class WeightStream {
 public:
  // ring: n_slots buffers of slot_bytes, aligned.
  WeightStream(FlashReader& reader, std::vector<StreamChunk> chunks, uint8_t* ring, uint32_t slot_bytes,
               int32_t n_slots);

  // Begins at the first chunk; cyclic streams run on into the next token. Earlier reads must have been stopped.
  void start(bool cyclic);
  bool running() const { return running_; }
  // The next chunk in order. Its bytes are there once the reader has completed ticket(); release() gives its buffer
  // back.
  const StreamChunk& current() const {
    return chunks_[static_cast<size_t>(use_ % static_cast<int64_t>(chunks_.size()))];
  }
  const uint8_t* data() const { return slot(use_) + current().units.skip; }  // the first unit
  const uint8_t* bases() const { return slot(use_) + current().units.bytes + current().bases.skip; }
  uint64_t ticket() const { return tickets_[static_cast<size_t>(use_ % n_slots_)]; }
  void release();
  // Ends the stream; the reader must have finished what was submitted.
  void abandon() { running_ = false; }

 private:
  uint8_t* slot(int64_t i) const { return ring_ + static_cast<uint64_t>(i % n_slots_) * slot_bytes_; }
  void read_ahead();
  void add_reads(const StreamSpan& span, uint8_t* to);

  FlashReader& reader_;
  std::vector<StreamChunk> chunks_;
  uint8_t* ring_;
  uint32_t slot_bytes_;
  int64_t n_slots_;
  std::vector<uint64_t> tickets_;
  std::vector<ReadRange> ranges_;
  int64_t use_ = 0;   // chunks consumed since start
  int64_t read_ = 0;  // chunks submitted since start
  int64_t end_ = 0;   // where a stream that is not cyclic ends
  bool running_ = false;
};

}  // namespace dipper
