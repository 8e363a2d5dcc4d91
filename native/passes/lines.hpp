// The computation on one line of contiguous elements: the only place of per-element formulas.
#pragma once

#include "lanes.hpp"
#include "passes.hpp"

namespace batchnorm::BATCHNORM_ISA {

// A vector of each. `mean` is the mean as one number of the arithmetic, from which x has an exact
// difference at a large offset; what that rounding took from the mean is in `offset` and `shift`
// (S3).
template <class V>
struct Coefficients {
    V mean, scale, offset;  // y = (x - mean) scale + offset
    V along, shift;         // dx = (g + (x - mean) along + shift) scale
};

template <class V>
BATCHNORM_INLINE V affine(V x, const Coefficients<V>& k) {
    return (x - k.mean) * k.scale + k.offset;
}

// `y <= 0` rather than `y > 0`, so that NaN stays NaN; 0 itself is on the negative side (S18).
template <Activation kAct, class V>
BATCHNORM_INLINE V select(V y, V value) {
    if constexpr (kAct == Activation::none) {
        return value;
    } else if constexpr (kAct == Activation::relu) {
        return y <= 0 ? V{} : value;
    } else {
        return y <= 0 ? value * all_lanes(decltype(y[0] + y[0])(kNegativeSlope)) : value;
    }
}

template <Activation kAct, class V>
BATCHNORM_INLINE V activate(V y) {
    return select<kAct>(y, y);
}

template <Activation kAct, class V>
BATCHNORM_INLINE V gate(V dy, V y) {
    return select<kAct>(y, dy);
}

template <class V>
BATCHNORM_INLINE V gradient(V g, V x, const Coefficients<V>& k) {
    return (g + ((x - k.mean) * k.along + k.shift)) * k.scale;
}

template <Activation kAct>
struct Constant {
    static constexpr Activation value = kAct;
};

// Calls f with the activation as a constant.
template <class F>
BATCHNORM_INLINE void with_activation(Activation activation, F f) {
    switch (activation) {
        case Activation::none:
            return f(Constant<Activation::none>{});
        case Activation::relu:
            return f(Constant<Activation::relu>{});
        case Activation::leaky_relu:
            return f(Constant<Activation::leaky_relu>{});
    }
}

template <class T>
inline const T* at(const T* p, Index i) {
    return p == nullptr ? nullptr : p + i;
}

// Coefficients of a block, one for each lane: channels repeat along a line of several rows.
template <class F, Index kLanes>
struct Lanes {
    using V = Vector<F>;
    static constexpr Index kAll = kLanes + kWidth<F>;  // the last vector may be read as a whole
    F mean[kAll], scale[kAll], offset[kAll], along[kAll], shift[kAll];

    Lanes(const Step& step, const Block& block, Index lanes, const double* sums = nullptr) {
        const Statistics& s = step.statistics;
        const Index first = block.group * step.layout.channels + block.channel;
        const Index span = by_rows(step) ? step.layout.inner : 1, width = block.channels * span;
        const double count = s.count()[block.group];
        const double weight = count > 0 ? 1.0 / count : 0.0;
        if (lanes == 0) return;
        for (Index c = 0; c < block.channels; ++c) {
            set(s, c * span, first + c);
            if (sums != nullptr) set_sums(s, c * span, first + c, weight, sums);
        }
        if (span > 1) {
            F* const all[] = {mean, scale, offset, along, shift};
            for (int i = 0; i < (sums != nullptr ? 5 : 3); ++i)
                spread(all[i], block.channels, span);
        }
        for (Index l = width; l < lanes; ++l) {
            const Index c = l - width;
            mean[l] = mean[c], scale[l] = scale[c], offset[l] = offset[c];
            if (sums != nullptr) along[l] = along[c], shift[l] = shift[c];
        }
    }

    BATCHNORM_INLINE void set(const Statistics& s, Index l, Index c) {
        mean[l] = F(s.row(Statistics::mean)[c]);
        scale[l] = F(s.row(Statistics::scale)[c]);
        const double rest = rest_of_mean(s, l, c) * s.row(Statistics::scale)[c];
        offset[l] = F(s.row(Statistics::offset)[c] - rest);
    }

    BATCHNORM_INLINE void set_sums(const Statistics& s, Index l, Index c, double weight,
                                   const double* sums) {
        const double rstd = s.row(Statistics::rstd)[c];
        const double slope = -weight * rstd * rstd * sums[s.size + c];
        along[l] = F(slope);
        // Cancels the gradient of a single row to the bit (S7).
        shift[l] = F(-weight * sums[c] - rest_of_mean(s, l, c) * slope);
    }

