#include "flash_reader.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <new>
#include <numeric>
#include <system_error>
#include <thread>
#include <utility>

#include "errors.hpp"

#if defined(__linux__)
#include <linux/io_uring.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#endif

namespace dipper {
namespace {

constexpr int kMaxDepth = 4096;
constexpr int kMaxPreadThreads = 64;  // a thread is a whole stack for one read in flight
constexpr int kMaxStalls = 64;        // answers without progress that one read may get before it counts as failed
// A wait this long is looked for awake: waking a sleeping thread costs 50-100 us, dozens of times a token.
constexpr std::chrono::microseconds kSpinBeforeSleep{300};
constexpr uint32_t kMaxRetries = 10000;  // of one read that the kernel puts off

std::string errno_text(int error) { return std::generic_category().message(error); }

// A file descriptor that closes itself.
class Fd {
 public:
  explicit Fd(int fd = -1) : fd_(fd) {}
  ~Fd() { reset(-1); }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  int get() const { return fd_; }
  void reset(int fd) {
    if (fd_ >= 0) ::close(fd_);
    fd_ = fd;
  }

 private:
  int fd_;
};

struct ReadOp {
  uint64_t ticket;
  uint64_t offset;
  uint8_t* dst;
  uint32_t bytes;
};

struct ReadDone {
  uint64_t ticket;
  int32_t result;  // bytes read, or -errno
};

// What carries reads to the kernel. The caller keeps at most `depth` operations between push and reap.
class ReadQueue {
 public:
  virtual ~ReadQueue() = default;
  virtual void push(const ReadOp& op) = 0;  // noted, the kernel need not know yet
  virtual void flush() = 0;                 // the kernel knows all that was pushed, or will at the next flush or reap
  // Flushes, then returns finished operations; blocks for about min_done of them (fewer only when interrupted).
  virtual size_t reap(std::span<ReadDone> out, size_t min_done) = 0;
};

#if defined(__linux__)

// A mapped part of a ring.
class RingMapping {
 public:
  RingMapping() = default;
  ~RingMapping() {
    if (base_ != nullptr) ::munmap(base_, bytes_);
  }
  RingMapping(const RingMapping&) = delete;
  RingMapping& operator=(const RingMapping&) = delete;
  bool map(int fd, size_t bytes, uint64_t what) {
    void* base =
        ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, static_cast<off_t>(what));
    if (base == MAP_FAILED) return false;
    base_ = base;
    bytes_ = bytes;
    return true;
  }
  template <typename T>
  T* at(uint32_t offset) const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(base_) + offset);
  }

 private:
  void* base_ = nullptr;
  size_t bytes_ = 0;
};

// io_uring through its three system calls. A batch costs one io_uring_enter, finished reads that the kernel has already
// posted cost none. Any thread may enter (no SINGLE_ISSUER): a server may decode from a different thread each time.
class UringQueue final : public ReadQueue {
 public:
  // nullptr and the reason in `note` when the kernel does not give a ring.
  static std::unique_ptr<UringQueue> create(int file, int depth, std::string& note) {
    std::unique_ptr<UringQueue> queue(new UringQueue);
    note = queue->open(file, static_cast<unsigned>(depth));
    return note.empty() ? std::move(queue) : nullptr;
  }

  void push(const ReadOp& op) override {
    io_uring_sqe& sqe = sqes_.at<io_uring_sqe>(0)[tail_ & sq_mask_];
    std::memset(&sqe, 0, sizeof sqe);
    sqe.opcode = IORING_OP_READ;
    sqe.flags = file_flags_;
    sqe.fd = file_;
    sqe.off = op.offset;
    sqe.addr = reinterpret_cast<uint64_t>(op.dst);
    sqe.len = op.bytes;
    sqe.user_data = op.ticket;
    ++tail_;
    ++n_unsubmitted_;
  }

  void flush() override {
    if (n_unsubmitted_ > 0) enter(0);
  }

