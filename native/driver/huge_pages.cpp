#include "huge_pages.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace batchnorm {

void advise_huge_pages([[maybe_unused]] const Array& array, [[maybe_unused]] const Step& step) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t kHuge = std::uintptr_t(1) << 21;
    constexpr Index kSmallest = Index(4) << 20;  // below, system calls cost more than they save
    const Layout& layout = step.layout;
    if (!array || array.stride != layout.channels * layout.inner) return;
    const Index bytes = layout.outer * array.stride * kBytes[static_cast<int>(step.type)];
    if (bytes < kSmallest) return;
    const auto begin = reinterpret_cast<std::uintptr_t>(array.data);
    const std::uintptr_t first = (begin + kHuge - 1) & ~(kHuge - 1);
    const std::uintptr_t last = (begin + static_cast<std::uintptr_t>(bytes)) & ~(kHuge - 1);
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace batchnorm
