// Steps under special conditions: several at once, other rounding modes, after a fork.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <thread>

#include "compare.hpp"
#include "lending.hpp"

// Defined only under some sanitizer, and under the thread sanitizer.
BATCHNORM_OPTIONAL(void, __sanitizer_set_death_callback, void (*)());
BATCHNORM_OPTIONAL(void, __tsan_init, );

namespace batchnorm::tests {

// A case that several threads share, whatever the seed.
inline Case draw_shared_case(std::uint64_t seed) {
    for (;; ++seed) {
        Case c = draw_case(seed);
        if (c.problem.x.size() > 70000 && c.problem.x.size() < 200000) return c;
    }
}

// Steps of several threads at once, each on data of its own.
inline void check_concurrency(std::uint64_t seed, int callers, int steps) {
    std::vector<std::string> failures(static_cast<std::size_t>(callers));
    std::vector<std::thread> threads;
    for (int t = 0; t < callers; ++t) {
        threads.emplace_back([&, t] {
            try {
                const Case c = draw_shared_case(seed + static_cast<std::uint64_t>(100 * t));
                Inputs inputs(c);
                const Result alone = run(inputs, {1});
                for (int s = 0; s < steps; ++s) compare_bits(run(inputs, {2 + (s + t) % 3}), alone);
            } catch (const std::exception& failure) {
                failures[static_cast<std::size_t>(t)] = failure.what();
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    for (const std::string& failure : failures) {
        if (!failure.empty()) throw Failure("steps at the same time: " + failure);
    }
}

// The rounding mode is the caller's, whichever thread computes, and after any earlier call.
inline void check_rounding(std::uint64_t seed) {
    const Case c = draw_shared_case(seed);
    Inputs inputs(c);
    const Result usual = run(inputs, {4});
    for (int mode : {FE_UPWARD, FE_TOWARDZERO}) {
        std::fesetround(mode);
        const Result alone = run(inputs, {1}), shared = run(inputs, {4}),
                     lent = run(inputs, {4, lend_threads});
        const bool kept = std::fegetround() == mode;
        std::fesetround(FE_TONEAREST);
        if (!kept) throw Failure("the rounding mode was changed");
        compare_bits(shared, alone), compare_bits(lent, alone);
        compare_bits(run(inputs, {4}), usual);
    }
}

// A team that fork left behind in the parent.
inline void refuse_threads(void (*)(void*), void*, unsigned, unsigned) { _exit(2); }

// Exit status of a child that takes the same step on several threads.
inline int step_in_child(Inputs& inputs, const Result& expected) {
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);  // a child that waits forever for its parent's threads fails
        try {
            compare_bits(run(inputs, {4}), expected);
            compare_bits(run(inputs, {4, refuse_threads}), expected);
        } catch (const std::exception&) {
            _exit(1);
        }
        _exit(0);
    }
    int status = -1;
    if (child > 0) waitpid(child, &status, 0);
    return status;
}

// The pool's threads stay behind in the parent. With `busy`, others are in the midst of a step.
inline void check_fork(std::uint64_t seed, bool busy) {
    const Case c = draw_shared_case(seed);
    Inputs inputs(c);
    const Result expected = run(inputs, {4});
    std::atomic<bool> stop{false};
    std::thread other([&] {
        if (!busy) return;
        Inputs own(c);
        while (!stop.load()) run(own, {4});
    });
    int status = 0;
    for (int i = 0; i < 5 && status == 0; ++i) status = step_in_child(inputs, expected);
    stop.store(true);
    other.join();
    if (status != 0) throw Failure("a step in a child process failed");
    compare_bits(run(inputs, {4}), expected);
}

inline bool under_thread_sanitizer() { return __tsan_init != nullptr; }
inline bool under_any_sanitizer() { return __sanitizer_set_death_callback != nullptr; }

inline void check_processes(std::uint64_t seed) {
    // It refuses to start threads in the child of a process that has several.
    if (under_thread_sanitizer()) return;
    check_fork(seed, false);
    // A sanitizer's own locks may be held by another thread at the fork.
    if (!under_any_sanitizer()) check_fork(seed, true);
}

}  // namespace batchnorm::tests
