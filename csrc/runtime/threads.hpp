// A small pool of threads that lives as long as the process.
#pragma once

#include <cstdint>
#include <type_traits>

namespace maskattn {

// Returns the number of threads that a call may use if it asks for `asked`; 0 means one per core.
int thread_count(int asked);

// Calls work(context, item, worker) for each item in [0, items), with 0 <= worker < threads. Each worker processes one
// item at a time, and items are begun in their order. Returns when all items are done. work must not throw. Safe to call
// from several threads at once and in a child after fork(). If threads cannot be created, fewer do the work.
void run_items(int threads, std::int64_t items, void (*work)(void* context, std::int64_t item, int worker),
               void* context);

// Makes later calls run on the team of an OpenMP runtime that the process has loaded, whose GOMP_parallel is `parallel`,
// or null for none. Two pools would compete for cores, since such a runtime's threads spin for a while after a job. A
// child of fork() has no team and uses this pool.
using ParallelRegion = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
void share_team(ParallelRegion parallel);

// Calls work(item, worker) for each item, like run_items.
template <class Work>
void for_each_item(int threads, std::int64_t items, Work& work) {
    static_assert(std::is_nothrow_invocable_v<Work&, std::int64_t, int>, "exceptions never cross threads");
    run_items(
        threads, items,
        [](void* context, std::int64_t item, int worker) { (*static_cast<Work*>(context))(item, worker); }, &work);
}

}  // namespace maskattn
