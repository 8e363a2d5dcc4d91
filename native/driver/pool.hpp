// Threads that share numbered tasks.
#pragma once

#include <cstdint>
#include <type_traits>

namespace batchnorm {

// Calls f(data) on a team of threads, one of them the caller, and returns when all have returned:
// OpenMP's GOMP_parallel.
using Team = void (*)(void (*f)(void*), void* data, unsigned threads, unsigned flags);

// Another library's pool: `schedule` makes it run task(data) at some time, perhaps only after the
// call that scheduled the task has returned.
struct Scheduler {
    void (*schedule)(const Scheduler& self, void (*task)(void* data), void* data);
};

// The number of threads and their owner; this library's own where neither pointer is given.
struct Threads {
    int count = 1;
    Team team = nullptr;
    const Scheduler* scheduler = nullptr;
};

// Runs task(context, i) for every i below `tasks`, on up to `threads.count` threads, the caller
// being one; returns when all are done. `task` must not throw. May be called from several threads
// at once, from a task of another library's pool, and in a child process after fork.
void run_tasks(std::int64_t tasks, Threads threads, void (*task)(void*, std::int64_t),
               void* context);

template <class F>
void run_tasks(std::int64_t tasks, Threads threads, F&& f) {
    run_tasks(
        tasks, threads,
        [](void* context, std::int64_t i) {
            (*static_cast<typename std::remove_reference<F>::type*>(context))(i);
        },
        &f);
}

}  // namespace batchnorm
