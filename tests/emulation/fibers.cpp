// Runs the threads of a block as fibers of one host thread: fast, and any order can be repeated.
#include <ucontext.h>

#include <memory>
#include <string>

#include "schedule.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {
namespace {

constexpr size_t kStackBytes = 128 * 1024;

enum class State { kReady, kAtBarrier, kWithWarp, kDone };

// The point at which a stack was left. Uses compiler built-ins: swapcontext asks the kernel for the
// signal mask at each switch, and AddressSanitizer's version clears the shadow of a whole stack.
struct Jump {
  void* buffer[5];
};

[[noreturn]] __attribute__((noinline, no_sanitize("address"))) void jump(Jump& to) {
  __builtin_longjmp(to.buffer, 1);
}

// Leaves this stack for `to`, and returns when something jumps to `from`.
__attribute__((noinline, no_sanitize("address"))) void change(Jump& from, Jump& to) {
  if (__builtin_setjmp(from.buffer) == 0) jump(to);
}

// Like `change`, for a stack that has not run yet.
__attribute__((noinline, no_sanitize("address"))) void begin(Jump& from, const ucontext_t& to) {
  if (__builtin_setjmp(from.buffer) == 0) setcontext(&to);
}

struct Fiber {
  ucontext_t first;  // start of the fiber
  bool begun = false;
  Jump here;
  std::unique_ptr<char[]> stack;
  Place place;
  State state = State::kDone;
  const char* file = nullptr;  // of the barrier at which it waits
  int line = 0;
  int what = 0;  // the warp operation for which it waits
  Brought brought;
  Copies copies;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// Fibers that run one block after another. Created again after an error, since then fibers are left
// in the middle of a kernel.
class Block {
 public:
  explicit Block(int threads) {
    for (int i = 0; i < threads; ++i) fibers_.push_back(make_fiber());
    warps_.resize(threads / kLanes);
  }

  int size() const { return static_cast<int>(fibers_.size()); }

  void run(const Place& place, const std::function<void()>& kernel);

  Fiber& current() { return *current_; }

  // The values that the lanes of the running warp exchanged.
  const Brought* brought() const { return warps_[current_->place.thread.x / kLanes].lanes; }

  // Switches to the scheduler until it resumes this fiber.
  void wait(State state) {
    current_->state = state;
    leave();
  }

 private:
  std::unique_ptr<Fiber> make_fiber();
  static void entry();
  void enter(Fiber& fiber);
  void leave();
  void release_warp(int first);
  void release_barrier();

