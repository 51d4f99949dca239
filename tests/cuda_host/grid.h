// A grid of CUDA threads on the host: its blocks one after another, each thread a fibre, in a random order that
// changes at every point of synchronisation. What the threads do together is checked, and an error ends the process.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "fibre.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#pragma GCC visibility push(hidden)
namespace senet::cuda::host {

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;
constexpr size_t kMostSharedBytes = 48 << 10;

// Blocks and grids have one dimension, so there is no y to read.
struct Index {
  unsigned x;
};

// A place in the kernel's source: as a default argument, that of the call.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

// A call that waits for other threads. They all make the same one, from the same line.
struct Call {
  const char* kind;
  Site site;
  uint32_t mask;   // of a warp's lanes; 0 at a barrier of the block
  int source;      // the lane that a shuffle reads; -1 for votes
  uint64_t value;  // what the thread brings, later what it gets

  bool same(const Call& other) const {
    return mask == other.mask && site.line == other.site.line && std::strcmp(kind, other.kind) == 0 &&
           std::strcmp(site.file, other.site.file) == 0;
  }
  std::string text() const {
    char lanes[32] = "";
    if (mask != 0) std::snprintf(lanes, sizeof lanes, ", mask %08x", mask);
    return std::string(kind) + " (" + site.text() + lanes + ")";
  }
};

struct Copy {
  void* to;
  const void* from;
  Site site;
};

enum class State { ready, in_barrier, in_warp, done };

struct Thread {
  Fibre fibre;
  State state;
  Call call;
  bool waited_for_previous;
  std::vector<Copy> copies;
};

// One array of a block's shared memory, between guards. Behind it AddressSanitizer's own guard takes over.
struct Array {
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kBehind = 0;
#else
  static constexpr size_t kBehind = 256;
#endif
  static constexpr unsigned char kGuard = 0xa5, kNan = 0xff;

  const void* identity;
  std::string name;
  size_t bytes, before;
  unsigned char* memory;

  unsigned char* data() const { return memory + before; }

  // Aligned as asked and no better, so that code which counts on more fails here and not on some GPU.
  void allocate(size_t alignment) {
    before = alignment;
    void* room = nullptr;
    if (posix_memalign(&room, 2 * alignment, before + bytes + kBehind) != 0) std::abort();
    memory = static_cast<unsigned char*>(room);
    std::memset(memory, kGuard, before + bytes + kBehind);
    std::memset(data(), kNan, bytes);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(memory, before);
#endif
  }
  bool intact() const {
#if !defined(__SANITIZE_ADDRESS__)
    const auto is_guard = [](unsigned char byte) { return byte == kGuard; };
    return std::all_of(memory, data(), is_guard) && std::all_of(data() + bytes, data() + bytes + kBehind, is_guard);
#else
    return true;
#endif
  }
  void release() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory, before);
#endif
    std::free(memory);
  }
};

}  // namespace senet::cuda::host

inline senet::cuda::host::Index threadIdx{}, blockIdx{}, blockDim{}, gridDim{};

namespace senet::cuda::host {

class Grid {
 public:
  void seed(uint64_t number) {
    seeded_ = true;
    seed_ = number;
    random_ = (number + 1) * 0x9e3779b97f4a7c15u;
  }

  // All of a launch: counts it, runs body() once per thread.
  std::string run(const char* name, const std::function<void()>& body, int64_t blocks, int threads,
                  size_t dynamic_bytes, bool dependent) {
    if (blocks < 1 || blocks > INT32_MAX || threads < kWarp || threads > kMostThreads || threads % kWarp != 0)
      return "invalid configuration";
    if (current_ >= 0) die("launches " + std::string(name) + ": kernels launch no kernels");
    if (!seeded_) {
      const char* number = std::getenv("SENET_HOST_SEED");
      seed(number == nullptr ? 0 : std::strtoull(number, nullptr, 10));
    }
    ++launches[name];
    name_ = name, body_ = &body, dynamic_bytes_ = dynamic_bytes, dependent_ = dependent;
    blockDim.x = count_ = threads;
    gridDim.x = static_cast<unsigned>(blocks);
    std::vector<unsigned> order(gridDim.x);
    std::iota(order.begin(), order.end(), 0u);
    for (unsigned left = gridDim.x; left > 0; --left) {
      std::swap(order[below(left)], order[left - 1]);
      blockIdx.x = order[left - 1];
      run_block();
    }
    return "";
  }

  // A barrier of the block. Returns the sum over its threads of what each brings.
  int barrier(const char* kind, int value, Site site) {
    Thread& me = threads_[current_];
    me.call = {kind, site, 0, -1, static_cast<uint64_t>(value)};
    if (waiting_ == 0) first_waiting_ = current_;
    const Call& first = threads_[first_waiting_].call;
    if (!me.call.same(first))
      die("reaches " + me.call.text() + ", but thread " + std::to_string(first_waiting_) + " waits in " + first.text() +
          ": not every thread reaches the same barrier");
    me.state = State::in_barrier;
    ++waiting_;
    open_barrier();
    me.fibre.leave(false);
    return static_cast<int>(me.call.value);
  }

