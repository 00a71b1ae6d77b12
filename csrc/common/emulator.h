// Runs the CUDA kernels of this library on the host, for tests on machines without a GPU: the source of a kernel is
// compiled by the host compiler, and the threads of a block are fibers that take turns at barriers and shuffles.
//
// What it would notice: a missing barrier (fibers run in three different orders, in one of them with warps that fall
// behind; asynchronous copies land only when they are waited for, those of a pipeline in another order at once), a
// barrier or shuffle that not every thread reaches (error), uninitialized shared memory (filled with NaN before each
// block), writes past its end (canary). What it cannot: alignment faults of vector
// accesses, bank conflicts, speed, the rounding of the special-function unit.
//
// Fibers switch by _setjmp and _longjmp: swapcontext, which only starts them here, saves the signal mask by two system
// calls, 40 s of a test run.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

namespace scalekern::emulator {

enum class Order : int { rising, falling, shuffled };

class Block {
 public:
  int thread = 0;       // the fiber that runs now
  int64_t number = 0;   // of the block in the grid
  Order order = Order::rising;

  unsigned char* shared() { return shared_.data() + offset_; }

  void barrier() { wait(State::block); }
  void warp_barrier() { wait(State::warp); }

  double exchange(double value, int mask) {
    Fiber& f = *fibers_[thread];
    f.parity ^= 1;
    f.slot[f.parity] = value;
    const int parity = f.parity, peer = (thread & ~31) | ((thread & 31) ^ mask);
    warp_barrier();
    return fibers_[peer]->slot[parity];
  }

  void copy_async(void* to, const void* from) {
    const auto bits = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
    if (bits & 15) fail("misaligned asynchronous copy");
    fibers_[thread]->pending.push_back({to, from, 0, 16});
  }
  void copy_wait() {
    for (const Copy& copy : fibers_[thread]->pending) copy.land();
    fibers_[thread]->pending.clear();
  }

  // Copies of a pipeline, in groups; from null: zeros. A device may complete one at any time from its start to the wait
  // for its group: late in rising order, at once in falling order, either in the shuffled one.
  void copy_in_group(void* to, const void* from, int bytes) {
    const auto bits = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
    if (bits & (bytes - 1)) return fail("misaligned asynchronous copy");
    const Copy copy{to, from, fibers_[thread]->group, bytes};
    if (order == Order::falling || (order == Order::shuffled && random_() % 2)) copy.land();
    else fibers_[thread]->pending.push_back(copy);
  }
  void copy_group() { ++fibers_[thread]->group; }
  // Waits for all groups but the last `newest`.
  void copy_wait_but(int newest) {
    Fiber& f = *fibers_[thread];
    const auto late = [&](const Copy& copy) { return copy.group >= f.group - newest; };
    const auto ready = std::stable_partition(f.pending.begin(), f.pending.end(), late);
    for (auto copy = ready; copy != f.pending.end(); ++copy) copy->land();
    f.pending.erase(ready, f.pending.end());
  }
  void fail(const char* what) { error_ = what; }

  template <class Kernel>
  void launch(int64_t blocks, int64_t shared_bytes, const typename Kernel::Args& args) {
    body_ = [](const void* a) { Kernel::run(*static_cast<const typename Kernel::Args*>(a)); };
    args_ = &args;
    for (number = 0; number < blocks; ++number) run_block(Kernel::kThreads, shared_bytes);
  }

 private:
  enum class State { ready, block, warp, done };
  struct Copy {
    void* to;
    const void* from;
    int group, bytes;

    void land() const {
      if (from) std::memcpy(to, from, size_t(bytes));
      else std::memset(to, 0, size_t(bytes));
    }
  };
  struct Fiber {
    ucontext_t start;
    jmp_buf context;
    bool started = false;
    std::unique_ptr<char[]> stack{new char[kStack]};
    State state = State::ready;
    int parity = 0;
    double slot[2] = {0, 0};
    std::vector<Copy> pending;
    int group = 0;  // that copies go to now
  };
  static constexpr size_t kStack = 256 * 1024;
  static constexpr unsigned char kCanary = 0xa5;

