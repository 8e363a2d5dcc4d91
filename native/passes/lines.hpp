// The computation on one line of contiguous elements: the only place of per-element formulas.
#pragma once

#include "passes.hpp"
#include "vector.hpp"

namespace batchnorm::BATCHNORM_ISA {

// Per lane (kStep 1) or one for the whole line (kStep 0), in the type of the arithmetic. `mean` is
// the mean as one such number, from which x has an exact difference at a large offset; what that
// rounding took from the mean is in `offset` and `shift` (S3).
template <class F>
struct Coefficients {
    const F *mean, *scale, *offset;  // y = (x - mean) scale + offset
    const F *along, *shift;          // dx = (g + (x - mean) along + shift) scale
};

template <int kStep, class F>
inline F affine(F x, const Coefficients<F>& k, Index i) {
    return (x - k.mean[i * kStep]) * k.scale[i * kStep] + k.offset[i * kStep];
}

// `y <= 0` rather than `y > 0`, so that NaN stays NaN; 0 itself is on the negative side (S18).
template <Activation kAct, class F>
inline F activate(F y) {
    if (kAct == Activation::none) return y;
    F negative = kAct == Activation::relu ? F(0) : y * F(kNegativeSlope);
    return y <= 0 ? negative : y;
}

template <Activation kAct, class F>
inline F gate(F dy, F y) {
    F negative = kAct == Activation::relu ? F(0) : dy * F(kNegativeSlope);
    return y <= 0 ? negative : dy;
}

template <int kStep, Activation kAct, class F>
inline void normalize_line(const F* x, const F* residual, F* __restrict y, Index n,
                           const Coefficients<F>& k) {
    if (residual) {
        for (Index i = 0; i < n; ++i)
            y[i] = activate<kAct>(affine<kStep>(x[i], k, i) + residual[i]);
    } else {
        for (Index i = 0; i < n; ++i) y[i] = activate<kAct>(affine<kStep>(x[i], k, i));
    }
}

// The bits of an element, to select it or 0 without a branch.
template <int kBytes>
struct BitsType;
template <>
struct BitsType<2> {
    using type = std::uint16_t;
};
template <>
struct BitsType<4> {
    using type = std::uint32_t;
};
template <>
struct BitsType<8> {
    using type = std::uint64_t;
};
template <class T>
using BitsOf = typename BitsType<sizeof(T)>::type;

template <class T>
BATCHNORM_INLINE T keep_bits(T value, BitsOf<T> bits) {
    BitsOf<T> found;
    __builtin_memcpy(&found, &value, sizeof found);
    found &= bits;
    __builtin_memcpy(&value, &found, sizeof found);
    return value;
}

// As `normalize_line`, and 0 where the bits are 0.
template <int kStep, Activation kAct, class F>
inline void normalize_real(const F* x, const F* residual, F* __restrict y, Index n,
                           const Coefficients<F>& k, const BitsOf<F>* bits) {
    if (residual) {
        for (Index i = 0; i < n; ++i)
            y[i] = keep_bits(activate<kAct>(affine<kStep>(x[i], k, i) + residual[i]), bits[i]);
    } else {
        for (Index i = 0; i < n; ++i)
            y[i] = keep_bits(activate<kAct>(affine<kStep>(x[i], k, i)), bits[i]);
    }
}

// g = act'(y) dy, from y itself or, where y is null, from y computed again from x.
template <int kStep, Activation kAct, class F>
inline void gate_line(const F* dy, const F* x, const F* y, F* __restrict g, Index n,
                      const Coefficients<F>& k) {
    if (y) {
        for (Index i = 0; i < n; ++i) g[i] = gate<kAct>(dy[i], y[i]);
    } else {
        for (Index i = 0; i < n; ++i) g[i] = gate<kAct>(dy[i], affine<kStep>(x[i], k, i));
    }
}

template <int kStep, class F>
inline void apply_line(const F* g, const F* x, F* __restrict dx, Index n, bool batch,
                       const Coefficients<F>& k) {
    if (batch) {
        for (Index i = 0; i < n; ++i) {
            const F along = (x[i] - k.mean[i * kStep]) * k.along[i * kStep];
            dx[i] = (g[i] + (along + k.shift[i * kStep])) * k.scale[i * kStep];
        }
    } else {
        for (Index i = 0; i < n; ++i) dx[i] = g[i] * k.scale[i * kStep];
    }
}

// An array in the type of the arithmetic: itself, or a converted copy of one chunk.
constexpr Index kChunk = 256;

template <class T>
struct Staged {
    Compute<T> chunk[kChunk];
    const Compute<T>* read(const T* p, Index n) {
        if (p == nullptr) return nullptr;
        widen(p, chunk, n);
        return chunk;
    }
    Compute<T>* target(T*) { return chunk; }
    void write(T* p, Index n) { narrow(chunk, p, n); }
    static constexpr Index kLimit = kChunk;
};

template <class T>
struct Direct {
    const T* read(const T* p, Index) { return p; }
    T* target(T* p) { return p; }
    void write(T*, Index) {}
    static constexpr Index kLimit = INT64_MAX;
};

template <class T>
struct AccessType {
    using type = Staged<T>;
};
template <>
struct AccessType<float> {
    using type = Direct<float>;
};
template <>
struct AccessType<double> {
    using type = Direct<double>;
};
template <class T>
using Access = typename AccessType<T>::type;

template <class T>
inline const T* at(const T* p, Index i) {
    return p == nullptr ? nullptr : p + i;
}

template <class F>
inline Coefficients<F> at(const Coefficients<F>& k, Index i) {
    return {at(k.mean, i), at(k.scale, i), at(k.offset, i), at(k.along, i), at(k.shift, i)};
}

// Coefficients of a block, one for each lane: channels repeat along a line of several rows.
template <class F, Index kLanes>
struct Lanes {
    F mean[kLanes], scale[kLanes], offset[kLanes], along[kLanes], shift[kLanes];

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

    Coefficients<F> from(Index l = 0) const {
        return {mean + l, scale + l, offset + l, along + l, shift + l};
    }
};

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
inline Index rows_together(Index width) { return width > kLongLine / 2 ? 1 : kLongLine / width; }

// Element `offset` of outer row o; null where the array is.
template <class T>
inline T* element(const Array& a, Index o, Index offset) {
    return a.data == nullptr ? nullptr : static_cast<T*>(a.data) + o * a.stride + offset;
}

}  // namespace batchnorm::BATCHNORM_ISA
