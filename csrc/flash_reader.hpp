// Batched reads of aligned ranges from one file: io_uring, else a pool of pread threads; O_DIRECT where the file takes
// it.
//
// One owner thread submits, polls and waits. Any thread may look at completed(): reads finish in any order on the
// device, but tickets are published as a growing prefix, so that a consumer can follow the submission order without
// reordering.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace dipper {

enum class ReadBackend { kAuto, kIoUring, kPread };

struct ReaderOptions {
  ReadBackend backend =
      ReadBackend::kAuto;  // kAuto: io_uring if the kernel gives it, else pread; backend() tells which
  int depth = 64;          // reads in flight
  bool direct = true;      // try O_DIRECT; direct() tells whether the file system took it
};

// offset, bytes and dst are multiples of alignment() (bytes of the last range may reach past the file's padded end: an
// error).
struct ReadRange {
  uint64_t offset;
  uint32_t bytes;
  uint8_t* dst;
};

struct ReaderCounters {
  uint64_t reads = 0;  // requests given to the kernel
  uint64_t bytes = 0;  // bytes asked of it
};

class FlashReader {
 public:
  FlashReader(const std::string& path, const ReaderOptions& options);
  ~FlashReader();
  FlashReader(const FlashReader&) = delete;
  FlashReader& operator=(const FlashReader&) = delete;

  static constexpr uint32_t alignment() { return 4096; }
  ReadBackend backend() const;
  const std::string& backend_note() const;  // why io_uring was not taken, "" otherwise
  bool direct() const;
  const std::string& direct_note() const;  // why O_DIRECT was not taken, "" otherwise
  uint64_t file_bytes() const;

  // Queues the ranges in order; returns the ticket of the first (tickets are consecutive from 0). Never blocks: what
  // does not fit in `depth` is submitted by later submit/poll/wait calls. Throws ConfigError (nothing queued) for a
  // range that is not aligned, FlashError as wait does once a read has failed.
  uint64_t submit(std::span<const ReadRange> ranges);
  // Owner: collects completions and refills the device's queue. Does not block, and does not throw for a failed read.
  void poll();
  // All tickets < completed() are done (their bytes are visible to a thread that saw this value).
  uint64_t completed() const noexcept;
  // Owner: blocks until completed() >= n_tickets. Throws FlashError (path, offset, bytes, errno or short read) if any
  // read failed; the reader then refuses further work, and in-flight reads have been drained.
  void wait(uint64_t n_tickets);
  // Owner: the same for everything submitted so far.
  void wait_all();
  // True once a read has failed; completed() no longer grows. For threads that spin on completed().
  bool failed() const noexcept;

  ReaderCounters counters() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Records wanted from a region -> aligned ranges, and where each record lies in staging.
// offsets: ascending file offsets of records of record_bytes. Ranges are widened to `alignment`; two that touch or
// overlap become one, cut at max_bytes (a multiple of alignment). dst of the ranges is staging + position, filled from
// 0 upwards (null where staging is: for whoever wants sizes alone). Where a range is cut inside a record, the record
// goes on in the next range and is still contiguous in staging. ConfigError: offsets that do not ascend, sizes that are
// not as said, more than 4 GiB of staging.
struct ReadPlan {
  std::vector<ReadRange> ranges;
  std::vector<uint32_t> staging_offset;   // of each record
  std::vector<uint32_t> n_ranges_needed;  // record i is complete when the first n_ranges_needed[i] ranges are
  uint64_t staging_bytes = 0;
};
void plan_reads(std::span<const uint64_t> offsets, uint32_t record_bytes, uint32_t alignment, uint32_t max_bytes,
                uint8_t* staging, ReadPlan& plan);
// Coalesced reads are cut here, so that products can follow them.
inline constexpr uint32_t kMaxReadBytes = 256u << 10;
// The same for columns (ascending) of a region that starts at `region_offset`; `offsets` is scratch.
void plan_records(uint64_t region_offset, uint32_t record_bytes, std::span<const int32_t> columns, uint32_t alignment,
                  uint8_t* staging, std::vector<uint64_t>& offsets, ReadPlan& plan);
// Most staging that any n_records of a region of region_bytes can need; the region starts at a multiple of alignment.
uint64_t max_staging_bytes(uint64_t n_records, uint32_t record_bytes, uint64_t region_bytes, uint32_t alignment);

// The same for runs of units that together cost no more than n_units reads of one unit each, a read costing run_cost
// more than its units, in units' bytes (`refine`); run_cost 0: for the units alone.
uint64_t max_run_bytes(uint64_t n_units, float run_cost, uint32_t unit_bytes, uint64_t region_bytes,
                       uint32_t alignment);

}  // namespace dipper