  size_t reap(std::span<ReadDone> out, size_t min_done) override {
    // TASKRUN: the device is done, but the completion is posted only when the submitter enters the kernel.
    const bool posted_on_entry = (__atomic_load_n(sq_flags_, __ATOMIC_RELAXED) & IORING_SQ_TASKRUN) != 0;
    if (n_unsubmitted_ > 0 || posted_on_entry || n_posted() < min_done) enter(static_cast<unsigned>(min_done));
    const size_t n = std::min<size_t>(n_posted(), out.size());
    for (size_t i = 0; i < n; ++i, ++head_) {
      const io_uring_cqe& cqe = cqes_[head_ & cq_mask_];
      out[i] = {cqe.user_data, cqe.res};
    }
    if (n > 0) __atomic_store_n(cq_head_, head_, __ATOMIC_RELEASE);
    return n;
  }

 private:
  UringQueue() = default;

  static int setup(unsigned entries, io_uring_params& params) {
    return static_cast<int>(::syscall(__NR_io_uring_setup, entries, &params));
  }

  static std::string refusal(int error) {
    const std::string what = "io_uring_setup: " + errno_text(error);
    if (error == ENOSYS) return what + " (the kernel has no io_uring)";
    if (error == EPERM || error == EACCES)
      return what + " (forbidden here: sysctl kernel.io_uring_disabled, or a container's seccomp filter)";
    if (error == ENOMEM) return what + " (the locked-memory limit is too low: ulimit -l)";
    return what;
  }

  std::string open(int file, unsigned depth) {
    io_uring_params params{};
    // Completions wait for the owner's next entry instead of interrupting it in the middle of a GEMV (Linux 5.19).
    params.flags = IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG;
    ring_.reset(setup(depth, params));
    if (ring_.get() < 0 && errno == EINVAL) {
      params = {};
      ring_.reset(setup(depth, params));
    }
    if (ring_.get() < 0) return refusal(errno);
    // RW_CUR_POS came with IORING_OP_READ in Linux 5.6.
    constexpr unsigned kNeeded = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_RW_CUR_POS;
    if ((params.features & kNeeded) != kNeeded)
      return "io_uring of this kernel has no plain read (Linux 5.6 is needed)";
    const size_t rings_bytes = std::max<size_t>(params.sq_off.array + params.sq_entries * sizeof(unsigned),
                                                params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
    if (!rings_.map(ring_.get(), rings_bytes, IORING_OFF_SQ_RING) ||
        !sqes_.map(ring_.get(), params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES)) {
      return "mapping the io_uring: " + errno_text(errno);
    }
    sq_tail_ = rings_.at<unsigned>(params.sq_off.tail);
    sq_flags_ = rings_.at<unsigned>(params.sq_off.flags);
    sq_mask_ = params.sq_entries - 1;
    cq_head_ = rings_.at<unsigned>(params.cq_off.head);
    cq_tail_ = rings_.at<unsigned>(params.cq_off.tail);
    cq_mask_ = params.cq_entries - 1;
    cqes_ = rings_.at<io_uring_cqe>(params.cq_off.cqes);
    unsigned* array = rings_.at<unsigned>(params.sq_off.array);
    std::iota(array, array + params.sq_entries, 0u);  // entry i always stands in place i
    register_file(file);
    return "";
  }

  // A registered file saves the look-up and the reference count of every read.
  void register_file(int file) {
    const bool registered = ::syscall(__NR_io_uring_register, ring_.get(), IORING_REGISTER_FILES, &file, 1) == 0;
    file_ = registered ? 0 : file;
    file_flags_ = registered ? IOSQE_FIXED_FILE : 0;
  }

  size_t n_posted() const { return __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE) - head_; }

  // Submits what is queued and waits for min_done posted completions.
  void enter(unsigned min_done) {
    __atomic_store_n(sq_tail_, tail_, __ATOMIC_RELEASE);
    const long n =
        ::syscall(__NR_io_uring_enter, ring_.get(), n_unsubmitted_, min_done, IORING_ENTER_GETEVENTS, nullptr, 0);
    if (n >= 0) {
      n_unsubmitted_ -= static_cast<unsigned>(n);
    } else if (errno == EAGAIN || errno == EBUSY) {
      std::this_thread::yield();  // short of memory, or completions must be taken first: the caller reaps and comes
                                  // again
    } else if (errno != EINTR) {
      throw FlashError("io_uring_enter: " + errno_text(errno) +
                       "; the kernel refuses the ring: use the pread back end");
    }
  }