  // What the lanes in `mask` do together. A shuffle gets the value of lane `source`; with source -1 everyone gets the
  // lanes that brought something other than 0.
  uint64_t exchange(const char* kind, uint32_t mask, uint64_t value, int source, Site site) {
    Thread& me = threads_[current_];
    me.call = {kind, site, mask, source, value};
    const int lane = current_ % kWarp;
    if ((mask >> lane & 1) == 0) die("lane " + std::to_string(lane) + " is not in its own mask: " + me.call.text());
    me.state = State::in_warp;
    warps_[current_ / kWarp].waiting |= 1u << lane;
    settle(current_);
    me.fibre.leave(false);
    return me.call.value;
  }

  // One array of this block, named by an address that nothing else has.
  unsigned char* shared(const void* identity, const char* name, size_t bytes, size_t alignment) {
    for (const Array& array : arrays_)
      if (array.identity == identity) return array.data();
    shared_bytes_ += bytes;
    if (shared_bytes_ > kMostSharedBytes)
      die("has " + std::to_string(shared_bytes_) + " bytes of shared memory with " + name + ", and a block has " +
          std::to_string(kMostSharedBytes));
    arrays_.push_back({identity, name, bytes, 0, nullptr});
    arrays_.back().allocate(alignment);
    return arrays_.back().data();
  }

  // Both ends are touched at once, so that AddressSanitizer's report names this call; the bytes move in finish_copies.
  void begin_copy(void* to, const void* from, Site site) {
    check_aligned(to, 16, "copy_async to", site);
    check_aligned(from, 16, "copy_async from", site);
    const auto* first = static_cast<const unsigned char*>(to);
    const bool is_shared = std::any_of(arrays_.begin(), arrays_.end(), [&](const Array& array) {
      return first >= array.data() && first + 16 <= array.data() + array.bytes;
    });
    if (!is_shared) die("copy_async to an address outside of shared memory (" + site.text() + ")");
    static_cast<void>(*static_cast<const volatile unsigned char*>(from));
    static_cast<void>(static_cast<const volatile unsigned char*>(from)[15]);
    threads_[current_].copies.push_back({to, from, site});
  }

  void finish_copies() {
    for (const Copy& copy : threads_[current_].copies) std::memcpy(copy.to, copy.from, 16);
    threads_[current_].copies.clear();
  }

  void wait_for_previous() { threads_[current_].waited_for_previous = true; }

  void check_aligned(const volatile void* address, size_t bytes, const char* what, Site site) const {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
      die(std::string(what) + " an address that is not a multiple of " + std::to_string(bytes) + " (" + site.text() +
          ")");
  }

  int lane() const { return current_ % kWarp; }

  std::map<std::string, int> launches;

 private:
  struct Warp {
    uint32_t living, waiting;  // lanes that have not ended; of those, the ones in a warp's call
  };

  void die(const std::string& what) const { die(what, current_); }
  void die(const std::string& what, int thread) const {
    const std::string who = thread < 0 ? "" : ", thread " + std::to_string(thread);
    std::fprintf(stderr, "kernel %s, block %u%s: %s [SENET_HOST_SEED=%llu]\n", name_, blockIdx.x, who.c_str(),
                 what.c_str(), static_cast<unsigned long long>(seed_));
    std::abort();
  }

  unsigned below(unsigned end) {
    random_ = random_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<unsigned>((random_ >> 32) * end >> 32);
  }

  void run_block() {
    living_ = count_, waiting_ = 0;
    ready_.clear();
    std::fill(std::begin(warps_), std::end(warps_), Warp{~0u, 0});
    for (int i = 0; i < count_; ++i) {
      Thread& thread = threads_[i];
      thread.state = State::in_barrier;
      thread.waited_for_previous = false;
      thread.fibre.start(entry);
    }
    if (dynamic_bytes_ > 0) shared(this, "dynamic shared memory", dynamic_bytes_, 16);
    std::iota(order_, order_ + count_ / kWarp, 0);
    wake_all();
    while (!ready_.empty()) {
      current_ = take_next();
      threadIdx.x = static_cast<unsigned>(current_);
      threads_[current_].fibre.resume();
    }
    current_ = -1;
    if (living_ > 0) explain_deadlock();
    for (Array& array : arrays_) {
      if (!array.intact()) die("wrote outside of shared memory, next to " + array.name);
      array.release();
    }
    arrays_.clear();
    shared_bytes_ = 0;
  }

  static void entry();

  void run_thread() {
    (*body_)();
    Thread& me = threads_[current_];
    if (!me.copies.empty()) die("ends before copy_wait, after copy_async (" + me.copies[0].site.text() + ")");
    if (dependent_ && !me.waited_for_previous) die("ends without wait_for_previous in a dependent launch");
    me.state = State::done;
    --living_;
    Warp& warp = warps_[current_ / kWarp];
    warp.living &= ~(1u << lane());
    const int first = current_ - lane();
    for (int i = first; i < first + kWarp; ++i)
      if (threads_[i].state == State::in_warp) settle(i);
    open_barrier();
    me.fibre.leave(true);
  }

