// A small pool of threads that lives as long as the process.
#pragma once

#include <cstdint>
#include <type_traits>

namespace maskattn {

// How many threads a call that asks for `asked` may use: one per core for 0.
int thread_count(int asked);

// Calls work(context, item, worker) for each item in [0, items), 0 <= worker < threads, each worker one item at a time
// and the items begun in their order. Returns when all are done. work must not throw. Safe to call from several threads
// at once and in a child after fork(). Fewer threads do the work where no more can be had.
void run_items(int threads, std::int64_t items, void (*work)(void* context, std::int64_t item, int worker),
               void* context);

// From now on items run on the team of an OpenMP runtime that the process has already: `parallel` is its GOMP_parallel,
// null for none. Two pools would take each other's cores, since such a runtime's threads spin for a while after a job.
// A child of fork() has no team and goes back to this pool.
using ParallelRegion = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
void share_team(ParallelRegion parallel);

// The same for a callable work(item, worker).
template <class Work>
void for_each_item(int threads, std::int64_t items, Work& work) {
    static_assert(std::is_nothrow_invocable_v<Work&, std::int64_t, int>, "exceptions never cross threads");
    run_items(
        threads, items,
        [](void* context, std::int64_t item, int worker) { (*static_cast<Work*>(context))(item, worker); }, &work);
}

}  // namespace maskattn
