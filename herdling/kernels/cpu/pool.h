// Work shared out over a few threads: parallel(threads, chunks, body) calls body(0) .. body(chunks - 1).
//
// The caller works too, and a worker that the system does not schedule in time is not waited for:
// whoever is there takes what is left, and the caller closes the job when nothing is. (An
// OpenMP barrier waits for every thread, which costs a whole time slice where others use the
// machine.) Workers spin for some microseconds after a job, then sleep, so torch's own threads get the
// cores back. Which thread runs a chunk never changes a result: chunks write disjoint outputs.
#pragma once
#include <cstdint>
#include <type_traits>

namespace herdling {

using Body = void (*)(void* context, int64_t chunk);

void parallel(int threads, int64_t chunks, Body body, void* context);

template <class F>
void parallel(int threads, int64_t chunks, F&& body) {
  using Own = std::remove_reference_t<F>;
  parallel(threads, chunks, [](void* f, int64_t chunk) { (*static_cast<Own*>(f))(chunk); }, &body);
}

// Chunks of `unit` items so that each thread has about 32 of at least `least` bytes.
struct Chunks {
  int64_t size, count;
  Chunks(int64_t items, int64_t unit, int64_t item_bytes, int threads, int64_t least = 16384) {
    int64_t wanted = (items + threads * 32 - 1) / (threads * 32);
    int64_t small = (least + item_bytes - 1) / item_bytes;
    size = wanted > small ? wanted : small;
    size = (size + unit - 1) / unit * unit;
    count = (items + size - 1) / size;
  }
};

}  // namespace herdling