  void wait(State why) {
    Fiber& f = *fibers_[thread];
    f.state = why;
    leave(f);
  }

  void leave(Fiber& f) {
    if (_setjmp(f.context) == 0) _longjmp(scheduler_, 1);
  }

  void resume(Fiber& f) {
    if (_setjmp(scheduler_) != 0) return;  // the fiber came to a barrier or its end
    if (f.started) _longjmp(f.context, 1);
    f.started = true;
    setcontext(&f.start);
  }

  static void enter(unsigned high, unsigned low) {
    auto* self = reinterpret_cast<Block*>((uintptr_t(high) << 32) | low);
    self->body_(self->args_);
    self->fibers_[self->thread]->state = State::done;
    self->leave(*self->fibers_[self->thread]);
  }

  void run_block(int threads, int64_t shared_bytes) {
    shared_.assign(size_t(shared_bytes) + 256, 0xff);  // 0xffff.. is NaN in every type
    offset_ = (128 - reinterpret_cast<uintptr_t>(shared_.data()) % 128) % 128;
    std::memset(shared() + shared_bytes, kCanary, 128);
    error_ = nullptr;
    while (int(fibers_.size()) < threads) fibers_.push_back(std::make_unique<Fiber>());
    const auto self = reinterpret_cast<uintptr_t>(this);
    for (int i = 0; i < threads; ++i) {
      Fiber& f = *fibers_[i];
      f.state = State::ready, f.parity = 0, f.started = false, f.pending.clear(), f.group = 0;
      getcontext(&f.start);
      f.start.uc_stack.ss_sp = f.stack.get();
      f.start.uc_stack.ss_size = kStack;
      f.start.uc_link = nullptr;
      makecontext(&f.start, reinterpret_cast<void (*)()>(&Block::enter), 2, unsigned(self >> 32), unsigned(self));
    }
    while (turn(threads)) {
    }
    for (int i = 0; i < 128; ++i)
      if (shared()[shared_bytes + i] != kCanary) fail("a write past the end of shared memory");
    if (error_) throw std::runtime_error(error_);
  }

  // Run every fiber that can run, then open the barriers that all have reached. False when all are done.
  bool turn(int threads) {
    std::vector<int> sequence(threads);
    for (int i = 0; i < threads; ++i) sequence[i] = order == Order::falling ? threads - 1 - i : i;
    if (order == Order::shuffled) std::shuffle(sequence.begin(), sequence.end(), random_);
    if (random_() % 64 == 0) fall_behind(threads);
    bool waits = false, moved = false;
    for (int i : sequence) {
      if (fibers_[i]->state != State::ready) continue;
      if (behind_ >> i / 32 & 1) {
        waits = true;
        continue;
      }
      moved = true;
      thread = i;
      resume(*fibers_[i]);
    }
    if (waits && !moved) behind_ = 0;
    bool opened = waits;
    for (int w = 0; w < threads; w += 32) opened |= open(w, w + 32 < threads ? w + 32 : threads, State::warp);
    if (opened) return true;
    if (open(0, threads, State::block)) {
      fall_behind(threads);
      return true;
    }
    for (int i = 0; i < threads; ++i)
      if (fibers_[i]->state != State::done)
        throw std::runtime_error("a barrier or shuffle that not every thread reaches");
    return false;
  }

  // Warps that do not move for tens of the others' own barriers: what only a barrier of the block would keep the others
  // from doing meanwhile, they do.
  void fall_behind(int threads) {
    if (order == Order::shuffled && threads > 32) behind_ = random_() & random_();
  }

  bool open(int begin, int end, State kind) {
    for (int i = begin; i < end; ++i)
      if (fibers_[i]->state != kind) return false;
    for (int i = begin; i < end; ++i) fibers_[i]->state = State::ready;
    return true;
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<unsigned char> shared_;
  size_t offset_ = 0;
  jmp_buf scheduler_;
  void (*body_)(const void*) = nullptr;
  const void* args_ = nullptr;
  const char* error_ = nullptr;
  uint32_t behind_ = 0;
  std::mt19937 random_{20240607};
};

// The block that runs on this host thread.
inline Block& block() {
  static thread_local Block current;
  return current;
}

}  // namespace scalekern::emulator