  Fd ring_;
  RingMapping rings_, sqes_;
  unsigned *sq_tail_ = nullptr, *sq_flags_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
  io_uring_cqe* cqes_ = nullptr;
  unsigned sq_mask_ = 0, cq_mask_ = 0;
  unsigned tail_ = 0, head_ = 0;  // our ends: of the submission and of the completion ring
  unsigned n_unsubmitted_ = 0;
  int file_ = -1;
  uint8_t file_flags_ = 0;
};

#endif  // __linux__

// Threads that each hold one pread. The fallback: a read costs two thread switches more than with io_uring.
class PreadPool final : public ReadQueue {
 public:
  PreadPool(int file, int depth) : file_(file), todo_(static_cast<size_t>(depth)), done_(static_cast<size_t>(depth)) {
    const int n_threads = std::min(depth, kMaxPreadThreads);
    threads_.reserve(static_cast<size_t>(n_threads));
    try {
      for (int i = 0; i < n_threads; ++i) threads_.emplace_back([this] { work(); });
    } catch (const std::system_error& e) {
      stop();
      throw ConfigError("Cannot start " + std::to_string(n_threads) + " pread threads (" + e.what() +
                        "): lower the queue depth or raise the limit on processes (ulimit -u).");
    }
  }
  ~PreadPool() override { stop(); }

  void push(const ReadOp& op) override {
    const std::lock_guard lock(mutex_);
    todo_.push(op);
    ++n_unannounced_;
  }

  void flush() override {
    for (; n_unannounced_ > 0; --n_unannounced_) has_work_.notify_one();
  }

  size_t reap(std::span<ReadDone> out, size_t min_done) override {
    flush();
    std::unique_lock lock(mutex_);
    n_awaited_ = min_done;
    has_done_.wait(lock, [&] { return done_.size() >= min_done; });
    n_awaited_ = 0;
    const size_t n = std::min(done_.size(), out.size());
    for (size_t i = 0; i < n; ++i) out[i] = done_.pop();
    return n;
  }

 private:
  // FIFO of bounded size.
  template <typename T>
  class Fifo {
   public:
    explicit Fifo(size_t capacity) : items_(std::bit_ceil(capacity)) {}
    size_t size() const { return tail_ - head_; }
    void push(const T& item) { items_[tail_++ & (items_.size() - 1)] = item; }
    T pop() { return items_[head_++ & (items_.size() - 1)]; }

   private:
    std::vector<T> items_;
    size_t head_ = 0, tail_ = 0;
  };

  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    has_work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      has_work_.wait(lock, [this] { return stopping_ || todo_.size() > 0; });
      if (stopping_) return;
      const ReadOp op = todo_.pop();
      lock.unlock();
      ssize_t n;
      do {
        n = ::pread(file_, op.dst, op.bytes, static_cast<off_t>(op.offset));
      } while (n < 0 && errno == EINTR);
      const int32_t result = n < 0 ? -errno : static_cast<int32_t>(n);
      lock.lock();
      done_.push({op.ticket, result});
      if (n_awaited_ > 0 && done_.size() >= n_awaited_) has_done_.notify_one();
    }
  }

  const int file_;
  std::mutex mutex_;
  std::condition_variable has_work_, has_done_;
  Fifo<ReadOp> todo_;
  Fifo<ReadDone> done_;
  size_t n_unannounced_ = 0;  // owner only
  size_t n_awaited_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

// "" when O_DIRECT reads of this open file work, else why not.
std::string direct_refusal(int fd) {
#if defined(__linux__)
  struct statfs fs;
  if (::fstatfs(fd, &fs) == 0 && (fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC)) {
    return "the file lies in memory (tmpfs), O_DIRECT has no meaning there";  // yet open() accepts it since Linux 6.6
  }
#endif
  // Some file systems accept the flag and refuse the read.
  void* page = std::aligned_alloc(FlashReader::alignment(), FlashReader::alignment());
  const ssize_t n = ::pread(fd, page, FlashReader::alignment(), 0);
  const int error = n < 0 ? errno : 0;
  std::free(page);
  return error == EINVAL ? "the file system refuses O_DIRECT reads of 4096 bytes" : "";
}

