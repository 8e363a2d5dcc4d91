// Gradient reduction and gradient application (S8, S18).
#include "sums.hpp"

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
#pragma GCC unroll 1
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

// What a mean in double leaves out matters to float64 only.
template <class T>
constexpr bool kHasLow = sizeof(T) == 8;

// act'(y) dy for one line, in the type of the arithmetic.
template <int kStep, Activation kAct, class T>
void gate_chunks(const T* dy, const T* x, const T* y, Compute<T>* g, Index n,
                 const Coefficients<Compute<T>>& k) {
    Access<T> from, of_x, of_y;
    for (Index i = 0; i < n; i += Access<T>::kLimit) {
        const Index m = n - i < Access<T>::kLimit ? n - i : Access<T>::kLimit;
        gate_line<kStep, kAct>(from.read(dy + i, m), of_x.read(at(y ? nullptr : x, i), m),
                               of_y.read(at(y, i), m), g + i, m, kStep ? at(k, i) : k);
    }
}

template <int kStep, class T>
void gate(const T* dy, const T* x, const T* y, Compute<T>* g, Index n,
          const Coefficients<Compute<T>>& k, Activation act) {
    if (act == Activation::relu) return gate_chunks<kStep, Activation::relu>(dy, x, y, g, n, k);
    return gate_chunks<kStep, Activation::leaky_relu>(dy, x, y, g, n, k);
}

template <class T>
void gate_to(const T* dy, const T* y, T* out, Index n, Activation act) {
    Compute<T> g[kChunk];
    for (Index i = 0; i < n; i += kChunk) {
        const Index m = n - i < kChunk ? n - i : kChunk;
        gate<0>(dy + i, static_cast<const T*>(nullptr), y + i, g, m, {}, act);
        narrow(g, out + i, m);
    }
}

// ---------------------------------------------------------------- reduction

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
    const bool gated = s.options.activation != Activation::none;
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
    const bool gated = s.options.activation != Activation::none;
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
        if (real.none && !s.dresidual) return;
        for (Index c = 0; c < b.channels; ++c) {
            const Index offset = (b.channel + c) * s.layout.inner + i;
            const T* x = element<const T>(s.x, o, offset);
            const T* dy = element<const T>(s.dy, o, offset);
            if (gated) {
                gate<0>(dy, x, element<const T>(s.y, o, offset), g, n, coefficients.from(c),
                        s.options.activation);
                if (s.dresidual) narrow(g, element<T>(s.dresidual, o, offset), n);
            }
            if (real.none) continue;
            if (gated) {
                add(x, g, real_g, c, n);
            } else {
                add(x, dy, real, c, n);
            }
        }
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

// -------------------------------------------------------------- application

// dresidual holds g already, unless a half type rounded it.
template <class T>
bool has_gradient(const Step& s) {
    return s.dresidual && (sizeof(T) > 2 || s.options.activation == Activation::relu);
}

template <int kStep, class T>
void apply_chunks(const Step& s, const T* g, const T* x, const T* y, T* dx, Index n, bool gated,
                  const Coefficients<Compute<T>>& k) {
    Compute<T> gate_buffer[kChunk];
    Access<T> of_g, of_x, to;
    const bool reads_x = s.options.batch;
    const Index limit = gated ? kChunk : Access<T>::kLimit;
    for (Index i = 0; i < n;) {
        const Index m = n - i < limit ? n - i : limit;
        const Coefficients<Compute<T>> here = kStep ? at(k, i) : k;
        const Compute<T>* gs = gate_buffer;
        if (gated) {
            gate<kStep>(g + i, x + i, at(y, i), gate_buffer, m, here, s.options.activation);
        } else {
            gs = of_g.read(g + i, m);
        }
        apply_line<kStep>(gs, of_x.read(reads_x ? x + i : nullptr, m), to.target(dx + i), m,
                          s.options.batch, here);
        to.write(dx + i, m);
        i += m;
    }
}

template <class T>
struct Source {
    bool gated;
    Array g;

