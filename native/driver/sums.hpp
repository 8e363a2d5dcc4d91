// Sums over the batch and what follows from them: moments, and the sums of gradients.
#pragma once

#include <algorithm>

#include "anchors.hpp"
#include "batchnorm.hpp"
#include "reduction.hpp"

namespace batchnorm {

// f(group, i) for every statistic of the channels from first on.
template <class F>
void for_statistics(const Layout& layout, Index first, Index end, F f) {
    for (Index g = 0; g < layout.groups; ++g) {
        for (Index i = g * layout.channels + first; i < g * layout.channels + end; ++i) f(g, i);
    }
}

// The channels [first, end) that some group fails in, as few stretches: each is another pass.
template <class Fails, class F>
void for_failed(const Layout& layout, Index first, Index end, Fails fails, F f) {
    bool failed = false;
    for_statistics(layout, first, end, [&](Index g, Index i) { failed |= fails(g, i); });
    if (!failed) return;
    constexpr int kMost = 4;
    Index bounds[kMost][2];
    int found = 0;
    for (Index c = first; c < end; ++c) {
        bool any = false;
        for_statistics(layout, c, c + 1, [&](Index g, Index i) { any = any || fails(g, i); });
        if (!any) continue;
        if (found > 0 && (bounds[found - 1][1] == c || found == kMost)) {
            bounds[found - 1][1] = c + 1;
        } else {
            bounds[found][0] = c, bounds[found][1] = c + 1, ++found;
        }
    }
    for (int i = 0; i < found; ++i) f(bounds[i][0], bounds[i][1]);
}

// Moments of all channels or of some.
class Moments {
  public:
    explicit Moments(const Step& step) : step_(step), reduction_(step) {
        for (Index g = 0; g < step.layout.groups; ++g)
            step.statistics.count()[g] = static_cast<double>(reduction_.blocks().count(g));
    }

    void sum(Index first, Index end, const Threads& threads) {
        for (Index g = 0; g < step_.layout.groups; ++g)
            anchors_.set(g, first, end, !reduction_.is_narrow(g));
        reduction_.run(passes(step_).moments, first, end, threads);
        if (step_.type != Type::f64) return;
        finish(first, end);  // no type is wider: sums are taken again, around their own mean
        reduction_.run(passes(step_).moments, first, end, threads);
    }

    // From sums to moments.
    void finish(Index first, Index end) {
        for (Index g = 0; g < step_.layout.groups; ++g)
            finish(g, first, end, reduction_.is_narrow(g));
    }

    // Sums in double where those in float32 did not do.
    void repeat(Index first, Index end, const Threads& threads) {
        const auto fails = [&](Index, Index i) {
            return step_.statistics.row(Statistics::var)[i] == kUnsound;
        };
        for_failed(step_.layout, first, end, fails, [&](Index from, Index to) {
            for_statistics(step_.layout, from, to, [&](Index g, Index i) {
                const Index c = i - g * step_.layout.channels;
                if (fails(g, i)) anchors_.set(g, c, c + 1, true);
            });
            reduction_.run(passes(step_).moments, from, to, threads, true);
            for_statistics(step_.layout, from, to, [&](Index g, Index i) {
                const Index c = i - g * step_.layout.channels;
                if (fails(g, i)) finish(g, c, c + 1, false);
            });
        });
    }

  private:
    void finish(Index g, Index first, Index end, bool narrow) {
        constexpr Index kPart = 128;
        const Statistics& s = step_.statistics;
        double sum[kPart], square[kPart];
        for (Index c = first; c < end; c += kPart) {
            const Index n = std::min(kPart, end - c), i = g * step_.layout.channels + c;
            reduction_.totals(i, n, sum, square);
            instructions().finish_moments(s, i, n, s.count()[g], sum, square,
                                          narrow ? &step_.options.eps : nullptr);
        }
    }

    const Step& step_;
    Reduction reduction_;
    Anchors anchors_{step_, reduction_.blocks()};
};

// Sums of g and g (x - mean) of all channels or of some.
class GradientSums {
  public:
    GradientSums(const Step& step, double* sums) : step_(step), reduction_(step), sums_(sums) {}

    void sum(Index first, Index end, const Threads& threads) {
        reduction_.run(passes(step_).reduce, first, end, threads);
    }

    void finish(Index first, Index end) {
        for (Index g = 0; g < step_.layout.groups; ++g)
            take(g * step_.layout.channels + first, end - first);
    }

    // Sums in double where those in float32 did not do.
    void repeat(Index first, Index end, const Threads& threads) {
        const auto fails = [&](Index g, Index i) {
            if (!reduction_.is_narrow(g)) return false;
            const Statistics& s = step_.statistics;
            return !is_sound_gradient(s.count()[g], s.row(Statistics::rstd)[i], sums_[i],
                                      sums_[s.size + i]);
        };
        for_failed(step_.layout, first, end, fails, [&](Index from, Index to) {
            reduction_.run(passes(step_).reduce, from, to, threads, true);
            for_statistics(step_.layout, from, to, [&](Index g, Index i) {
                if (fails(g, i)) take(i, 1);
            });
        });
    }

  private:
    void take(Index i, Index n) {
        reduction_.totals(i, n, sums_ + i, sums_ + step_.statistics.size + i);
    }

    const Step& step_;
    Reduction reduction_;
    double* sums_;
};

inline void count_batch(const Step& step, bool updated) {
    if (updated && step.running.batches != nullptr) ++*step.running.batches;
}

}  // namespace batchnorm
