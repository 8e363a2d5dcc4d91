// Gradient sums where rows of channels are contiguous.
#pragma once

#include "gradient_tiles.hpp"

namespace batchnorm::BATCHNORM_ISA {
namespace {

template <class T, class G>
void add_lines(const T* const* x, const G* const* g, int n, Index lanes, const double* mean,
               const double* low, LaneSums& sums, Ahead<T>& next_x, Ahead<T>& next_dy) {
    Index l = 0;
    for (; l + kTile <= lanes; l += kTile) {
        add_tiles<kHasLow<T>>(
            n, mean + l, low + l, sums.first + l, sums.second + l,
            [&](Index r) {
                next_dy.step();
                return load(g[r] + l);
            },
            [&](Index r) {
                next_x.step();
                return load(x[r] + l);
            });
    }
    if (l == lanes) return;
    const Index rest = lanes - l;
    add_tiles<kHasLow<T>>(
        n, mean + l, low + l, sums.first + l, sums.second + l,
        [&](Index r) { return load_some(g[r] + l, rest); },
        [&](Index r) { return load_some(x[r] + l, rest); });
}

template <class T, class G>
void add_narrow_lines(const T* const* x, const G* const* g, int n, Index lanes, const float* mean,
                      LaneSums& sums, Ahead<T>& next_x, Ahead<T>& next_dy) {
    Index l = 0;
    for (; l + kTile <= lanes; l += kTile) {
        add_narrow_tiles(
            n, sums.first + l, sums.second + l,
            [&](Index r, int i) BATCHNORM_INLINE_LAMBDA {
                if (i == 0) next_dy.step();
                return load_floats(g[r] + l + i * kFloats);
            },
            [&](Index r, int i) BATCHNORM_INLINE_LAMBDA {
                if (i == 0) next_x.step();
                const Index at = l + i * kFloats;
                return load_floats(x[r] + at) - load_floats(mean + at);
            });
    }
    if (l == lanes) return;
    for (Index r = 0; r < n; ++r)
        add_narrow_rest(x[r] + l, g[r] + l, Keep{}, lanes - l, mean + l, sums.first + l,
                        sums.second + l);
}

// Lines at equal distances: n of them from `first` on.
template <class T>
struct EvenLines {
    const T *x, *dy, *y;  // y, dresidual: null where there is none
    T* dresidual;
    Index x_stride, dy_stride, y_stride, dresidual_stride;

    EvenLines from(Index first) const {
        EvenLines lines = *this;
        lines.x += first * x_stride, lines.dy += first * dy_stride;
        if (y != nullptr) lines.y += first * y_stride;
        if (dresidual != nullptr) lines.dresidual += first * dresidual_stride;
        return lines;
    }
};

// Whole tiles of n lines. Each tile prefetches those `ahead` lines further.
template <Activation kAct, bool kStore, class T, class L>
void add_even_lines(const EvenLines<T>& from, Index n, Index lanes, const float* mean, const L& k,
                    LaneSums& sums, Index ahead) {
    const Index x_stride = from.x_stride, dy_stride = from.dy_stride, y_stride = from.y_stride;
    const Index next_x = ahead * x_stride, next_dy = ahead * dy_stride;
    const Index out_stride = from.dresidual_stride;
    for (Index l = 0; l + kTile <= lanes; l += kTile) {
        const T *dy = from.dy + l, *x = from.x + l, *y = at(from.y, l);
        T* const dresidual = kStore ? from.dresidual + l : nullptr;
        Coefficients<Floats> here[kFloatVectors];
        for (int i = 0; i < kFloatVectors; ++i) {
            if (kAct != Activation::none) here[i] = k.from(l + i * kFloats);
            here[i].mean = load_floats(mean + l + i * kFloats);
        }
        add_narrow_tiles(
            n, sums.first + l, sums.second + l,
            [&](Index r, int i) BATCHNORM_INLINE_LAMBDA {
                const T* tile = dy + r * dy_stride + i * kFloats;
                if (i == 0) __builtin_prefetch(tile + next_dy);
                const auto g =
                    gate_vector<kAct>(tile, x + r * x_stride + i * kFloats,
                                      at(y, r * y_stride + i * kFloats), Whole{}, here[i]);
                if constexpr (kStore) store_lanes(dresidual + r * out_stride + i * kFloats, g);
                return g;
            },
            [&](Index r, int i) BATCHNORM_INLINE_LAMBDA {
                const T* tile = x + r * x_stride + i * kFloats;
                if (i == 0) __builtin_prefetch(tile + next_x);
                return load_floats(tile) - here[i].mean;
            });
    }
}

template <class T>
struct RowsOfChannels {
    const Step& s;
    const Block& b;
    const Index span = s.layout.inner, width = b.channels * span;
    const Index joined = rows_per_line(width), lanes = joined * width;
    const bool gated = s.options.activation != Activation::none || s.dresidual;
    const double* means =
        s.statistics.row(Statistics::mean) + b.group * s.layout.channels + b.channel;
    const double* lows = means + (Statistics::low - Statistics::mean) * s.statistics.size;
    const Lanes<Compute<T>, kMaxLanes> coefficients{s, b, gated ? lanes : 0};
    LaneSums sums{lanes};
    Gather<T> x{s.x, b, span, joined}, dy{s.dy, b, span, joined}, y{s.y, b, span, joined};
    Ahead<T> next_x{s.x, b, span}, next_dy{s.dy, b, span};
    Compute<T> g[kBatch][kMaxLanes];

