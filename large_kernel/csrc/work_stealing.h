// Tasks that the threads of a parallel region share.
#pragma once
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace large_kernel {

// Each thread begins with a part of its own, the same tasks in every call, since its caches may hold what they need. One that is
// done takes from the far end of another's: the cores of a machine that others use too seldom go at the same speed.
class WorkStealingTasks {
 public:
  // Tasks 0 to count - 1, of which threads take `chunk` at a time, or fewer where these would be unequal shares.
  explicit WorkStealingTasks(std::ptrdiff_t count, std::ptrdiff_t chunk = 1)
      : count_(count), chunk_(std::max({std::min(chunk, count / (4 * omp_get_max_threads())), count >> 31, std::ptrdiff_t(1)})),
        ranges_(omp_get_max_threads()) {
    const std::uint64_t chunks = (count + chunk_ - 1) / chunk_, ranges = ranges_.size();
    for (std::uint64_t i = 0; i < ranges; i++) ranges_[i].left = (chunks * i / ranges) << 32 | chunks * (i + 1) / ranges;
  }

  // Calls f(begin, end) for chunks, in a parallel region, until none is left.
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
    std::atomic<std::uint64_t> left;  // chunks: the first one in the upper half, the end in the lower
  };
  const std::ptrdiff_t count_, chunk_;
  std::vector<Range> ranges_;
};

}  // namespace large_kernel