uint64_t size_of(int fd, const std::string& path) {
  struct stat status;
  if (::fstat(fd, &status) != 0) throw FlashError("Cannot stat " + path + ": " + errno_text(errno) + ".");
  if (S_ISDIR(status.st_mode))
    throw FlashError("Cannot read " + path + ": it is a directory; give a file such as its flash.bin.");
  if (S_ISBLK(status.st_mode)) return static_cast<uint64_t>(::lseek(fd, 0, SEEK_END));
  return static_cast<uint64_t>(status.st_size);
}

}  // namespace

// Tickets from completed to next_ticket stand in one ring buffer: [completed, next_dispatch) was given to the kernel,
// [next_dispatch, next_ticket) waits for room.
struct FlashReader::Impl {
  struct Request {
    uint64_t offset;
    uint8_t* dst;
    uint32_t bytes;
    uint32_t done_bytes;
    uint32_t n_stalls;
    bool finished;
  };

  Impl(const std::string& path_in, const ReaderOptions& options_in)
      : path(path_in), depth(options_in.depth), requests(kMaxDepth) {
    if (depth < 1 || depth > kMaxDepth) {
      throw ConfigError("depth is " + std::to_string(depth) + ", but reads in flight must be between 1 and " +
                        std::to_string(kMaxDepth) + ".");
    }
    open(options_in.direct);
    retries.reserve(static_cast<size_t>(depth));
    done.resize(static_cast<size_t>(depth));
    choose_backend(options_in.backend);
  }

  ~Impl() {
    try {
      drain();  // the kernel must not write into buffers that their owner is about to free
    } catch (const FlashError&) {
      // The ring itself is broken: closing it is all that is left.
    }
  }

  void open(bool want_direct) {
    if (!want_direct) direct_note = "not asked for";
#ifdef O_DIRECT
    if (want_direct) {
      file.reset(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT));
      if (file.get() >= 0) {
        direct_note = direct_refusal(file.get());
        if (!direct_note.empty()) file.reset(-1);
      } else if (errno == EINVAL) {
        direct_note = "the file system refuses O_DIRECT";
      }  // any other error: the plain open meets it again and reports it
    }
#else
    if (want_direct) direct_note = "this system has no O_DIRECT";
#endif
    direct = file.get() >= 0;
    if (!direct) file.reset(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (file.get() < 0) {
      throw FlashError("Cannot open " + path + " for reading: " + errno_text(errno) + " (errno " +
                       std::to_string(errno) + "). Check the path and its permissions.");
    }
    file_bytes = size_of(file.get(), path);
  }

  void choose_backend(ReadBackend wanted) {
    if (wanted == ReadBackend::kPread) backend_note = "pread was asked for";
#if defined(__linux__)
    if (wanted != ReadBackend::kPread) queue = UringQueue::create(file.get(), depth, backend_note);
#else
    if (wanted != ReadBackend::kPread) backend_note = "io_uring is a Linux interface";
#endif
    backend = queue ? ReadBackend::kIoUring : ReadBackend::kPread;
    if (queue) return;
    if (wanted == ReadBackend::kIoUring) {
      throw ConfigError("The io_uring back end was asked for, but: " + backend_note + ". Use backend auto or pread.");
    }
    queue = std::make_unique<PreadPool>(file.get(), depth);
  }

  Request& at(uint64_t ticket) { return requests[ticket & (requests.size() - 1)]; }

  // Steady state does not come here: the ring only grows to the largest backlog seen.
  void make_room(size_t n_more) {
    const uint64_t begin = completed.load(std::memory_order_relaxed);
    const size_t needed = static_cast<size_t>(next_ticket - begin) + n_more;
    if (needed <= requests.size()) return;
    std::vector<Request> larger(std::bit_ceil(needed));
    for (uint64_t t = begin; t < next_ticket; ++t) larger[t & (larger.size() - 1)] = at(t);
    requests = std::move(larger);
  }

  void dispatch(uint64_t ticket) {
    const Request& r = at(ticket);
    const uint32_t bytes = r.bytes - r.done_bytes;
    queue->push({ticket, r.offset + r.done_bytes, r.dst + r.done_bytes, bytes});
    ++in_flight;
    ++counters.reads;
    counters.bytes += bytes;
  }

