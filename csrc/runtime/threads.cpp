// A job runs on the shared team, if there is one. Otherwise the caller adds it to a list and works on it, and idle
// threads join jobs that still have items. An idle thread spins briefly, long enough to bridge the phases of an
// operation and too short to take a core from torch's own threads, and then sleeps on a condition variable.
#include "runtime/threads.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace maskattn {
namespace {

constexpr int most_threads = 256;
constexpr auto spin_time = std::chrono::microseconds(20);

// The number that a thread had last among a job's workers. It takes it again if it can, since its cache may hold what
// this worker computed.
thread_local int usual_number = 1;

// The numbers of a job's workers but the caller's, 0, that no thread has taken yet.
class Numbers {
  public:
    explicit Numbers(int count) : last_(count) {}

    // Returns a number; at most as many threads may ask as there are.
    int take() {
        if (usual_number <= last_ && take(usual_number)) return usual_number;
        int number = 1;
        while (!take(number)) ++number;
        if (usual_number <= last_) usual_number = number;
        return number;
    }

  private:
    bool take(int number) {
        const std::uint64_t bit = std::uint64_t{1} << (number % 64);
        return (taken_[number / 64].fetch_or(bit, std::memory_order_relaxed) & bit) == 0;
    }

    const int last_;
    std::atomic<std::uint64_t> taken_[most_threads / 64]{};
};

struct Job {
    void (*work)(void*, std::int64_t, int);
    void* context;
    std::int64_t items;
    int seats;                          // threads that may still join
    Numbers numbers{seats};
    int helpers = 0;                    // threads at work besides the caller
    std::atomic<std::int64_t> next{0};  // next item
    const int* caller = &usual_number;  // each thread has its own
    Job* after = nullptr;               // next job of the pool's list

    void take_items(int worker) {
        for (;;) {
            const std::int64_t item = next.fetch_add(1, std::memory_order_relaxed);
            if (item >= items) return;
            work(context, item, worker);
        }
    }
    void take_seat() { take_items(&usual_number == caller ? 0 : numbers.take()); }
    bool has_room() const { return seats > 0 && next.load(std::memory_order_relaxed) < items; }
};

class Pool {
  public:
    void run(Job& job) {
        const int seats = job.seats;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            start_threads(seats);
            job.after = jobs_;
            jobs_ = &job;
            jobs_added_.fetch_add(1, std::memory_order_release);
        }
        if (seats == 1)
            wake_.notify_one();
        else
            wake_.notify_all();
        job.take_items(0);
        std::unique_lock<std::mutex> lock(mutex_);
        forget(job);
        done_.wait(lock, [&job] { return job.helpers == 0; });
    }

  private:
    void start_threads(int wanted) {
        while (threads_ < std::min(wanted, most_threads - 1)) {
            try {
                std::thread(&Pool::serve, this).detach();
            } catch (const std::system_error&) {
                return;  // the existing threads do the work
            }
            ++threads_;
        }
    }

    void forget(const Job& job) {
        Job** link = &jobs_;
        while (*link != &job) link = &(*link)->after;
        *link = job.after;
    }

    Job* find_job() const {
        Job* job = jobs_;
        while (job != nullptr && !job->has_room()) job = job->after;
        return job;
    }

    void spin_until_job(std::uint64_t seen) const {
        const auto end = std::chrono::steady_clock::now() + spin_time;
        while (jobs_added_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < end) {
        }
    }

    [[noreturn]] void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            Job* job = find_job();
            if (job == nullptr) {
                const std::uint64_t seen = jobs_added_.load(std::memory_order_relaxed);
                lock.unlock();
                spin_until_job(seen);
                lock.lock();
                wake_.wait(lock, [&] { return (job = find_job()) != nullptr; });
            }
            --job->seats;
            ++job->helpers;
            lock.unlock();
            job->take_seat();
            lock.lock();
            if (--job->helpers == 0) done_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    Job* jobs_ = nullptr;
    std::atomic<std::uint64_t> jobs_added_{0};
    int threads_ = 0;
};

// Never destroyed, since its threads may outlive static objects. A child of fork() has none of the threads, and possibly
// a locked mutex, so it makes a new pool.
std::atomic<Pool*> current_pool{nullptr};

// A team's threads do not survive fork() either, and their runtime would wait for them forever.
std::atomic<ParallelRegion> shared_team{nullptr};

void forget_pool() {
    current_pool.store(nullptr, std::memory_order_relaxed);
    shared_team.store(nullptr, std::memory_order_relaxed);
}

void watch_for_fork() {
    static const int registered = pthread_atfork(nullptr, nullptr, &forget_pool);
    static_cast<void>(registered);
}

Pool& pool() {
    watch_for_fork();
    Pool* found = current_pool.load(std::memory_order_acquire);
    if (found != nullptr) return *found;
    Pool* made = new Pool;
    if (current_pool.compare_exchange_strong(found, made, std::memory_order_acq_rel)) return *made;
    delete made;
    return *found;
}

}  // namespace

int thread_count(int asked) {
    // Counting the cores is a system call, which takes microseconds.
    const int wanted = asked > 0 ? asked : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    return std::min(wanted, most_threads);
}

void share_team(ParallelRegion parallel) {
    watch_for_fork();
    shared_team.store(parallel, std::memory_order_release);
}

void run_items(int threads, std::int64_t items, void (*work)(void*, std::int64_t, int), void* context) {
    Job job{work, context, items, static_cast<int>(std::min<std::int64_t>(threads, items)) - 1};
    const ParallelRegion parallel = shared_team.load(std::memory_order_acquire);
    if (job.seats > 0 && parallel != nullptr)
        parallel([](void* data) { static_cast<Job*>(data)->take_seat(); }, &job, static_cast<unsigned>(job.seats + 1), 0);
    else if (job.seats > 0)
        pool().run(job);
    else
        job.take_items(0);
}

}  // namespace maskattn
