// Division of a layer's work among the threads of a parallel region, with work stealing.
#pragma once
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "shape.h"

namespace large_kernel {

// Each thread starts with its own range of tasks, the same range in every call, so that its caches may still hold the
// data. A thread that runs out of tasks steals from the far end of another thread's range: on a shared machine cores
// rarely run at the same speed.
class WorkStealingTasks {
 public:
  // Tasks 0 to count - 1. A thread takes `chunk` tasks at a time, fewer if that would divide the work unevenly.
  explicit WorkStealingTasks(std::ptrdiff_t count, std::ptrdiff_t chunk = 1)
      : count_(count),
        chunk_(std::max({std::min(chunk, count / (4 * omp_get_max_threads())), count >> 31, std::ptrdiff_t(1)})),
        ranges_(omp_get_max_threads()) {
    const std::uint64_t chunks = (count + chunk_ - 1) / chunk_, ranges = ranges_.size();
    for (std::uint64_t i = 0; i < ranges; i++)
      ranges_[i].left = (chunks * i / ranges) << 32 | chunks * (i + 1) / ranges;
  }

  // Calls f(begin, end) for chunks until none are left. To be called by the threads of a parallel region.
  template <class F>
  void for_each_chunk(F f) {
    const std::size_t own = omp_get_thread_num();
    for (std::size_t i = 0; i < ranges_.size(); i++) {
      std::atomic<std::uint64_t>& left = ranges_[(own + i) % ranges_.size()].left;
      for (std::uint64_t now = left.load(std::memory_order_relaxed); (now >> 32) < (std::uint32_t)now;) {
        const std::ptrdiff_t taken = i == 0 ? now >> 32 : (std::uint32_t)now - 1;
        const std::uint64_t then = i == 0 ? now + (std::uint64_t(1) << 32) : now - 1;
        if (!left.compare_exchange_weak(now, then, std::memory_order_relaxed)) continue;
        f(taken * chunk_, std::min(count_, (taken + 1) * chunk_));
        now = left.load(std::memory_order_relaxed);
      }
    }
  }

  // Calls f(task).
  template <class F>
  void for_each(F f) {
    for_each_chunk([&](std::ptrdiff_t begin, std::ptrdiff_t end) {
      for (std::ptrdiff_t task = begin; task < end; task++) f(task);
    });
  }

 private:
  struct alignas(64) Range {
    std::atomic<std::uint64_t> left;  // the range's chunks: the first in the upper half, the end in the lower half
  };
  const std::ptrdiff_t count_, chunk_;
  std::vector<Range> ranges_;
};

// The number of slices to cut each of `tasks` equal tasks into, so that all threads stay busy to the end.
inline int slice_count(std::ptrdiff_t tasks, int limit) {
  const std::ptrdiff_t wanted = 4 * (std::ptrdiff_t)omp_get_max_threads();
  if (tasks >= wanted || omp_get_max_threads() == 1) return 1;
  return (int)std::min<std::ptrdiff_t>((wanted + tasks - 1) / tasks, limit);
}

// The tasks of a correlation: slice by slice, image by image, block of channels by block of channels. A thread takes
// `per_block` of them at a time, if possible a whole block of channels, and packs the weights of the block once.
struct CorrelationTasks {
  int threads, slices;
  std::ptrdiff_t per_block, count;

  explicit CorrelationTasks(const Shape& s)
      : threads(omp_get_max_threads()),
        slices(slice_count((std::ptrdiff_t)s.blocks() * s.batch, (s.height + 15) / 16)),
        per_block((std::ptrdiff_t)s.batch * slices),
        count(per_block * s.blocks()) {}
};

}  // namespace large_kernel