  // Fills free places in the device's queue, oldest first. By the eighth of the queue: places are refilled once so many
  // are free, so that a system call carries several reads, and the device starts on the first while the rest are
  // prepared.
  void refill() {
    if (failed.load(std::memory_order_relaxed)) return;
    const size_t chunk = std::max<size_t>(1, static_cast<size_t>(depth) / 8);
    const size_t n_waiting = retries.size() + static_cast<size_t>(next_ticket - next_dispatch);
    const size_t n_free = static_cast<size_t>(depth) - in_flight;
    if (n_free < std::min(n_waiting, chunk)) return;
    for (size_t n = std::min(n_waiting, n_free); n > 0; --n) {
      if (retries.empty()) {
        dispatch(next_dispatch++);
      } else {
        dispatch(retries.back());
        retries.pop_back();
      }
      if (n > 1 && (n - 1) % chunk == 0) queue->flush();  // the last part goes with the caller's own system call
    }
  }

  // Takes finished reads (waiting for about min_done) and publishes the prefix.
  void collect(size_t min_done) {
    const size_t n = queue->reap(done, min_done);
    if (n == 0) return;
    in_flight -= n;
    for (size_t i = 0; i < n; ++i) settle(done[i]);
    if (failed.load(std::memory_order_relaxed)) return;
    uint64_t prefix = completed.load(std::memory_order_relaxed);
    while (prefix < next_dispatch && at(prefix).finished) ++prefix;
    completed.store(prefix, std::memory_order_release);
  }

  void settle(const ReadDone& d) {
    Request& r = at(d.ticket);
    if (d.result < 0) {
      if ((d.result == -EINTR || d.result == -EAGAIN) && ++r.n_stalls <= kMaxRetries)
        return retries.push_back(d.ticket);
      return fail(r, errno_text(-d.result) + " (errno " + std::to_string(-d.result) + "). " + remedy(-d.result));
    }
    const auto got = static_cast<uint32_t>(d.result);
    if (r.done_bytes + got == r.bytes) {
      r.finished = true;
      return;
    }
    if (got == 0 || r.offset + r.done_bytes + got >= file_bytes) {
      return fail(r, "short read, " + std::to_string(r.done_bytes + got) + " bytes came and the file ends at " +
                         std::to_string(file_bytes) + ". The file is cut or not padded: pack the model again.");
    }
    // The rest is asked for again; O_DIRECT wants it to start at an aligned place.
    const uint32_t before = r.done_bytes;
    r.done_bytes += got;
    if (direct) r.done_bytes -= r.done_bytes % alignment();
    if (r.done_bytes == before && ++r.n_stalls > kMaxStalls) {
      return fail(r, "the device keeps answering with fewer bytes than one block. Check the disk (dmesg).");
    }
    retries.push_back(d.ticket);
  }

  static const char* remedy(int error) {
    if (error == EIO)
      return "The device could not read this place: check the disk (dmesg), then fetch or pack the model again.";
    if (error == EINVAL) return "The file system refuses a read of this shape: open the file with direct = false.";
    return "Check the disk and the file system (dmesg).";
  }

  void fail(const Request& r, const std::string& why) {
    if (!error.empty()) return;  // the first failure is the one to tell; later ones follow from it
    error = "Reading " + path + " failed at offset " + std::to_string(r.offset) + " (" + std::to_string(r.bytes) +
            " bytes): " + why;
    failed.store(true, std::memory_order_release);
  }

  void drain() {
    while (in_flight > 0) collect(1);
  }

  // Whatever the queue itself throws is a failure that the threads which follow completed() must see.
  template <typename Work>
  void guarded(Work&& work) {
    try {
      work();
    } catch (const FlashError& e) {
      if (error.empty()) error = e.what();
      failed.store(true, std::memory_order_release);
      throw;
    }
  }

  void stop_if_failed() {
    if (!failed.load(std::memory_order_relaxed)) return;
    drain();
    throw FlashError(error);
  }

  const std::string path;
  const int depth;
  Fd file;
  bool direct = false;
  std::string direct_note, backend_note, error;
  uint64_t file_bytes = 0;
  ReadBackend backend = ReadBackend::kPread;