    RowsOfChannels(const Step& step, const Block& block) : s(step), b(block) {}

    void wide(double* sum, double* product) {
        const LaneValues<double> mean(means, b.channels, span, joined);
        const LaneValues<double> low(lows, b.channels, span, joined);
        for_batches(joined, [&](const auto& xs, const auto& gs, int m) {
            add_lines(xs, gs, m, lanes, mean.at, low.at, sums, next_x, next_dy);
        });
        sums.fold(b.channels, span, joined, sum, product);
    }

    void narrow(double* sum, double* product) {
        const LaneValues<float> mean(means, b.channels, span, joined);
        if (is_even()) {
            even(mean);
        } else {
            for_batches(joined * kGroup, [&](const auto& xs, const auto& gs, int m) {
                add_narrow_lines(xs, gs, m, lanes, mean.at, sums, next_x, next_dy);
            });
        }
        sums.fold(b.channels, span, joined, sum, product);
        correct(b.channels, means, lows, sum, product);
    }

    bool is_even() const {
        const bool dense = !s.dresidual || joined == 1 || s.dresidual.stride == width;
        return lanes % kTile == 0 && b.rows % joined == 0 && dense && x.even(s) && dy.even(s) &&
               (!s.y || y.even(s));
    }

    void even(const LaneValues<float>& mean) {
        const Index lines = b.rows / joined, most = even_batch(lanes, 2 * sizeof(T));
        const Index offset = b.channel * span;
        const EvenLines<T> from{element<const T>(s.x, b.first, offset),
                                element<const T>(s.dy, b.first, offset),
                                element<const T>(s.y, b.first, offset),
                                element<T>(s.dresidual, b.first, offset),
                                joined * s.x.stride,
                                joined * s.dy.stride,
                                joined * s.y.stride,
                                joined * s.dresidual.stride};
        with_activation(s.options.activation, [&](auto act) {
            for (Index r = 0; r < lines; r += most) {
                const Index n = lines - r < most ? lines - r : most;
                const Index ahead = r + most < lines ? most : 0;
                if (s.dresidual) {
                    add_even_lines<act.value, true>(from.from(r), n, lanes, mean.at, coefficients,
                                                    sums, ahead);
                } else {
                    add_even_lines<act.value, false>(from.from(r), n, lanes, mean.at, coefficients,
                                                     sums, ahead);
                }
            }
        });
    }

    // Calls add(lines of x, lines of g, number of lines).
    template <class F>
    void for_batches(Index unit, F add) {
        for_real_rows(s, b, unit, [&](const Index* rows, Index n) {
            for (Index r = 0; r < n; r += kBatch * joined) {
                const Index most = kBatch * joined, after = r + most;
                const Index ahead = joined > 1 || after >= n ? 0
                                    : n - after < most       ? n - after
                                                             : most;
                next_x.begin(rows + after, ahead);
                next_dy.begin(rows + after, ahead);
                batch(rows + r, n - r < most ? n - r : most, add);
            }
        });
    }

    template <class F>
    void batch(const Index* rows, Index n, F add) {
        const T *xs[kBatch], *dys[kBatch];
        const Compute<T>* gs[kBatch];
        int m = 0;
        for (Index r = 0; r < n; ++m, r += joined) {
            const Index some = n - r < joined ? n - r : joined;
            xs[m] = x.line(rows + r, some, m, nullptr);
            dys[m] = dy.line(rows + r, some, m, nullptr);
            if (!gated) continue;
            const T* ys = s.y ? y.line(rows + r, some, m, nullptr) : nullptr;
            gate_line<true>(dys[m], xs[m], ys, g[m], lanes, coefficients, 0, s.options.activation);
            gs[m] = g[m];
            if (s.dresidual) scatter(g[m], rows + r, some);
        }
        if (gated) {
            add(xs, gs, m);
        } else {
            add(xs, dys, m);
        }
    }

    void scatter(const Compute<T>* line, const Index* rows, Index n) {
        for (Index r = 0; r < n; ++r) {
            BATCHNORM_ISA::narrow(line + r * width,
                                  element<T>(s.dresidual, rows[r], b.channel * span), width);
        }
    }
};

}  // namespace
}  // namespace batchnorm::BATCHNORM_ISA
