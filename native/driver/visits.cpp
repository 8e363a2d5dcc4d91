// Two passes in one visit to each channel, whose elements the second one then finds in a cache.
#include <algorithm>
#include <atomic>

#include "batchnorm.hpp"
#include "caches.hpp"
#include "float_mode.hpp"
#include "huge_pages.hpp"
#include "packed_mask.hpp"
#include "sums.hpp"

namespace batchnorm {

namespace {

// Channels that one task visits once, so that its second pass finds them in a cache; 0 where
// passes one after another are better. Bits do not depend on it. `arrays`: of x's size, that both
// passes touch.
Index visit_width(const Step& step, Index arrays) {
    const Layout& layout = step.layout;
    // Where rows of channels are contiguous, a visit would walk a strip of each row. Hardware
    // prefetches along rows, so that strips take longer than passes, in caches and past them.
    if (by_rows(step)) return 0;
    const Index bytes = arrays * layout.outer * layout.inner * kBytes[static_cast<int>(step.type)];
    if (bytes == 0 || bytes > kShared * cache_bytes()) return 0;
    const Index threads = threads_of(step).count;
    const Index even = threads == 1 ? 1 : 4 * threads;  // visits, so that threads share them evenly
    const Index fitting = std::clamp<Index>(kShared * cache_bytes() / bytes, 1, kMaxChannels);
    const Index width = std::clamp<Index>(layout.channels / even, 1, fitting);
    return divide_up(layout.channels, width) >= even ? width : 0;
}

// f(first, end) for channels that are visited once, in parallel.
template <class F>
void for_each_visit(const Step& step, Index width, F f) {
    const Index channels = step.layout.channels;
    run_tasks(divide_up(channels, width), threads_of(step),
              [&](Index i) { f(i * width, std::min(channels, (i + 1) * width)); });
}

// f(block) for all positions of some channels.
template <class F>
void for_each_group(const Step& step, Index first, Index end, bool past, F f) {
    for (Index g = 0; g < step.layout.groups; ++g)
        f(Block{g, 0, units(step), first, end - first, false, past});
}

}  // namespace

void forward(const Step& given) {
    const PackedStep packed(given, given.options.batch || given.options.zero_padding);
    const Step& step = packed.step();
    const Index width = step.options.batch ? visit_width(step, step.residual ? 3 : 2) : 0;
    if (width == 0) {
        if (step.options.batch) moments(step);
        return normalize(step);
    }
    const KeepSubnormals mode;
    Moments moments(step);
    advise_huge_pages(step.y, step);
    const bool past = streams(step, step.y, step.mask && step.options.zero_padding);
    std::atomic<bool> updated{false};
    for_each_visit(step, width, [&](Index first, Index end) {
        moments.sum(first, end, Threads{});
        moments.finish(first, end);
        moments.repeat(first, end, Threads{});
        if (instructions().finish_channels(step, first, end))
            updated.store(true, std::memory_order_relaxed);
        for_each_group(step, first, end, past,
                       [&](const Block& block) { passes(step).normalize(step, block); });
    });
    count_batch(step, updated.load(std::memory_order_relaxed));
}

void backward(const Step& given, double* sums) {
    const PackedStep packed(given);
    const Step& step = packed.step();
    const bool summed = step.options.batch || step.dgamma || step.dbeta || step.dresidual;
    const Index arrays = 3 + (step.y ? 1 : 0) + (step.dresidual ? 1 : 0);
    const Index width = summed && step.dx ? visit_width(step, arrays) : 0;
    if (width == 0) {
        if (summed) reduce(step, sums);
        if (step.dx) apply(step, sums);
        return;
    }
    const KeepSubnormals mode;
    GradientSums found(step, sums);
    advise_huge_pages(step.dresidual, step);
    advise_huge_pages(step.dx, step);
    const bool past = streams(step, step.dx, bool(step.mask));
    for_each_visit(step, width, [&](Index first, Index end) {
        found.sum(first, end, Threads{});
        found.finish(first, end);
        found.repeat(first, end, Threads{});
        instructions().finish_gradients(step, sums, first, end);
        for_each_group(step, first, end, past,
                       [&](const Block& block) { passes(step).apply(step, block, sums); });
    });
}

}  // namespace batchnorm
