// Gradient reduction: sums of g and of g (x - mean) (S8, S18).
//
// Narrow sums take the mean as one float32; `correct` adds what that leaves out.
#include "gate.hpp"
#include "padded_rows.hpp"
#include "pieces.hpp"

namespace batchnorm::BATCHNORM_ISA {
namespace {

// Adds one tile of n lines to its sums. `g(r)` and `x(r)` are Tiles of line r.
template <bool kLow, class G, class X>
BATCHNORM_INLINE void add_tiles(Index n, const double* mean, const double* low, double* first,
                                double* second, G g, X x) {
    Doubles a[kVectors];
    for (int i = 0; i < kVectors; ++i) a[i] = load_doubles(mean + i * kDoubles);
    TileSums sums(first, second);
#pragma GCC unroll 1
    for (Index r = 0; r < n; ++r) {
        const Tile gr = g(r), xr = x(r);
        for (int i = 0; i < kVectors; ++i) {
            Doubles d = xr.v[i] - a[i];
            if (kLow) d -= load_doubles(low + i * kDoubles);
            sums.first[i] = plus(sums.first[i], gr.v[i]);
            sums.second[i] = plus(sums.second[i], gr.v[i] * d);
        }
    }
    sums.store(first, second);
}

// The same in float32: `g(r, i)` and `distance(r, i)`, x - mean, are float vector number i of line
// r.
template <class G, class D>
BATCHNORM_INLINE void add_narrow_tiles(Index n, double* first, double* second, const G& g,
                                       const D& distance) {
    add_narrow(n, first, second, [&](Index r, int i) BATCHNORM_INLINE_LAMBDA {
        const Floats gr = g(r, i);
        return Two{gr, gr * distance(r, i)};
    });
}

// The rounding error of a mean in double (`low`) matters to float64 only.
template <class T>
constexpr bool kHasLow = sizeof(T) == 8;

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

// Less than a tile.
template <class T, class G>
void add_narrow_rest(const T* x, const G* g, const unsigned char* keep, Index n, const float* mean,
                     double* first, double* second) {
    float some_x[kTile], some_g[kTile];
    load_rest(x, n, keep, 0.0f, some_x);
    load_rest(g, n, keep, 0.0f, some_g);
    add_narrow_tiles(
        1, first, second,
        [&](Index, int i) BATCHNORM_INLINE_LAMBDA { return load_floats(some_g + i * kFloats); },
        [&](Index, int i) BATCHNORM_INLINE_LAMBDA {
            return load_floats(some_x + i * kFloats) - load_floats(mean + i * kFloats);
        });
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
        add_narrow_rest(x[r] + l, g[r] + l, nullptr, lanes - l, mean + l, sums.first + l,
                        sums.second + l);
}

// Whole tiles of n lines. Each tile prefetches those `ahead` lines further.
template <class T>
void add_even_lines(const T* x, Index x_stride, const T* g, Index g_stride, Index n, Index lanes,
                    const float* mean, LaneSums& sums, Index ahead) {
    for (Index l = 0; l + kTile <= lanes; l += kTile) {
        Floats a[kFloatVectors];
        for (int i = 0; i < kFloatVectors; ++i) a[i] = load_floats(mean + l + i * kFloats);
        add_narrow_tiles(
            n, sums.first + l, sums.second + l,
            [&](Index r, int i) BATCHNORM_INLINE_LAMBDA {
                const T* tile = g + r * g_stride + l;
                if (i == 0) __builtin_prefetch(tile + ahead * g_stride);
                return load_floats(tile + i * kFloats);
            },
            [&](Index r, int i) BATCHNORM_INLINE_LAMBDA {
                const T* tile = x + r * x_stride + l;
                if (i == 0) __builtin_prefetch(tile + ahead * x_stride);
                return load_floats(tile + i * kFloats) - a[i];
            });
    }
}

// From sums around the mean as one float32 to sums around the mean (S3).
void correct(Index n, const double* __restrict mean, const double* __restrict low,
             const double* __restrict sum, double* __restrict product) {
    for (Index c = 0; c < n; ++c)
        product[c] -= ((mean[c] - double(float(mean[c]))) + low[c]) * sum[c];
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
        if (!gated && lanes % kTile == 0 && b.rows % joined == 0 && x.even(s) && dy.even(s)) {
            even(mean);
        } else {
            for_batches(joined * kGroup, [&](const auto& xs, const auto& gs, int m) {
                add_narrow_lines(xs, gs, m, lanes, mean.at, sums, next_x, next_dy);
            });
        }
        sums.fold(b.channels, span, joined, sum, product);
        correct(b.channels, means, lows, sum, product);
    }

