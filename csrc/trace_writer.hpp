// Writes what each token did to each region, frame by frame (format: docs/trace-format.md).
#pragma once

#include <cstdint>
#include <cstdio>
#include <span>
#include <string>

#include "flash_reader.hpp"

namespace dipper {

class TraceWriter {
 public:
  // Creates the file and writes the header (a JSON text that names model and settings).
  // with_scores: every column's score is written too, several times a mask's size.
  TraceWriter(const std::string& path, const std::string& header_json, bool with_scores);
  ~TraceWriter();
  TraceWriter(const TraceWriter&) = delete;
  TraceWriter& operator=(const TraceWriter&) = delete;

  // kPrompt: a mask that warmed the cache in prefill, read and counted for nothing.
  enum class Phase : uint32_t { kPrompt, kDecode };
  struct Frame {
    Phase phase;
    uint32_t position;  // of the token in its sequence
    int32_t token;      // its id
    uint32_t region;
    std::span<const int32_t> mask;
    std::span<const int32_t> misses;  // subset of mask, ascending
    std::span<const ReadRange> reads;
    uint64_t useful_bytes;
    std::span<const float> scores;  // of every column
    const float* factors;           // [n_columns] or null; |scores| times these are written
  };
  void write(const Frame& frame);
  // Everything is in the file, or FlashError. Nothing may be written afterwards.
  void finish();

 private:
  void put(const void* data, size_t bytes);
  std::string path_;
  bool with_scores_;
  std::FILE* file_;
};

}  // namespace dipper
