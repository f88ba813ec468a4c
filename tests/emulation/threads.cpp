// Runs the threads of a block as threads of the system, two blocks at a time. This is slow, but
// lets ThreadSanitizer find races that fibers cannot show: two threads that access one place
// without a barrier between them, in shared memory or, across blocks, in global memory.
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "schedule.h"

namespace emulation {
namespace {

struct Gave {};  // thrown in waiting threads after an error

// A reusable barrier for a fixed number of threads.
struct Meeting {
  std::condition_variable over;
  int expected = 0, arrived = 0;
  int64_t generation = 0;
  int site = 0;  // the barrier or operation of the threads that have arrived
};

struct Warp {
  Meeting meeting;
  Brought lanes[2][kLanes];  // of this meeting and the previous one, which may still be read
};

struct Block {
  std::mutex mutex;
  Meeting all;
  std::vector<Warp> warps;
  std::string error;
  int gone = 0;

  void wake_all() {
    all.over.notify_all();
    for (Warp& warp : warps) warp.meeting.over.notify_all();
  }
};

thread_local Place place_now;
thread_local Block* block_now = nullptr;
thread_local Copies copies_now;

void fail(Block& block, const std::string& error) {
  if (block.error.empty()) block.error = error;
  block.wake_all();
  throw Gave{};
}

// Waits until all threads have arrived.
void meet(Block& block, std::unique_lock<std::mutex>& lock, Meeting& meeting, int site,
          const char* what) {
  if (meeting.arrived > 0 && meeting.site != site) fail(block, std::string(what) + ": several");
  meeting.site = site;
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.generation;
    meeting.over.notify_all();
    return;
  }
  const int64_t generation = meeting.generation;
  while (meeting.generation == generation) {
    if (block.gone > 0 && &meeting == &block.all) {
      fail(block, "threads left the kernel while others wait at a barrier");
    }
    if (!block.error.empty()) throw Gave{};
    meeting.over.wait(lock);
  }
}

void run_thread(Block& block, Place place, const std::function<void()>& kernel) {
  place_now = place;
  block_now = &block;
  copies_now.draws = place.thread.x * 2654435761u + place.block.x;
  std::string error;
  try {
    kernel();
  } catch (const Gave&) {
  } catch (const std::exception& thrown) {
    error = thrown.what();
  }
  const std::lock_guard<std::mutex> lock(block.mutex);
  ++block.gone;
  if (!error.empty() && block.error.empty()) block.error = error;
  block.wake_all();
}

}  // namespace

const Place& place() { return place_now; }

void barrier(const char*, int line) {
  std::unique_lock<std::mutex> lock(block_now->mutex);
  meet(*block_now, lock, block_now->all, line, "barrier");
}

const Brought* meet_warp(const Brought& brought, int what) {
  const int thread = static_cast<int>(place_now.thread.x);
  Warp& warp = block_now->warps[thread / kLanes];
  std::unique_lock<std::mutex> lock(block_now->mutex);
  Brought(&lanes)[kLanes] = warp.lanes[warp.meeting.generation % 2];
  lanes[thread % kLanes] = brought;
  meet(*block_now, lock, warp.meeting, what, "a warp");
  return lanes;
}

Copies& copies() { return copies_now; }

void launch(dim3 grid, dim3 block_dim, size_t shared_bytes, const std::function<void()>& kernel,
            size_t most_shared) {
  constexpr size_t kAtOnce = 2;
  check_launch(grid, block_dim, shared_bytes, most_shared);
  ++mutable_counts().launches;
  const std::vector<dim3> indices = shuffled_blocks(grid);
  for (size_t first = 0; first < indices.size(); first += kAtOnce) {
    const size_t count = std::min(kAtOnce, indices.size() - first);
    std::vector<Block> blocks(count);
    std::vector<std::unique_ptr<SharedMemory>> shared;
    std::vector<std::thread> threads;
    for (size_t b = 0; b < count; ++b) {
      blocks[b].all.expected = static_cast<int>(block_dim.x);
      blocks[b].warps = std::vector<Warp>(block_dim.x / kLanes);
      for (Warp& warp : blocks[b].warps) warp.meeting.expected = kLanes;
      shared.push_back(std::make_unique<SharedMemory>(shared_bytes));
      shared.back()->poison();
      ++mutable_counts().blocks;
    }
    std::vector<int> order(count * block_dim.x);
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
    std::shuffle(order.begin(), order.end(), random_source());
    for (const int i : order) {
      const size_t b = i / block_dim.x;
      const Place place{dim3(i % block_dim.x, 0, 0), indices[first + b], block_dim, grid,
                        shared[b]->data()};
      threads.emplace_back(run_thread, std::ref(blocks[b]), place, std::cref(kernel));
    }
    for (std::thread& thread : threads) thread.join();
    for (const Block& block : blocks) {
      if (!block.error.empty()) throw std::logic_error(block.error);
    }
  }
}

}  // namespace emulation