    void even(const LaneValues<float>& mean) {
        const Index lines = b.rows / joined, most = even_batch(lanes, 2 * sizeof(T));
        const Index x_stride = joined * s.x.stride, g_stride = joined * s.dy.stride;
        const T* x_from = element<const T>(s.x, b.first, b.channel * span);
        const T* g_from = element<const T>(s.dy, b.first, b.channel * span);
        for (Index r = 0; r < lines; r += most) {
            add_even_lines(x_from + r * x_stride, x_stride, g_from + r * g_stride, g_stride,
                           lines - r < most ? lines - r : most, lanes, mean.at, sums,
                           r + most < lines ? most : 0);
        }
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
            gate<1>(dys[m], xs[m], ys, g[m], lanes, coefficients.from(), s.options.activation);
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

template <bool kLow, class X, class G>
void add_stretch(X x, G g, Index n, double mean, double low, double* first, double* second) {
    double means[kTile], lows[kTile];
    for (int l = 0; l < kTile; ++l) means[l] = mean, lows[l] = low;
    const Index tiles = n / kTile, rest = n - tiles * kTile;
    add_tiles<kLow>(
        tiles, means, lows, first, second, [&](Index r) { return g.at(r); },
        [&](Index r) { return x.at(r); });
    if (rest == 0) return;
    add_tiles<kLow>(
        1, means, lows, first, second, [&](Index) { return g.rest(tiles, rest); },
        [&](Index) { return x.rest(tiles, rest); });
}

template <class T, class G>
void add_narrow_stretch(const T* x, const G* g, const unsigned char* keep, Index n, float mean,
                        double* first, double* second) {
    const Floats a = all_floats(mean);
    const Index tiles = n / kTile, done = tiles * kTile;
    if (keep == nullptr) {
        add_narrow_tiles(
            tiles, first, second,
            [&](Index r, int i)
                BATCHNORM_INLINE_LAMBDA { return load_floats(g + r * kTile + i * kFloats); },
            [&](Index r, int i)
                BATCHNORM_INLINE_LAMBDA { return load_floats(x + r * kTile + i * kFloats) - a; });
    } else {
        add_narrow_tiles(
            tiles, first, second,
            [&](Index r, int i) BATCHNORM_INLINE_LAMBDA {
                const Index at = r * kTile + i * kFloats;
                return keep_lanes(load_floats(g + at), keep + at);
            },
            [&](Index r, int i) BATCHNORM_INLINE_LAMBDA {
                const Index at = r * kTile + i * kFloats;
                return keep_lanes(load_floats(x + at) - a, keep + at);
            });
    }
    if (done == n) return;
    float means[kTile];
    for (float& m : means) m = mean;
    add_narrow_rest(x + done, g + done, keep == nullptr ? nullptr : keep + done, n - done, means,
                    first, second);
}

template <class T>
struct ChannelsOfPositions {
    const Step& s;
    const Block& b;
    const bool gated = s.options.activation != Activation::none || s.dresidual;
    const double* means =
        s.statistics.row(Statistics::mean) + b.group * s.layout.channels + b.channel;
    const double* lows = means + (Statistics::low - Statistics::mean) * s.statistics.size;
    const Lanes<Compute<T>, kMaxChannels> coefficients{s, b, gated ? b.channels : 0};
    PositionSums sums{b.channels};
    Compute<T> g[kPiece];

    ChannelsOfPositions(const Step& step, const Block& block) : s(step), b(block) {}

    void run(double* sum, double* product) {
        for_each_piece(s, b, !gated, [&](Index o, Index i, Index n, const Piece& piece) {
            if (piece.is(Piece::padding) && !(s.dresidual && !s.options.zero_padding))
                return blank(o, i, n);
            for (Index c = 0; c < b.channels; ++c) add(o, i, n, piece, c);
        });
        sums.fold(b.channels, sum, product);
        if (kCanBeNarrow<T> && !b.wide) correct(b.channels, means, lows, sum, product);
    }

    void add(Index o, Index i, Index n, const Piece& piece, Index c) {
        const Index offset = (b.channel + c) * s.layout.inner + i;
        const T* x = element<const T>(s.x, o, offset);
        const T* dy = element<const T>(s.dy, o, offset);
        if (!gated) return add_parts(x, dy, piece, c);
        gate<0>(dy, x, element<const T>(s.y, o, offset), g, n, coefficients.from(c),
                s.options.activation);
        if (s.dresidual) store(element<T>(s.dresidual, o, offset), n, piece);
        add_parts(x, g, piece, c);
    }

    void store(T* dresidual, Index n, const Piece& piece) const {
        narrow(g, dresidual, n);
        if (s.options.zero_padding && !piece.is(Piece::real))
            zero_padding(dresidual, piece.keep(0), n);
    }

    // A piece of padding.
    void blank(Index o, Index i, Index n) const {
        if (!s.dresidual) return;
        for (Index c = 0; c < b.channels; ++c)
            set_zero(element<T>(s.dresidual, o, (b.channel + c) * s.layout.inner + i), n);
    }

    template <class G>
    void add_parts(const T* x, const G* from, const Piece& piece, Index c) {
        for (const auto& [first, end, kind] : piece) {
            if (kind == Piece::padding) continue;
            const unsigned char* keep = kind == Piece::real ? nullptr : piece.keep(first);
            add_part(x + first, from + first, keep, end - first, c);
        }
    }

    template <class G>
    void add_part(const T* x, const G* from, const unsigned char* keep, Index n, Index c) {
        double *first = sums.first[c], *second = sums.second[c];
        if constexpr (kCanBeNarrow<T>) {
            if (!b.wide)
                return add_narrow_stretch(x, from, keep, n, float(means[c]), first, second);
        }
        if (keep == nullptr) {
            add_stretch<kHasLow<T>>(AllTiles<T>{x, T{}}, AllTiles<G>{from, G{}}, n, means[c],
                                    lows[c], first, second);
        } else {
            add_stretch<kHasLow<T>>(RealTiles<T>{x, T{}, keep}, RealTiles<G>{from, G{}, keep}, n,
                                    means[c], lows[c], first, second);
        }
    }
};

}  // namespace

template <class T>
void reduce_block(const Step& step, const Block& block, double* sum, double* product) {
    if (!by_rows(step)) return ChannelsOfPositions<T>(step, block).run(sum, product);
    RowsOfChannels<T> rows(step, block);
    if constexpr (kCanBeNarrow<T>) {
        if (!block.wide) return rows.narrow(sum, product);
    }
    rows.wide(sum, product);
}

template void reduce_block<Half>(const Step&, const Block&, double*, double*);
template void reduce_block<Bfloat>(const Step&, const Block&, double*, double*);
template void reduce_block<float>(const Step&, const Block&, double*, double*);
template void reduce_block<double>(const Step&, const Block&, double*, double*);

}  // namespace batchnorm::BATCHNORM_ISA
