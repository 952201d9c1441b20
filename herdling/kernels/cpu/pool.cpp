#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace herdling {
namespace {

constexpr int kMostThreads = 256;
constexpr auto kSpin = std::chrono::microseconds(60);

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Pool {
  std::mutex one_job;  // callers from several Python threads: the second works alone
  std::mutex sleeping;
  std::condition_variable wake;
  std::atomic<int> asleep{0};
  int workers = 0;

  std::atomic<uint64_t> job{0};   // counts jobs; odd while one is open
  std::atomic<int> inside{0};     // workers that may look at the fields below
  // Each thread has a run of neighbouring chunks (its caches and prefetches know them), then helps others.
  struct alignas(64) Run {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  } runs[kMostThreads];
  int threads = 0;
  Body body = nullptr;
  void* context = nullptr;

  void drain(int thread) {
    for (int t = 0; t < threads; t++) {
      Run& run = runs[(thread + t) % threads];
      if (run.next.load(std::memory_order_relaxed) >= run.end) continue;
      for (int64_t i; (i = run.next.fetch_add(1, std::memory_order_relaxed)) < run.end;) body(context, i);
    }
  }

  void work(int thread) {
    for (uint64_t seen = 0;;) {
      uint64_t now = await(seen);
      seen = now;
      // Enter first, look second; the caller closes first and looks second: one of both sees the other.
      inside.fetch_add(1);
      if ((job.load() & 1) && thread < threads) drain(thread);
      inside.fetch_sub(1);
    }
  }

  bool news(uint64_t seen) const {
    uint64_t now = job.load();
    return now != seen && (now & 1);
  }

  uint64_t await(uint64_t seen) {
    auto end = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 32; i++) {
        if (news(seen)) return job.load();
        relax();
      }
    } while (std::chrono::steady_clock::now() < end);
    std::unique_lock<std::mutex> lock(sleeping);
    asleep.fetch_add(1);
    wake.wait(lock, [&] { return news(seen); });
    asleep.fetch_sub(1);
    return job.load();
  }

  void grow(int count) {
    for (; workers < count; workers++) std::thread([this, i = workers + 1] { work(i); }).detach();
  }

  void run(int count, int64_t chunks, Body f, void* c) {
    grow(count - 1);
    threads = count, body = f, context = c;
    for (int t = 0; t < count; t++) {
      runs[t].next.store(chunks * t / count, std::memory_order_relaxed);
      runs[t].end = chunks * (t + 1) / count;
    }
    job.fetch_add(1);  // open
    if (asleep.load()) {
      { std::lock_guard<std::mutex> lock(sleeping); }
      wake.notify_all();
    }
    drain(0);
    job.fetch_add(1);  // closed
    while (inside.load()) relax();
  }
};

Pool* pool = nullptr;
std::once_flag once;

void fresh() { pool = new Pool; }  // a forked child has none of its parent's threads; never deleted

}  // namespace

void parallel(int threads, int64_t chunks, Body body, void* context) {
  std::call_once(once, [] {
    fresh();
    pthread_atfork(nullptr, nullptr, fresh);
  });
  if (threads > kMostThreads) threads = kMostThreads;
  if (threads > 1 && chunks > 1) {
    std::unique_lock<std::mutex> lock(pool->one_job, std::try_to_lock);
    if (lock.owns_lock()) return pool->run(threads, chunks, body, context);
  }
  for (int64_t i = 0; i < chunks; i++) body(context, i);
}

}  // namespace herdling
