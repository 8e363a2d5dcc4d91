// Other libraries' threads, as OpenMP and XLA would lend them.
#pragma once

#include <thread>
#include <utility>
#include <vector>

#include "driver/pool.hpp"

namespace batchnorm::tests {

// Another library's threads, as OpenMP would lend them.
inline void lend_threads(void (*f)(void*), void* data, unsigned count, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < count; ++i) others.emplace_back(f, data);
    f(data);
    for (std::thread& other : others) other.join();
}

// Another library's pool. Its threads begin at any time; if all are busy, only after the call is
// over, when no task may be left.
class OtherPool : public Scheduler {
  public:
    explicit OtherPool(bool busy) : Scheduler{&OtherPool::schedule_on}, busy_(busy) {}

    ~OtherPool() {
        for (const auto& [task, data] : late_) task(data);
        for (std::thread& thread : threads_) thread.join();
    }

  private:
    static void schedule_on(const Scheduler& self, void (*task)(void*), void* data) {
        auto& pool = const_cast<OtherPool&>(static_cast<const OtherPool&>(self));
        if (pool.busy_) return pool.late_.emplace_back(task, data), void();
        pool.threads_.emplace_back([task, data] {
            std::this_thread::yield();
            task(data);
        });
    }

    bool busy_;
    std::vector<std::thread> threads_;
    std::vector<std::pair<void (*)(void*), void*>> late_;
};

}  // namespace batchnorm::tests
