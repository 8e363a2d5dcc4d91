#include "pool.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "float_mode.hpp"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace batchnorm {
namespace {

constexpr int kMaxWorkers = 255;
constexpr int kSpins = 2000;  // some 20 µs: the next pass of a step often follows at once

inline void pause() {
#if defined(__SSE__)
    _mm_pause();
#endif
}

struct Job {
    void (*task)(void*, std::int64_t);
    void* context;
    std::int64_t tasks;
    int wanted;                  // workers beside the caller
    FloatMode mode;              // the caller's, so that bits do not depend on who computes
    int joined = 0;              // workers that ever took part; guarded by the pool's mutex
    std::atomic<int> active{0};  // workers that are in it now
    std::atomic<std::int64_t> next{0};
    Job* following = nullptr;  // in the pool's list

    void drain() {
        const FloatMode own = float_mode();  // the thread may be another library's
        set_float_mode(mode);
        for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
            task(context, i);
        }
        set_float_mode(own);
    }
    bool open() const { return joined < wanted && next.load(std::memory_order_relaxed) < tasks; }
};

// The caller drains the queue itself and waits only for workers that have begun: it never
// depends on a worker being scheduled, so it may be a worker of another pool.
class Pool {
  public:
    void run(Job& job) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            grow(job.wanted);
            job.following = jobs_;
            jobs_ = &job;
            waiting_.fetch_add(1, std::memory_order_release);
        }
        if (job.wanted == 1) {
            work_.notify_one();
        } else {
            work_.notify_all();
        }
        job.drain();
        {
            std::lock_guard<std::mutex> lock(mutex_);
            Job** link = &jobs_;
            while (*link != &job) link = &(*link)->following;
            *link = job.following;
            waiting_.fetch_sub(1, std::memory_order_relaxed);
        }
        for (int i = 0; i < kSpins; ++i) {
            if (job.active.load(std::memory_order_acquire) == 0) break;
            pause();
        }
        // Lock even when no worker is active: the last worker still uses the job until it
        // releases the lock.
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [&] { return job.active.load(std::memory_order_relaxed) == 0; });
    }

  private:
    void grow(int wanted) {
        wanted = std::min(wanted, kMaxWorkers);
        while (workers_ < wanted) {
            try {
                std::thread([this] { work(); }).detach();
            } catch (const std::exception&) {
                return;  // the system gives no more threads: the existing ones do all the work
            }
            ++workers_;
        }
    }

    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            Job* job = find();
            if (job == nullptr) {
                lock.unlock();
                for (int i = 0; i < kSpins; ++i) {
                    if (waiting_.load(std::memory_order_relaxed) > 0) break;
                    pause();
                }
                lock.lock();
                work_.wait(lock, [&] { return (job = find()) != nullptr; });
            }
            ++job->joined;
            job->active.fetch_add(1, std::memory_order_relaxed);
            lock.unlock();
            job->drain();
            lock.lock();
            if (job->active.fetch_sub(1, std::memory_order_release) == 1) done_.notify_all();
        }
    }

    Job* find() {
        Job* job = jobs_;
        while (job != nullptr && !job->open()) job = job->following;
        return job;
    }

    std::mutex mutex_;
    std::condition_variable work_, done_;
    Job* jobs_ = nullptr;
    std::atomic<int> waiting_{0};
    int workers_ = 0;
};

// A job lent to another pool. A worker that comes after the caller has left finds nothing to do,
// so that the caller waits for no thread to be scheduled and may be a worker of that pool.
class Lent {
  public:
    explicit Lent(Job& job) : job_(&job) {}

    static void work(void* data) {
        const std::unique_ptr<std::shared_ptr<Lent>> own(static_cast<std::shared_ptr<Lent>*>(data));
        Lent& lent = **own;
        Job* job;
        {
            std::lock_guard<std::mutex> lock(lent.mutex_);
            job = lent.job_;
            if (job == nullptr || !job->open()) return;
            ++job->joined;
            job->active.fetch_add(1, std::memory_order_relaxed);
        }
        job->drain();
        std::lock_guard<std::mutex> lock(lent.mutex_);
        if (job->active.fetch_sub(1, std::memory_order_release) == 1) lent.done_.notify_all();
    }

    // Ends the loan; returns when no worker holds the job.
    void call_in() {
        Job& job = *job_;
        for (int i = 0; i < kSpins; ++i) {
            if (job.active.load(std::memory_order_acquire) == 0) break;
            pause();
        }
        std::unique_lock<std::mutex> lock(mutex_);
        job_ = nullptr;
        done_.wait(lock, [&] { return job.active.load(std::memory_order_relaxed) == 0; });
    }

  private:
    std::mutex mutex_;
    std::condition_variable done_;
    Job* job_;
};

void run_lent(Job& job, const Scheduler& scheduler) {
    std::shared_ptr<Lent> lent;
    try {
        lent = std::make_shared<Lent>(job);
        for (int i = 0; i < job.wanted; ++i) {
            auto own = std::make_unique<std::shared_ptr<Lent>>(lent);
            scheduler.schedule(scheduler, Lent::work, own.get());
            own.release();
        }
    } catch (const std::bad_alloc&) {
        // Fewer workers then: the caller does what is left.
    }
    job.drain();
    if (lent) lent->call_in();
}

// Never destroyed: workers may outlive every static object. After fork the child has none of
// the parent's workers, and the mutex may stay locked forever; the child makes its own pool.
std::atomic<Pool*> the_pool{nullptr};
std::atomic<bool> forked{false};  // another library's team does not survive a fork

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
    the_pool.store(nullptr, std::memory_order_relaxed);
    forked.store(true, std::memory_order_relaxed);
});
#endif

Pool& pool() {
    Pool* found = the_pool.load(std::memory_order_acquire);
    if (found != nullptr) return *found;
    Pool* fresh = new Pool;
    if (the_pool.compare_exchange_strong(found, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;  // another thread was faster; no worker has seen this one
    return *found;
}

}  // namespace

void run_tasks(std::int64_t tasks, Threads threads, void (*task)(void*, std::int64_t),
               void* context) {
    if (threads.count > tasks) threads.count = static_cast<int>(tasks);
    if (threads.count <= 1) {
        for (std::int64_t i = 0; i < tasks; ++i) task(context, i);
        return;
    }
    Job job{task, context, tasks, threads.count - 1, float_mode()};
    if (threads.team != nullptr && !forked.load(std::memory_order_relaxed)) {
        threads.team([](void* data) { static_cast<Job*>(data)->drain(); }, &job,
                     static_cast<unsigned>(threads.count), 0);
    } else if (threads.scheduler != nullptr) {
        run_lent(job, *threads.scheduler);
    } else {
        pool().run(job);
    }
}

}  // namespace batchnorm