    // Every lane of a channel gets the value of its first.
    static void spread(F* all, Index channels, Index span) {
        for (Index c = 0; c < channels; ++c) {
            const F value = all[c * span];
            for (Index l = c * span, end = l + span; l < end; ++l) all[l] = value;
        }
    }

    // What the mean as one number of type F leaves out.
    BATCHNORM_INLINE double rest_of_mean(const Statistics& s, Index l, Index c) const {
        const double value = s.row(Statistics::mean)[c];
        return (value - double(mean[l])) + s.row(Statistics::low)[c];
    }

    // From lane l on.
    BATCHNORM_INLINE Coefficients<V> from(Index l) const {
        return {load_lanes(mean + l), load_lanes(scale + l), load_lanes(offset + l),
                load_lanes(along + l), load_lanes(shift + l)};
    }
    // Lane l everywhere.
    BATCHNORM_INLINE Coefficients<V> all(Index l) const {
        return {all_lanes(mean[l]), all_lanes(scale[l]), all_lanes(offset[l]), all_lanes(along[l]),
                all_lanes(shift[l])};
    }
};

// Calls f(i, coefficients, access) for the vectors of n elements: those of channel number c, or,
// where `kByLane`, with coefficients lane by lane.
template <class T, bool kByLane, class L, class F>
BATCHNORM_INLINE void for_vectors(const L& lanes, Index c, Index n, const F& f) {
    constexpr Index kStep = kWidth<T>;
    const auto all = lanes.all(c);
    const auto at = [&](Index i) BATCHNORM_INLINE_LAMBDA {
        if constexpr (kByLane) {
            return lanes.from(i);
        } else {
            return all;
        }
    };
    Index i = 0;
    for (; i + kStep <= n; i += kStep) f(i, at(i), Whole{});
    if (i < n) f(i, at(i), Some{n - i});
}

// Elements from p on until the next one that is aligned to a vector.
template <class T>
BATCHNORM_INLINE Index until_aligned(const T* p) {
    constexpr Index kStep = kWidth<T>;
    const auto at = reinterpret_cast<std::uintptr_t>(p) / sizeof(T);
    return Index((kStep - at % kStep) % kStep);
}

// The same where f stores in `out`, in whole vectors that are aligned there: stores across the
// bounds of a cache's lines take twice as long.
template <class T, bool kByLane, class L, class F>
BATCHNORM_INLINE void fill_vectors(const L& lanes, Index c, T* out, Index n, bool streams,
                                   const F& f) {
    constexpr Index kStep = kWidth<T>;
    constexpr bool kSplits = kStep * sizeof(T) == 64;
    if (n < 2 * kStep || !(kSplits || streams)) return for_vectors<T, kByLane>(lanes, c, n, f);
    const auto all = lanes.all(c);
    const auto at = [&](Index i) BATCHNORM_INLINE_LAMBDA {
        if constexpr (kByLane) {
            return lanes.from(i);
        } else {
            return all;
        }
    };
    Index i = until_aligned(out);
    if (i > 0) f(0, at(0), Some{i});
    if (streams) {
        for (; i + kStep <= n; i += kStep) f(i, at(i), Streamed{});
    } else {
        for (; i + kStep <= n; i += kStep) f(i, at(i), Whole{});
    }
    if (i < n) f(i, at(i), Some{n - i});
}

constexpr Index kLongLine = 512;

// The number of rows in one line: with few channels several rows, which fill whole tiles.
inline Index rows_per_line(Index channels) {
    if (channels > kNarrow) return 1;
    Index rows = kTile;
    for (Index odd = channels; odd % 2 == 0 && rows > 1; odd /= 2) rows /= 2;
    return rows * channels <= kMaxLanes ? rows : 1;
}

// The same for passes without sums, over arrays whose rows lie side by side: coefficients are
// loaded lane by lane anyway, and long lines save calls.
inline Index rows_together(Index width) {
    return width == 0 || width > kLongLine ? 1 : kLongLine / width;
}

// Element `offset` of outer row o; null where the array is.
template <class T>
inline T* element(const Array& a, Index o, Index offset) {
    return a.data == nullptr ? nullptr : static_cast<T*>(a.data) + o * a.stride + offset;
}

}  // namespace batchnorm::BATCHNORM_ISA