    explicit Source(const Step& s)
        : gated(s.options.activation != Activation::none && !has_gradient<T>(s)),
          g(has_gradient<T>(s) ? s.dresidual : s.dy) {}
};

template <class T>
void apply_row(const Step& s, const Source<T>& from, Index o, Index offset, Index n,
               const Coefficients<Compute<T>>& k) {
    apply_chunks<1>(s, element<const T>(from.g, o, offset), element<const T>(s.x, o, offset),
                    element<const T>(s.y, o, offset), element<T>(s.dx, o, offset), n, from.gated,
                    k);
}

template <class T>
void apply_padded_row(const Step& s, Index o, Index offset, Index n) {
    T* dx = element<T>(s.dx, o, offset);
    for (Index i = 0; i < n; ++i) dx[i] = T{};
    if (!s.dresidual) return;
    gate_to(element<const T>(s.dy, o, offset), element<const T>(s.y, o, offset),
            element<T>(s.dresidual, o, offset), n, s.options.activation);
}

// Several rows at once where all arrays are contiguous, which pays where channels are few.
template <class T>
Index rows_together(const Step& s) {
    const Index width = s.layout.channels * s.layout.inner;
    const Array all[] = {s.x, s.y, s.dy, s.dx, s.dresidual};
    for (const Array& a : all) {
        if (a && a.stride != width) return 1;
    }
    return rows_per_line(width);
}

constexpr Index kRowsAhead = 16;

template <class T>
void fetch_row(const Step& s, const Source<T>& from, Index o, Index offset, Index n) {
    const Index step = Index(64 / sizeof(T)), most = 16 * step;  // hardware follows longer ones
    for (Index i = 0, end = n < most ? n : most; i < end; i += step) {
        __builtin_prefetch(element<const T>(from.g, o, offset + i));
        __builtin_prefetch(element<const T>(s.x, o, offset + i));
    }
}

// Rows o + i of which keep[i] says that they are real. Where few are left out, all are computed,
// which hardware foresees, and the padded ones overwritten.
template <class T>
void apply_some_rows(const Step& s, const Source<T>& from, Index o, Index n, Index offset,
                     Index width, const unsigned char* keep, const Coefficients<Compute<T>>& k) {
    unsigned char rows[2][kRowsAhead];  // padded, real
    Index found[2] = {0, 0};
    for (Index i = 0; i < n; ++i) {
        rows[0][found[0]] = rows[1][found[1]] = static_cast<unsigned char>(i);
        ++found[keep[i]];
    }
    if (3 * found[1] > n) {
        for (Index i = 0; i < n; ++i) apply_row<T>(s, from, o + i, offset, width, k);
    } else {
        for (Index i = 0; i < found[1]; ++i)
            apply_row<T>(s, from, o + rows[1][i], offset, width, k);
    }
    for (Index i = 0; i < found[0]; ++i) apply_padded_row<T>(s, o + rows[0][i], offset, width);
}

// Rows [o, o + n) one by one. Left out rows break the streams that hardware follows, so that the
// real ones of the next few are fetched ahead.
template <class T>
void apply_masked_rows(const Step& s, const Source<T>& from, Index o, Index n, Index offset,
                       Index width, const Coefficients<Compute<T>>& k) {
    unsigned char keep[2][kRowsAhead];
    read_rows(s.mask, o, n < kRowsAhead ? n : kRowsAhead, keep[0]);
    for (Index r = 0; r < n; r += kRowsAhead) {
        const unsigned char* now = keep[r / kRowsAhead % 2];
        unsigned char* next = keep[(r / kRowsAhead + 1) % 2];
        const Index left = n - r, ahead = left - kRowsAhead;
        const Index some = ahead < 0 ? 0 : ahead < kRowsAhead ? ahead : kRowsAhead;
        read_rows(s.mask, o + r + kRowsAhead, some, next);
        for (Index i = 0; i < some; ++i) {
            if (next[i]) fetch_row<T>(s, from, o + r + kRowsAhead + i, offset, width);
        }
        apply_some_rows<T>(s, from, o + r, left < kRowsAhead ? left : kRowsAhead, offset, width,
                           now, k);
    }
}