  std::vector<std::unique_ptr<Fiber>> fibers_;
  struct Warp {
    Brought lanes[kLanes];
  };
  std::vector<Warp> warps_;
  std::vector<int> ready_;
  Fiber* current_ = nullptr;
  Jump scheduler_;
  const std::function<void()>* kernel_ = nullptr;
  std::exception_ptr error_;
  void* fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

std::unique_ptr<Block> block_now;

std::unique_ptr<Fiber> Block::make_fiber() {
  auto fiber = std::make_unique<Fiber>();
  fiber->stack = std::make_unique<char[]>(kStackBytes);
  getcontext(&fiber->first);
  fiber->first.uc_stack.ss_sp = fiber->stack.get();
  fiber->first.uc_stack.ss_size = kStackBytes;
  fiber->first.uc_link = nullptr;
  makecontext(&fiber->first, &Block::entry, 0);
  return fiber;
}

void Block::entry() {
  Block& block = *block_now;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack_, &block.scheduler_stack_bytes_);
#endif
  for (;;) {
    try {
      (*block.kernel_)();
    } catch (...) {
      block.error_ = std::current_exception();
    }
    block.wait(State::kDone);
  }
}

void Block::enter(Fiber& fiber) {
  current_ = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack_, fiber.stack.get(), kStackBytes);
#endif
  if (fiber.begun) {
    change(scheduler_, fiber.here);
  } else {
    fiber.begun = true;
    begin(scheduler_, fiber.first);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

void Block::leave() {
  Fiber& fiber = *current_;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fiber.fake_stack, scheduler_stack_, scheduler_stack_bytes_);
#endif
  change(fiber.here, scheduler_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
}

// If all lanes of a warp wait for the same operation, hands each the values of all. No lane reaches
// the next exchange before all have left this one.
void Block::release_warp(int first) {
  for (int i = 0; i < kLanes; ++i) {
    const Fiber& fiber = *fibers_[first + i];
    if (fiber.state != State::kWithWarp || fiber.what != fibers_[first]->what) return;
  }
  for (int i = 0; i < kLanes; ++i) {
    Fiber& fiber = *fibers_[first + i];
    warps_[first / kLanes].lanes[i] = fiber.brought;
    fiber.state = State::kReady;
    ready_.push_back(first + i);
  }
}

// No fiber can continue. That is an error, unless all wait at one barrier.
void Block::release_barrier() {
  const Fiber& first = *fibers_[0];
  for (const auto& fiber : fibers_) {
    if (fiber->state == State::kWithWarp) {
      throw std::logic_error("a warp waits for lanes that do not come");
    }
    if (fiber->state != State::kAtBarrier) {
      throw std::logic_error("threads left the kernel while others wait at a barrier");
    }
    if (fiber->line != first.line || std::strcmp(fiber->file, first.file) != 0) {
      throw std::logic_error("threads wait at different barriers, lines " +
                             std::to_string(fiber->line) + " and " + std::to_string(first.line));
    }
  }
  for (int i = 0; i < size(); ++i) {
    fibers_[i]->state = State::kReady;
    ready_.push_back(i);
  }
}

void Block::run(const Place& place, const std::function<void()>& kernel) {
  kernel_ = &kernel;
  int done = 0;
  ready_.clear();
  for (int i = 0; i < size(); ++i) {
    fibers_[i]->place = place;
    fibers_[i]->place.thread = dim3(i, 0, 0);
    fibers_[i]->state = State::kReady;
    fibers_[i]->copies = {};
    fibers_[i]->copies.draws = static_cast<uint32_t>(random_source()());
    ready_.push_back(i);
  }
  while (done < size()) {
    if (ready_.empty()) release_barrier();
    const size_t pick = random_source()() % ready_.size();
    const int index = ready_[pick];
    ready_[pick] = ready_.back();
    ready_.pop_back();
    enter(*fibers_[index]);
    if (error_) std::rethrow_exception(error_);
    const State state = fibers_[index]->state;
    if (state == State::kDone) ++done;
    if (state == State::kWithWarp) release_warp(index / kLanes * kLanes);
  }
}

}  // namespace

const Place& place() { return block_now->current().place; }

void barrier(const char* file, int line) {
  Fiber& fiber = block_now->current();
  fiber.file = file;
  fiber.line = line;
  block_now->wait(State::kAtBarrier);
}

const Brought* meet_warp(const Brought& brought, int what) {
  Fiber& fiber = block_now->current();
  fiber.brought = brought;
  fiber.what = what;
  block_now->wait(State::kWithWarp);
  return block_now->brought();
}

Copies& copies() { return block_now->current().copies; }

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel,
            size_t most_shared) {
  check_launch(grid, block, shared_bytes, most_shared);
  ++mutable_counts().launches;
  if (block_now == nullptr || block_now->size() != static_cast<int>(block.x)) {
    block_now = std::make_unique<Block>(static_cast<int>(block.x));
  }
  SharedMemory shared(shared_bytes);
  for (const dim3& index : shuffled_blocks(grid)) {
    shared.poison();
    ++mutable_counts().blocks;
    try {
      block_now->run({dim3(), index, block, grid, shared.data()}, kernel);
    } catch (...) {
      block_now.reset();
      throw;
    }
  }
}

}  // namespace emulation