  void wake(int thread) {
    threads_[thread].state = State::ready;
    ready_.push_back(thread);
  }

  // Up to the next barrier, either anyone may be next, which keeps all warps about level, or only the warp woken last,
  // which gets as far ahead of the others as it can. Some races show in the one order and some in the other.
  int take_next() {
    const size_t last = ready_.size() - 1;
    size_t choice = last + 1;
    if (one_warp_) {
      choice = 1;
      while (choice <= last && ready_[last - choice] / kWarp == ready_[last] / kWarp) ++choice;
    }
    std::swap(ready_[last - below(static_cast<unsigned>(choice))], ready_[last]);
    const int thread = ready_[last];
    ready_.pop_back();
    return thread;
  }

  // A barrier opens, or a block begins.
  void wake_all() {
    one_warp_ = below(2) == 1;
    const int warps = count_ / kWarp;
    for (int left = warps; left > 0; --left) {
      std::swap(order_[below(static_cast<unsigned>(left))], order_[left - 1]);
      const int first = order_[left - 1] * kWarp;
      for (int i = first; i < first + kWarp; ++i)
        if (threads_[i].state == State::in_barrier) wake(i);
    }
  }

  void open_barrier() {
    if (waiting_ == 0 || waiting_ < living_) return;
    uint64_t sum = 0;
    for (int i = 0; i < count_; ++i)
      if (threads_[i].state == State::in_barrier) sum += threads_[i].call.value;
    for (int i = 0; i < count_; ++i) threads_[i].call.value = sum;
    waiting_ = 0;
    wake_all();
  }

  // Carries out the call that this thread waits in, if all lanes it needs are in it.
  void settle(int thread) {
    const Call call = threads_[thread].call;
    const int first = thread - thread % kWarp;
    Warp& warp = warps_[thread / kWarp];
    const uint32_t lanes = call.mask & warp.living;
    if ((warp.waiting & lanes) != lanes) return;
    uint64_t values[kWarp];
    uint64_t votes = 0;
    for (int i = 0; i < kWarp; ++i) {
      if ((lanes >> i & 1) == 0) continue;
      const Call& other = threads_[first + i].call;
      if (!other.same(call)) {
        // Lanes that don't wait for this one may come later.
        if ((other.mask >> (thread % kWarp) & 1) == 0) return;
        die("lanes disagree: " + call.text() + ", but lane " + std::to_string(i) + " is in " + other.text(), thread);
      }
      values[i] = other.value;
      votes |= static_cast<uint64_t>(other.value != 0) << i;
    }
    for (int i = 0; i < kWarp; ++i) {
      if ((lanes >> i & 1) == 0) continue;
      Call& other = threads_[first + i].call;
      if (other.source >= 0 && (lanes >> other.source & 1) == 0)
        die(other.text() + " reads lane " + std::to_string(other.source) +
                ((call.mask >> other.source & 1) == 0 ? ", which is outside of the mask" : ", which has ended"),
            first + i);
      other.value = other.source < 0 ? votes : values[other.source];
      wake(first + i);
    }
    warp.waiting &= ~lanes;
  }

  // Threads that are all in barriers go on, so somebody waits for a lane.
  void explain_deadlock() {
    for (int i = 0; i < count_; ++i) {
      const Thread& thread = threads_[i];
      if (thread.state != State::in_warp) continue;
      const int first = i - i % kWarp;
      for (int j = first; j < first + kWarp; ++j) {
        const Thread& other = threads_[j];
        if ((thread.call.mask >> (j - first) & 1) == 0 || other.state == State::done) continue;
        if (other.state != State::in_warp || !other.call.same(thread.call))
          die("deadlock: waits in " + thread.call.text() + " for lane " + std::to_string(j - first) +
                  ", which waits in " + other.call.text(),
              i);
      }
    }
    die("deadlock", -1);
  }

  const char* name_ = "";
  const std::function<void()>* body_ = nullptr;
  size_t dynamic_bytes_ = 0;
  bool dependent_ = false;
  bool seeded_ = false;
  uint64_t seed_ = 0, random_ = 0;
  std::vector<Thread> threads_ = std::vector<Thread>(kMostThreads);
  Warp warps_[kMostThreads / kWarp] = {};
  int order_[kMostThreads / kWarp] = {};  // of warps
  bool one_warp_ = false;
  std::vector<int> ready_;
  std::vector<Array> arrays_;
  size_t shared_bytes_ = 0;
  int count_ = 0, living_ = 0, waiting_ = 0;
  int first_waiting_ = 0;  // the first thread at the barrier, if any waits
  int current_ = -1;       // the thread that runs
};

inline Grid grid;

inline void Grid::entry() {
  Fibre::entered();
  grid.run_thread();
}

}  // namespace senet::cuda::host
#pragma GCC visibility pop