template <class T>
void apply_rows(const Step& s, const Block& b, const double* sums) {
    const Index span = s.layout.inner, width = b.channels * span, first = b.channel * span;
    const Index joined = b.channels == s.layout.channels ? rows_together<T>(s) : 1;
    const Lanes<Compute<T>, kWideLanes> lanes(s, b, joined * width,
                                              s.options.batch ? sums : nullptr);
    const Source<T> from(s);
    for_each_run(s.layout, b.group, b.first, b.rows, [&](Index o, Index n) {
        if (s.mask && joined == 1) {
            apply_masked_rows<T>(s, from, o, n, first, width, lanes.from());
            return true;
        }
        unsigned char keep[kTile];
        for (Index r = 0; r < n; r += joined) {
            const Index m = n - r < joined ? n - r : joined;
            Index real = m;
            if (s.mask) {
                read_rows(s.mask, o + r, m, keep);
                real = 0;
                for (Index i = 0; i < m; ++i) real += keep[i];
            }
            // Padded rows between real ones are computed along, and overwritten.
            if (real > 0) apply_row<T>(s, from, o + r, first, m * width, lanes.from());
            if (real == m) continue;
            for (Index i = 0; i < m; ++i) {
                if (!keep[i]) apply_padded_row<T>(s, o + r + i, first, width);
            }
        }
        return true;
    });
}

constexpr Index kBlanked = 512;

template <class T>
void apply_positions(const Step& s, const Block& b, const double* sums) {
    const Lanes<Compute<T>, kMaxChannels> lanes(s, b, b.channels, s.options.batch ? sums : nullptr);
    const Source<T> from(s);
    Selection<T> real;
    for_each_stretch(s.layout, b, [&](Index o, Index first, Index length) {
        const Index step = s.mask ? piece_of(length) : length;
        for (Index i = first; i < first + length; i += step) {
            const Index n = first + length - i < step ? first + length - i : step;
            real.read(s.mask, o, i, n);
            for (Index c = 0; c < b.channels; ++c) {
                const Index offset = (b.channel + c) * s.layout.inner + i;
                T* dx = element<T>(s.dx, o, offset);
                if (real.none) {
                    for (Index p = 0; p < n; ++p) dx[p] = T{};
                    continue;
                }
                const T *g = element<const T>(from.g, o, offset),
                        *x = element<const T>(s.x, o, offset);
                const T* y = element<const T>(s.y, o, offset);
                // What is still in the nearest cache is cheaply blanked.
                const Index part = real.all ? n : kBlanked;
                for (Index p = 0; p < n; p += part) {
                    const Index m = n - p < part ? n - p : part;
                    apply_chunks<0>(s, g + p, x + p, at(y, p), dx + p, m, from.gated,
                                    lanes.from(c));
                    if (!real.all) real.select(dx + p, T{}, dx + p, m, p);
                }
            }
        }
        return true;
    });
}

}  // namespace

template <class T>
void reduce_block(const Step& step, const Block& block, double* sum, double* product) {
    if (by_rows(step)) {
        RowsOfChannels<T>(step, block).run(sum, product);
    } else {
        ChannelsOfPositions<T>(step, block).run(sum, product);
    }
}

template <class T>
void apply_block(const Step& step, const Block& block, const double* sums) {
    if (by_rows(step)) return apply_rows<T>(step, block, sums);
    apply_positions<T>(step, block, sums);
}

#define BATCHNORM_INSTANTIATE(T)                                                \
    template void reduce_block<T>(const Step&, const Block&, double*, double*); \
    template void apply_block<T>(const Step&, const Block&, const double*);
BATCHNORM_INSTANTIATE(Half)
BATCHNORM_INSTANTIATE(Bfloat)
BATCHNORM_INSTANTIATE(float)
BATCHNORM_INSTANTIATE(double)

}  // namespace batchnorm::BATCHNORM_ISA
