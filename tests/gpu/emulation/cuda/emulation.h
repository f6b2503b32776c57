// Runs CUDA kernels on a CPU: the headers of this folder stand before csrc/cuda, the kernels' source stays as it is.
//
// A fiber per thread, block after block. Barriers and the collectives of a warp switch fibers; threads that wait for
// each other in vain end the process with a message. A seed shuffles who goes next at every turn, so that a missing
// barrier changes the result. Shared memory begins as NaN and ends where the launch says (the address sanitizer sees
// what lies beyond); asynchronous copies land as late as they may, or, `eager`, at once: the one finds a missing wait,
// the other a copy that begins too early.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#undef __global__
#undef __device__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emulation {

struct Copy {
  void* to;
  const void* from;
  bool filled;
};

struct Warp {
  struct Exchange {
    uint32_t arrived = 0;
    uint64_t turn = 0;
    alignas(16) unsigned char values[2][32][32];  // of this turn and the one before, which slower lanes still read
  } exchange;
  uint32_t alive = 0;
};

enum class State { runs, at_barrier, in_warp, ended };

struct Thread {
  void* stack_pointer = nullptr;
  std::unique_ptr<unsigned char[]> stack;
  State state = State::runs;
  uint3 index{};
  int lane = 0;
  Warp* warp = nullptr;
  uint64_t turn = 0;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
  void* scheduler = nullptr;
  uint3 index{};
  dim3 size, grid;
  std::function<void()> body;
};

// Of a kernel: its mangled name, grid, threads, bytes of shared memory, its parameters and their bytes.
using Elsewhere = void (*)(const char*, unsigned, unsigned, int, int, const void*, int);

struct Options {
  int seed = 0;  // 0: threads take turns in their order
  bool eager = false;
  Elsewhere elsewhere = nullptr;  // where launches go instead
};

inline Block* block;
inline Thread* thread;
inline Options options;
constexpr size_t STACK = 128 << 10;

// Saves the registers that a call keeps, and goes on where `to` was saved.
asm(R"(.text
.type emulation_switch,@function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch,.-emulation_switch
)");
extern "C" __attribute__((visibility("hidden"))) void emulation_switch(void** save, void* to);

inline void yield() { emulation_switch(&thread->stack_pointer, block->scheduler); }

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "emulation: %s, block (%u, %u, %u)\n", message, block->index.x, block->index.y, block->index.z);
  std::abort();
}

inline void first_step() {
  block->body();
  thread->state = State::ended;
  thread->warp->alive &= ~(1u << thread->lane);
  yield();
}

inline void prepare(Thread& t) {
  if (!t.stack) t.stack.reset(new unsigned char[STACK]);
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(t.stack.get()) + STACK) & ~uintptr_t(63));
  *--top = nullptr;  // where first_step would return to
  *--top = reinterpret_cast<void*>(&first_step);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  t.stack_pointer = top, t.state = State::runs;
  t.open.clear(), t.groups.clear();
}

inline void run_block(std::mt19937& random) {
  std::vector<int> order(block->threads.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = int(i);
  for (size_t living = order.size(); living;) {
    bool moved = false;
    if (options.seed) std::shuffle(order.begin(), order.end(), random);
    for (const int i : order) {
      Thread& t = block->threads[i];
      if (t.state == State::in_warp && t.warp->exchange.turn != t.turn) t.state = State::runs;
      if (t.state != State::runs) continue;
      thread = &t;
      emulation_switch(&block->scheduler, t.stack_pointer);
      moved = true;
      living -= t.state == State::ended;
    }
    const auto waiting = std::count_if(order.begin(), order.end(),
                                       [](int i) { return block->threads[i].state == State::at_barrier; });
    if (living && size_t(waiting) == living) {
      for (Thread& t : block->threads)
        if (t.state == State::at_barrier) t.state = State::runs;
      moved = true;
    }
    if (!moved) fail("threads wait for each other");
  }
}

inline void launch(dim3 grid, int threads, int shared, std::function<void()> body) {
  static Block only;  // keeps the stacks
  block = &only;
  only.grid = grid, only.size = dim3(threads), only.body = std::move(body);
  only.threads.resize(threads);
  std::mt19937 random(options.seed);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        only.index = {x, y, z};
        only.shared.reset(new unsigned char[shared]);
        std::memset(only.shared.get(), 0xff, shared);
        only.warps.assign((threads + 31) / 32, Warp());
        for (int i = 0; i < threads; ++i) {
          Thread& t = only.threads[i];
          prepare(t);
          t.index = {unsigned(i), 0, 0}, t.lane = i % 32, t.warp = &only.warps[i / 32];
          t.warp->alive |= 1u << t.lane;
        }
        run_block(random);
      }
}

// Every lane of a warp brings a value and sees those of all.
template <class T>
struct Values {
  const unsigned char (*at)[32];
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, at[lane], sizeof(T));
    return value;
  }
};
template <class T>
Values<T> exchange(const T& value) {
  static_assert(sizeof(T) <= 32);
  auto& e = thread->warp->exchange;
  const int parity = e.turn & 1;
  std::memcpy(e.values[parity][thread->lane], &value, sizeof(T));
  e.arrived |= 1u << thread->lane;
  if (e.arrived == 0xffffffffu) {
    e.arrived = 0, ++e.turn;
  } else {
    thread->state = State::in_warp, thread->turn = e.turn;
    yield();
  }
  return {e.values[parity]};
}

inline void land(const Copy& copy) {
  copy.filled ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
}

}  // namespace emulation

#define threadIdx (emulation::thread->index)
#define blockIdx (emulation::block->index)
#define gridDim (emulation::block->grid)

using std::max;
using std::min;

inline void __syncthreads() {
  emulation::thread->state = emulation::State::at_barrier;
  emulation::yield();
}
inline void __syncwarp() { emulation::exchange(0); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(value)[emulation::thread->lane ^ mask];
}
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return emulation::exchange(value)[source % 32];
}
template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int source = emulation::thread->lane - delta;
  const auto values = emulation::exchange(value);
  return source < 0 ? value : values[source];
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const auto votes = emulation::exchange(vote);
  unsigned mask = 0;
  for (int lane = 0; lane < 32; ++lane) mask |= unsigned(votes[lane]) << lane;
  return mask;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned word = 0;
  for (int i = 0; i < 4; ++i) word |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return word;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }

// Calls an entry point as ctypes asks for it.
#define EMULATED(entry, Params)                                                                    \
  extern "C" void emulated(const Params* params, int seed, int eager, emulation::Elsewhere where) { \
    emulation::options = {seed, eager != 0, where};                                                \
    entry(*params);                                                                                \
  }                                                                                                \
  extern "C" int64_t size_of_params() { return sizeof(Params); }
