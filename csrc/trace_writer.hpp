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
  TraceWriter(const std::string& path, const std::string& header_json);
  ~TraceWriter();
  TraceWriter(const TraceWriter&) = delete;
  TraceWriter& operator=(const TraceWriter&) = delete;

  struct Frame {
    uint32_t token;
    uint32_t region;
    std::span<const int32_t> mask;
    std::span<const int32_t> misses;  // subset of mask, ascending
    std::span<const ReadRange> reads;
    uint64_t useful_bytes;
    std::span<const float> scores;  // of every column; magnitudes are written
  };
  void write(const Frame& frame);
  // Everything is in the file, or FlashError. Nothing may be written afterwards.
  void finish();

 private:
  void put(const void* data, size_t bytes);
  std::string path_;
  std::FILE* file_;
};

}  // namespace dipper
