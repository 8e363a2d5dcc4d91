// The four passes, each in tasks.
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

// f(first, end) for parts of the channels, in parallel.
template <class F>
void for_channels(const Step& step, F f) {
    constexpr Index kPart = 1024;
    const Index channels = step.layout.channels, parts = divide_up(channels, kPart);
    const Index work = 4 * step.layout.statistics();
    run_tasks(parts, threads_for(step, work),
              [&](Index i) { f(i * kPart, std::min(channels, (i + 1) * kPart)); });
}

// Tasks of an elementwise pass, which may write past the caches; last ones first: the part that a
// sum has read last is in cache.
template <class F>
void for_each_block(const Step& step, bool past, F f) {
    const Layout& layout = step.layout;
    const Grid grid(step, units(step), kWideLanes);
    run_tasks(grid.tasks(), threads_of(step), [&](Index forward) {
        const Index i = grid.tasks() - 1 - forward;
        const Index part = i % grid.parts, first = part * grid.width;
        const Share share = even_share(units(step), grid.blocks, i / grid.parts % grid.blocks);
        if (share.rows == 0) return;
        f(Block{i / grid.parts / grid.blocks, share.first, share.rows, first,
                std::min(grid.width, layout.channels - first), false, past});
    });
}

bool is_empty(const Layout& layout) { return layout.channels == 0; }

}  // namespace

void moments(const Step& given) {
    const KeepSubnormals mode;
    const PackedStep packed(given);
    const Step& step = packed.step();
    if (is_empty(step.layout)) {
        std::fill_n(step.statistics.count(), step.layout.groups, 0.0);
        return;
    }
    Moments moments(step);
    const Threads threads = threads_of(step);
    moments.sum(0, step.layout.channels, threads);
    for_channels(step, [&](Index first, Index end) { moments.finish(first, end); });
    moments.repeat(0, step.layout.channels, threads);
}

void normalize(const Step& given) {
    const KeepSubnormals mode;
    const PackedStep packed(given, given.options.zero_padding);
    const Step& step = packed.step();
    if (is_empty(step.layout)) return;
    std::atomic<bool> updated{false};
    for_channels(step, [&](Index first, Index end) {
        if (instructions().finish_channels(step, first, end))
            updated.store(true, std::memory_order_relaxed);
    });
    count_batch(step, updated.load(std::memory_order_relaxed));
    advise_huge_pages(step.y, step);
    const bool past = streams(step, step.y, step.mask && step.options.zero_padding);
    for_each_block(step, past, [&](const Block& block) { passes(step).normalize(step, block); });
}

void reduce(const Step& given, double* sums) {
    const KeepSubnormals mode;
    const PackedStep packed(given);
    const Step& step = packed.step();
    if (is_empty(step.layout)) return;
    GradientSums found(step, sums);
    const Threads threads = threads_of(step);
    advise_huge_pages(step.dresidual, step);
    found.sum(0, step.layout.channels, threads);
    for_channels(step, [&](Index first, Index end) { found.finish(first, end); });
    found.repeat(0, step.layout.channels, threads);
    for_channels(step, [&](Index first, Index end) {
        instructions().finish_gradients(step, sums, first, end);
    });
}

void apply(const Step& given, const double* sums) {
    const KeepSubnormals mode;
    const PackedStep packed(given);
    const Step& step = packed.step();
    if (is_empty(step.layout)) return;
    advise_huge_pages(step.dx, step);
    const bool past = streams(step, step.dx, bool(step.mask));
    for_each_block(step, past, [&](const Block& block) { passes(step).apply(step, block, sums); });
}

}  // namespace batchnorm
