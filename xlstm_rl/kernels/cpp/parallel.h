// Where the work runs: threads, floating-point mode and memory of a task.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace xlstm {

// torch's own pool: int torch_parallel_for(begin, end, grain, body, context), zero on success.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);
inline ParallelFor parallel_for_of_torch = nullptr;

// Denormals make closed gates many times slower and carry nothing: they count as zero while this lives.
class FlushToZero {
#if defined(__SSE__)
  unsigned before = _mm_getcsr();

 public:
  FlushToZero() { _mm_setcsr(before | 0x8040); }
  ~FlushToZero() { _mm_setcsr(before); }
  FlushToZero(const FlushToZero&) = delete;
#endif
};

// task(u) for every u below count, on `threads` threads if torch lends them.
template <class Task> void for_each(int64_t count, int64_t threads, const Task& task) {
  auto run = [](int64_t begin, int64_t end, void* context) {
    FlushToZero mode;
    for (int64_t u = begin; u < end; u++) (*static_cast<const Task*>(context))(u);
  };
  void* context = const_cast<Task*>(&task);
  if (threads <= 1 || count <= 1 || !parallel_for_of_torch)
    run(0, count, context);
  else if (parallel_for_of_torch(0, count, 1, run, context))
    throw std::runtime_error("a thread of torch's pool failed");
}

// Memory of a task, kept for the next one on the same thread.
template <class T> class Scratch {
  T* next;

 public:
  explicit Scratch(size_t count) {
    static thread_local std::vector<T> buffer;
    // Room to align, and for the padding of `take`.
    if (buffer.size() < count + 64 * 32) buffer = std::vector<T>(count + 64 * 32);
    next = aligned(buffer.data());
  }
  // Uninitialised and aligned to a cache line; 32 pieces at most.
  T* take(size_t count) {
    T* piece = next;
    next = aligned(next + count);
    return piece;
  }

 private:
  static T* aligned(T* p) { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t(63)); }
};

}  // namespace xlstm