  std::vector<Request> requests;  // ring buffer by ticket, a power of two long
  std::vector<uint64_t> retries;  // dispatched once, to be dispatched again before any other
  std::vector<ReadDone> done;     // scratch of collect
  uint64_t next_ticket = 0, next_dispatch = 0;
  size_t in_flight = 0;
  ReaderCounters counters;
  std::unique_ptr<ReadQueue> queue;  // after `file` and `requests`: destroyed before them

  alignas(64) std::atomic<uint64_t> completed{0};  // own cache line: other threads spin on it
  std::atomic<bool> failed{false};
};

FlashReader::FlashReader(const std::string& path, const ReaderOptions& options)
    : impl_(std::make_unique<Impl>(path, options)) {}
FlashReader::~FlashReader() = default;

ReadBackend FlashReader::backend() const { return impl_->backend; }
const std::string& FlashReader::backend_note() const { return impl_->backend_note; }
bool FlashReader::direct() const { return impl_->direct; }
const std::string& FlashReader::direct_note() const { return impl_->direct_note; }
uint64_t FlashReader::file_bytes() const { return impl_->file_bytes; }
ReaderCounters FlashReader::counters() const { return impl_->counters; }
uint64_t FlashReader::completed() const noexcept { return impl_->completed.load(std::memory_order_acquire); }
bool FlashReader::failed() const noexcept { return impl_->failed.load(std::memory_order_acquire); }

uint64_t FlashReader::submit(std::span<const ReadRange> ranges) {
  impl_->stop_if_failed();
  for (const ReadRange& r : ranges) {
    if (r.bytes == 0 || (r.offset | r.bytes | reinterpret_cast<uintptr_t>(r.dst)) % alignment() != 0) {
      throw ConfigError("A read of " + std::to_string(r.bytes) + " bytes at offset " + std::to_string(r.offset) +
                        " into address " + std::to_string(reinterpret_cast<uintptr_t>(r.dst)) +
                        ": all three must be multiples of " + std::to_string(alignment()) + ", and bytes not 0.");
    }
  }
  impl_->make_room(ranges.size());
  const uint64_t first = impl_->next_ticket;
  for (const ReadRange& r : ranges) impl_->at(impl_->next_ticket++) = {r.offset, r.dst, r.bytes, 0, 0, false};
  impl_->guarded([this] {
    impl_->refill();
    impl_->queue->flush();
  });
  return first;
}

void FlashReader::poll() {
  impl_->guarded([this] {
    if (impl_->in_flight > 0) impl_->collect(0);
    impl_->refill();
    impl_->queue->flush();
  });
}

void FlashReader::wait(uint64_t n_tickets) {
  if (n_tickets > impl_->next_ticket) {
    throw ConfigError("wait(" + std::to_string(n_tickets) + ") would never end: only " +
                      std::to_string(impl_->next_ticket) + " reads were submitted.");
  }
  impl_->guarded([this, n_tickets] {
    using Clock = std::chrono::steady_clock;
    const Clock::time_point sleep_from = Clock::now() + kSpinBeforeSleep;
    while (!failed() && completed() < n_tickets) {
      impl_->refill();
      if (Clock::now() < sleep_from) {
        impl_->queue->flush();
        impl_->collect(0);
        continue;
      }
      // Wakes up for a quarter of what is out, at most 16: few wake-ups, yet the queue stays filled and the prefix
      // grows.
      const uint64_t needed = std::min<uint64_t>(impl_->in_flight, n_tickets - completed());
      impl_->collect(static_cast<size_t>(std::clamp<uint64_t>(needed / 4, 1, 16)));
    }
  });
  impl_->stop_if_failed();
}

void FlashReader::wait_all() { wait(impl_->next_ticket); }

