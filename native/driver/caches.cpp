#include "caches.hpp"

#if defined(__linux__)
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <thread>

#include "passes/rows.hpp"

namespace batchnorm {

Index cache_bytes() {
    static const Index bytes = [] {
        Index found = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
        found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
        return std::max<Index>(found, Index(1) << 19);
    }();
    return bytes;
}

namespace {

// Bytes of the cache that cores share, as far as this process may count on it: a virtual machine is
// told of one that it shares with others.
Index shared_bytes() {
    static const Index bytes = [] {
        const Index cores = std::max<Index>(std::thread::hardware_concurrency(), 1);
        const Index most = kShared * cache_bytes() * cores;
        Index found = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
        found = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
        return found > 0 ? std::min(found, most) : most;
    }();
    return bytes;
}

std::atomic<Index> wanted{-1};

constexpr Index kLine = 64;  // bytes of a cache's line

// A line that two stretches share is written past the caches in two parts, which memory has to
// merge: images of 14 x 14 take longer so. In stretches of so many bytes such lines are few.
constexpr Index kLongStretch = 8000;

// True if most lines of an output are written at once, by one stretch of one channel or one row.
bool fills_lines(const Layout& layout, Index element, bool rows, std::uintptr_t address) {
    const Index stretch = (rows ? layout.channels : 1) * layout.inner * element;
    return stretch >= kLongStretch || (stretch % kLine == 0 && address % kLine == 0);
}

}  // namespace

bool streams(const Step& step, const Array& output, bool padded) {
    if (padded && by_rows(step)) return false;  // rows of padding are written a second time
    const Layout& layout = step.layout;
    const Index element = kBytes[static_cast<int>(step.type)];
    const auto address = reinterpret_cast<std::uintptr_t>(output.data);
    if (address % static_cast<std::uintptr_t>(element) != 0) return false;  // never a whole vector
    const Index bytes = layout.outer * layout.channels * layout.inner * element;
    const Index most = wanted.load(std::memory_order_relaxed);
    if (most >= 0) return 2 * bytes > most;
    return 2 * bytes > shared_bytes() && fills_lines(layout, element, by_rows(step), address);
}

void stream_above(Index bytes) { wanted.store(bytes, std::memory_order_relaxed); }

}  // namespace batchnorm
