#pragma once

// Two threads on work over [0, n), as parallel_for cuts it: for the programs that sanitizers watch.
#include <cstdint>
#include <functional>
#include <thread>

// Parts are of whole `step`s.
inline void halves(int64_t n, int64_t step, const std::function<void(int64_t, int64_t)>& work) {
  const int64_t middle = n / 2 / step * step;
  std::thread other(work, middle, n);
  work(0, middle);
  other.join();
}

inline void halves(int64_t n, const std::function<void(int64_t, int64_t)>& work) { halves(n, 1, work); }