void plan_reads(std::span<const uint64_t> offsets, uint32_t record_bytes, uint32_t alignment, uint32_t max_bytes,
                uint8_t* staging, ReadPlan& plan) {
  if (alignment == 0 || !std::has_single_bit(alignment) || record_bytes == 0 || max_bytes == 0 ||
      max_bytes % alignment != 0) {
    throw ConfigError("plan_reads: alignment " + std::to_string(alignment) + " must be a power of two, max_bytes " +
                      std::to_string(max_bytes) + " a multiple of it and not 0, record_bytes " +
                      std::to_string(record_bytes) + " not 0.");
  }
  const uint64_t low_bits = alignment - 1;
  plan.ranges.clear();
  plan.staging_offset.resize(offsets.size());
  plan.n_ranges_needed.resize(offsets.size());
  uint64_t position = 0;  // in staging, of the end of the last range
  uint64_t end = 0;       // in the file, of the last range
  uint64_t previous = 0;
  for (size_t i = 0; i < offsets.size(); ++i) {
    const uint64_t offset = offsets[i];
    if (offset < previous) {
      throw ConfigError("plan_reads: offsets must ascend, but " + std::to_string(offset) + " follows " +
                        std::to_string(previous) + ".");
    }
    previous = offset;
    const uint64_t wanted_end = (offset + record_bytes + low_bits) & ~low_bits;
    const bool joins = !plan.ranges.empty() && (offset & ~low_bits) <= end;
    if (!joins) end = offset & ~low_bits;
    // Widened ranges that touch lie back to back in staging too, so a record stays whole where a range is cut.
    plan.staging_offset[i] =
        static_cast<uint32_t>(position + (offset - end));  // modulo 2^64: offset may lie before end
    for (bool extends = joins; end < wanted_end; extends = false) {
      const uint64_t more = wanted_end - end;
      const uint64_t room = extends ? max_bytes - plan.ranges.back().bytes : max_bytes;
      const auto bytes = static_cast<uint32_t>(std::min(more, room));
      if (extends) {
        plan.ranges.back().bytes += bytes;
      } else {
        plan.ranges.push_back({end, bytes, staging == nullptr ? nullptr : staging + position});
      }
      end += bytes;
      position += bytes;
    }
    if (position > UINT32_MAX) {
      throw ConfigError("plan_reads: " + std::to_string(offsets.size()) + " records of " +
                        std::to_string(record_bytes) +
                        " bytes need more than 4 GiB of staging: read them in several batches.");
    }
    plan.n_ranges_needed[i] = static_cast<uint32_t>(plan.ranges.size());
  }
  plan.staging_bytes = position;
}

void plan_records(uint64_t region_offset, uint32_t record_bytes, std::span<const int32_t> columns, uint32_t alignment,
                  uint8_t* staging, std::vector<uint64_t>& offsets, ReadPlan& plan) {
  offsets.clear();
  for (const int32_t c : columns) offsets.push_back(region_offset + static_cast<uint64_t>(c) * record_bytes);
  plan_reads(offsets, record_bytes, alignment, kMaxReadBytes, staging, plan);
}

uint64_t max_staging_bytes(uint64_t n_records, uint32_t record_bytes, uint64_t region_bytes, uint32_t alignment) {
  // Regions start aligned, so a record starts at a multiple of gcd(record_bytes, alignment) within its block.
  const uint64_t worst_start = alignment - std::gcd(record_bytes, alignment);
  const auto up = [alignment](uint64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; };
  return std::min(n_records * up(worst_start + record_bytes), up(region_bytes));
}

uint64_t max_run_bytes(uint64_t n_units, float run_cost, uint32_t unit_bytes, uint64_t region_bytes,
                       uint32_t alignment) {
  const uint64_t single = max_staging_bytes(n_units, unit_bytes, region_bytes, alignment);
  if (run_cost == 0.0f || n_units == 0) return single;
  // R runs of U units: U + R run_cost <= n (1 + run_cost), and they are widened by `ends` each at most. Of U unit_bytes
  // + R ends the most is at R = n, or, where starting a read costs more than the ends, at R = 0.
  const uint64_t ends = 2 * (alignment - std::gcd(unit_bytes, alignment));
  const double together = static_cast<double>(n_units) * (1.0 + run_cost) * unit_bytes;
  const uint64_t most = std::max(static_cast<uint64_t>(std::ceil(together)), n_units * (unit_bytes + ends));
  const auto up = [alignment](uint64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; };
  return std::max(single, std::min(up(most), up(region_bytes)));
}

}  // namespace dipper
