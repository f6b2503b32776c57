// Owned scratch memory: aligned, on huge pages where the system grants them: a step streams tens of MiB of packed
// panels, and 2 MiB pages spare it first-touch faults and TLB misses.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace limber {

constexpr int64_t HUGE_PAGE = int64_t(2) << 20;

constexpr int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void advise_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__)
  if (bytes >= 2 * HUGE_PAGE) {
    uintptr_t lo = round_up((int64_t)(uintptr_t)p, HUGE_PAGE), hi = ((uintptr_t)p + bytes) / HUGE_PAGE * HUGE_PAGE;
    if (hi > lo) madvise((void*)lo, hi - lo, MADV_HUGEPAGE);  // a hint: a refusal changes nothing
  }
#endif
}

// Blocks of memory on their way from one buffer to the next of the same size: fresh pages and their faults cost half of
// a step of a few milliseconds (N = 512, D = 2048 in bf16). At most 64 MiB wait, in at most 16 blocks.
class Pool {
 public:
  static void* take(int64_t bytes) {
    if (bytes >= SMALLEST) {
      Pool& pool = instance();
      std::unique_lock<std::mutex> lock(pool.mutex_, std::try_to_lock);  // a fork may have caught it locked: no waiting
      for (int i = 0; lock && i < pool.count_; i++)
        if (pool.blocks_[i].bytes == bytes) return pool.remove(i);
      // Beside a large block the others need not wait: a step's peak stays what its own buffers take.
      while (lock && bytes >= LARGEST / 2 && pool.count_) std::free(pool.remove(0));
    }
    void* p = std::aligned_alloc(bytes >= HUGE_PAGE ? HUGE_PAGE : 64, bytes);
    if (!p) throw std::bad_alloc();
    advise_huge_pages(p, bytes);
    return p;
  }
  static void give(void* p, int64_t bytes) {
    if (bytes < SMALLEST || bytes > LARGEST) return std::free(p);
    Pool& pool = instance();
    std::unique_lock<std::mutex> lock(pool.mutex_, std::try_to_lock);
    if (!lock) return std::free(p);
    while (pool.count_ == MOST || pool.total_ + bytes > LARGEST) std::free(pool.remove(0));  // the oldest
    pool.blocks_[pool.count_++] = {p, bytes};
    pool.total_ += bytes;
  }

 private:
  static constexpr int64_t SMALLEST = 64 << 10, LARGEST = 64 << 20;
  static constexpr int MOST = 16;
  struct Block {
    void* p;
    int64_t bytes;
  };
  static Pool& instance() {
    static Pool* pool = new Pool;  // never destroyed: threads may outlive static objects
    return *pool;
  }
  void* remove(int i) {
    const Block block = blocks_[i];
    std::move(blocks_ + i + 1, blocks_ + count_--, blocks_ + i);
    total_ -= block.bytes;
    return block.p;
  }
  std::mutex mutex_;
  Block blocks_[MOST];
  int count_ = 0;
  int64_t total_ = 0;
};

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) {
    if (n <= 0) return;
    const int64_t bytes = n * (int64_t)sizeof(T) + 64;
    bytes_ = round_up(bytes, bytes >= HUGE_PAGE ? HUGE_PAGE : 64);
    p_ = (T*)Pool::take(bytes_);
  }
  Buffer(Buffer&& o) noexcept : p_(std::exchange(o.p_, nullptr)), bytes_(o.bytes_) {}
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(p_, o.p_), std::swap(bytes_, o.bytes_);
    return *this;
  }
  ~Buffer() {
    if (p_) Pool::give(p_, bytes_);
  }
  T* get() const { return p_; }
  operator T*() const { return p_; }

 private:
  T* p_ = nullptr;
  int64_t bytes_ = 0;
};

// A block whose memory goes to the next one of its size: fresh pages for a 256 MiB tile cache cost 2-5% of a training
// step. One freed block waits, marked so that the system may take its pages back whenever it needs them.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex());
    if (spare().bytes_ == bytes)
      swap(spare());
    else
      block_ = Buffer<char>(bytes), bytes_ = bytes;
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() {
#if defined(__linux__) && defined(MADV_FREE)
    const uintptr_t end = ((uintptr_t)get() + bytes_) / HUGE_PAGE * HUGE_PAGE,
                    begin = round_up((int64_t)(uintptr_t)get(), HUGE_PAGE);
    if (end > begin) madvise((void*)begin, end - begin, MADV_FREE);
#endif
    if (this == &spare()) return;
    std::lock_guard<std::mutex> lock(mutex());
    swap(spare());
  }
  char* get() const { return block_.get(); }
  int64_t bytes() const { return bytes_; }

 private:
  Scratch() = default;
  void swap(Scratch& o) { std::swap(block_, o.block_), std::swap(bytes_, o.bytes_); }
  static std::mutex& mutex() {
    static std::mutex m;
    return m;
  }
  static Scratch& spare() {
    static Scratch s;
    return s;
  }
  Buffer<char> block_;
  int64_t bytes_ = 0;
};

}  // namespace limber
