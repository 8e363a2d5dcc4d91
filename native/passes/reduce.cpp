// Gradient reduction: sums of g and of g (x - mean) (S8, S18).
#include "gate.hpp"
#include "padded_rows.hpp"

namespace batchnorm::BATCHNORM_ISA {
namespace {

// Adds one tile of n lines to its sums. `g(r)` and `x(r)` are Tiles of line r.
template <bool kLow, class G, class X>
BATCHNORM_INLINE void add_tiles(Index n, const double* mean, const double* low, double* first,
                                double* second, G g, X x) {
    Doubles a[kVectors], sum[kVectors], product[kVectors];
    for (int i = 0; i < kVectors; ++i) {
        a[i] = load_doubles(mean + i * kDoubles);
        sum[i] = load_doubles(first + i * kDoubles);
        product[i] = load_doubles(second + i * kDoubles);
    }
    BATCHNORM_NO_UNROLL
    for (Index r = 0; r < n; ++r) {
        const Tile gr = g(r), xr = x(r);
        for (int i = 0; i < kVectors; ++i) {
            Doubles d = xr.v[i] - a[i];
            if (kLow) d -= load_doubles(low + i * kDoubles);
            sum[i] = plus(sum[i], gr.v[i]);
            product[i] = plus(product[i], gr.v[i] * d);
        }
    }
    for (int i = 0; i < kVectors; ++i) {
        store_doubles(first + i * kDoubles, sum[i]);
        store_doubles(second + i * kDoubles, product[i]);
    }
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

template <class T>
struct RowsOfChannels {
    const Step& s;
    const Block& b;
    const Index span = s.layout.inner, width = b.channels * span;
    const Index joined = rows_per_line(width), lanes = joined * width;
    const bool gated = s.options.activation != Activation::none || s.dresidual;
    const double* means =
        s.statistics.row(Statistics::mean) + b.group * s.layout.channels + b.channel;
    const LaneValues mean{means, b.channels, span, joined};
    const LaneValues low{means + (Statistics::low - Statistics::mean) * s.statistics.size,
                         b.channels, span, joined};
    const Lanes<Compute<T>, kMaxLanes> coefficients{s, b, gated ? lanes : 0};
    LaneSums sums{lanes};
    Gather<T> x{s.x, b, span, joined}, dy{s.dy, b, span, joined}, y{s.y, b, span, joined};
    Ahead<T> next_x{s.x, b, span}, next_dy{s.dy, b, span};
    Compute<T> g[kBatch][kMaxLanes];

    RowsOfChannels(const Step& step, const Block& block) : s(step), b(block) {}

    void run(double* sum, double* product) {
        for_real_rows(s, b, joined, [&](const Index* rows, Index n) {
            for (Index r = 0; r < n; r += kBatch * joined) {
                const Index most = kBatch * joined, after = r + most;
                const Index ahead = joined > 1 || after >= n ? 0
                                    : n - after < most       ? n - after
                                                             : most;
                next_x.begin(rows + after, ahead);
                next_dy.begin(rows + after, ahead);
                batch(rows + r, n - r < most ? n - r : most);
            }
        });
        sums.fold(b.channels, span, joined, sum, product);
    }

    void batch(const Index* rows, Index n) {
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
            add_lines(xs, gs, m, lanes, mean.at, low.at, sums, next_x, next_dy);
        } else {
            add_lines(xs, dys, m, lanes, mean.at, low.at, sums, next_x, next_dy);
        }
    }

    void scatter(const Compute<T>* line, const Index* rows, Index n) {
        for (Index r = 0; r < n; ++r) {
            narrow(line + r * width, element<T>(s.dresidual, rows[r], b.channel * span), width);
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
    Selection<T> real;
    Selection<Compute<T>> real_g;
    Compute<T> g[kPiece];

    ChannelsOfPositions(const Step& step, const Block& block) : s(step), b(block) {}

    void run(double* sum, double* product) {
        const bool pieces = s.mask || gated;
        for_each_stretch(s.layout, b, [&](Index o, Index first, Index length) {
            const Index step = pieces ? piece_of(length) : length;
            for (Index i = first; i < first + length; i += step) {
                piece(o, i, first + length - i < step ? first + length - i : step);
            }
            return true;
        });
        sums.fold(b.channels, sum, product);
    }

    void piece(Index o, Index i, Index n) {
        real.read(s.mask, o, i, n);
        if (gated) real_g.read(s.mask, o, i, n);
        if (real.none && !(s.dresidual && !s.options.zero_padding)) return blank(o, i, n);
        for (Index c = 0; c < b.channels; ++c) {
            const Index offset = (b.channel + c) * s.layout.inner + i;
            const T* x = element<const T>(s.x, o, offset);
            const T* dy = element<const T>(s.dy, o, offset);
            if (gated) {
                gate<0>(dy, x, element<const T>(s.y, o, offset), g, n, coefficients.from(c),
                        s.options.activation);
                if (s.dresidual) store(element<T>(s.dresidual, o, offset), n);
            }
            if (real.none) continue;
            if (gated) {
                add(x, g, real_g, c, n);
            } else {
                add(x, dy, real, c, n);
            }
        }
    }

    void store(T* dresidual, Index n) const {
        narrow(g, dresidual, n);
        if (s.options.zero_padding && !real.all) real.select(dresidual, T{}, dresidual, n);
    }

    // A piece of padding.
    void blank(Index o, Index i, Index n) const {
        if (!s.dresidual) return;
        for (Index c = 0; c < b.channels; ++c)
            set_zero(element<T>(s.dresidual, o, (b.channel + c) * s.layout.inner + i), n);
    }

    template <class G>
    void add(const T* x, const G* from, const Selection<G>& real_from, Index c, Index n) {
        double *first = sums.first[c], *second = sums.second[c];
        if (real.all) {
            add_stretch<kHasLow<T>>(AllTiles<T>{x, T{}}, AllTiles<G>{from, G{}}, n, means[c],
                                    lows[c], first, second);
        } else {
            add_stretch<kHasLow<T>>(RealTiles<T>{x, T{}, real}, RealTiles<G>{from, G{}, real_from},
                                    n, means[c], lows[c], first, second);
        }
    }
};

}  // namespace

template <class T>
void reduce_block(const Step& step, const Block& block, double* sum, double* product) {
    if (by_rows(step)) {
        RowsOfChannels<T>(step, block).run(sum, product);
    } else {
        ChannelsOfPositions<T>(step, block).run(sum, product);
    }
}

template void reduce_block<Half>(const Step&, const Block&, double*, double*);
template void reduce_block<Bfloat>(const Step&, const Block&, double*, double*);
template void reduce_block<float>(const Step&, const Block&, double*, double*);
template void reduce_block<double>(const Step&, const Block&, double*, double*);

}  // namespace batchnorm::BATCHNORM_ISA
