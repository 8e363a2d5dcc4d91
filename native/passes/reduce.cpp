// Gradient reduction: sums of g and of g (x - mean) (S8, S18).
//
// Narrow sums take the mean as one float32; `correct` adds what that leaves out.
#include "gradient_rows.hpp"
#include "padded_rows.hpp"
#include "pieces.hpp"

namespace batchnorm::BATCHNORM_ISA {
namespace {

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
void add_narrow_stretch(const T* x, const G* g, Keep keep, Index n, float mean, double* first,
                        double* second) {
    const Floats a = all_lanes(mean);
    const Index tiles = n / kTile, done = tiles * kTile;
    if (!keep) {
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
    add_narrow_rest(x + done, g + done, keep ? keep + done : Keep{}, n - done, means, first,
                    second);
}

// The same for act'(y) dy of one channel, which is stored in dresidual, unless that is null.
template <Activation kAct, class T, class L>
void add_gated_stretch(const T* x, const T* dy, const T* y, T* dresidual, Keep keep, Index n,
                       const L& lanes, Index c, double* first, double* second) {
    const auto k = lanes.all(c);
    const Index tiles = n / kTile, done = tiles * kTile;
    const auto masked = [&](Floats v, Index at) BATCHNORM_INLINE_LAMBDA {
        return !keep ? v : keep_lanes(v, keep + at);
    };
    add_narrow_tiles(
        tiles, first, second,
        [&](Index r, int i) BATCHNORM_INLINE_LAMBDA {
            const Index e = r * kTile + i * kFloats;
            const auto g = gate_vector<kAct>(dy + e, x + e, at(y, e), Whole{}, k);
            if (dresidual != nullptr) store_lanes(dresidual + e, g);
            return masked(g, e);
        },
        [&](Index r, int i) BATCHNORM_INLINE_LAMBDA {
            const Index e = r * kTile + i * kFloats;
            return masked(load_floats(x + e) - k.mean, e);
        });
    if (done == n) return;
    float g[kTile], means[kTile];
    gate_line<false>(dy + done, x + done, at(y, done), g, n - done, lanes, c, kAct);
    if (dresidual != nullptr) narrow(g, dresidual + done, n - done);
    for (float& m : means) m = lanes.mean[c];
    add_narrow_rest(x + done, g, keep ? keep + done : Keep{}, n - done, means, first, second);
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

    // g is kept in registers, unless padding must be written too.
    const bool direct = kCanBeNarrow<T> && !b.wide && !(s.mask && s.dresidual);

    void run(double* sum, double* product) {
        if constexpr (kCanBeNarrow<T>) {
            if (!s.mask && !b.wide) {
                with_activation(s.options.activation,
                                [&](auto act) { add_real_positions<act.value>(); });
                sums.fold(b.channels, sum, product);
                return correct(b.channels, means, lows, sum, product);
            }
        }
        for_each_piece(s, b, !gated || direct, [&](Index o, Index i, Index n, const Piece& piece) {
            fetch_next<T>(s, b, s.x, o);
            fetch_next<T>(s, b, s.dy, o);
            fetch_next<T>(s, b, s.y, o);
            if (piece.is(Piece::padding) && !(s.dresidual && !s.options.zero_padding))
                return blank(o, i, n);
            for (Index c = 0; c < b.channels; ++c) add(o, i, n, piece, c);
        });
        sums.fold(b.channels, sum, product);
        if (kCanBeNarrow<T> && !b.wide) correct(b.channels, means, lows, sum, product);
    }

    // Without a mask, in float32.
    template <Activation kAct>
    void add_real_positions() {
        for_some_stretches(s, b, [&](const Stretch* some, Index m) {
            for (Index k = 0; k < m; ++k) {
                fetch_next<T>(s, b, s.x, some[k].o);
                fetch_next<T>(s, b, s.dy, some[k].o);
                fetch_next<T>(s, b, s.y, some[k].o);
            }
            for (Index c = 0; c < b.channels; ++c) {
                TileSums both(sums.first[c], sums.second[c]);
                for (Index k = 0; k < m; ++k) add_real_stretch<kAct>(some[k], c, both);
                both.store(sums.first[c], sums.second[c]);
            }
        });
    }

    template <Activation kAct>
    BATCHNORM_INLINE void add_real_stretch(const Stretch& from, Index c, TileSums& both) {
        const Floats mean = all_lanes(float(means[c]));
        const auto k = coefficients.all(c);
        const Index offset = (b.channel + c) * s.layout.inner + from.first;
        const T* x = element<const T>(s.x, from.o, offset);
        const T* dy = element<const T>(s.dy, from.o, offset);
        const T* y = element<const T>(s.y, from.o, offset);
        T* dresidual = element<T>(s.dresidual, from.o, offset);
        add_positions(from.n, both, [&](Index e, auto io) BATCHNORM_INLINE_LAMBDA {
            const Floats gate = gate_vector<kAct>(dy + e, x + e, at(y, e), io, k);
            if (dresidual != nullptr) io.store(dresidual + e, gate);
            return Two{gate, gate * (io.load(x + e) - mean)};
        });
    }

    void add(Index o, Index i, Index n, const Piece& piece, Index c) {
        const Index offset = (b.channel + c) * s.layout.inner + i;
        const T* x = element<const T>(s.x, o, offset);
        const T* dy = element<const T>(s.dy, o, offset);
        if (!gated) return add_parts(x, dy, piece, c);
        if constexpr (kCanBeNarrow<T>) {
            if (direct) return add_gated_parts(x, dy, offset, o, piece, c);
        }
        gate_line<false>(dy, x, element<const T>(s.y, o, offset), g, n, coefficients, c,
                         s.options.activation);
        if (s.dresidual) store(element<T>(s.dresidual, o, offset), n, piece);
        add_parts(x, g, piece, c);
    }

    void add_gated_parts(const T* x, const T* dy, Index offset, Index o, const Piece& piece,
                         Index c) {
        const T* y = element<const T>(s.y, o, offset);
        T* dresidual = element<T>(s.dresidual, o, offset);
        with_activation(s.options.activation, [&](auto act) {
            for (const auto& [from, end, kind] : piece) {
                if (kind == Piece::padding) continue;
                add_gated_stretch<act.value>(x + from, dy + from, at(y, from),
                                             dresidual == nullptr ? nullptr : dresidual + from,
                                             kind == Piece::real ? Keep{} : piece.keep(from),
                                             end - from, coefficients, c, sums.first[c],
                                             sums.second[c]);
            }
        });
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
            const Keep keep = kind == Piece::real ? Keep{} : piece.keep(first);
            add_part(x + first, from + first, keep, end - first, c);
        }
    }

    template <class G>
    void add_part(const T* x, const G* from, Keep keep, Index n, Index c) {
        double *first = sums.first[c], *second = sums.second[c];
        if constexpr (kCanBeNarrow<T>) {
            if (!b.wide)
                return add_narrow_stretch(x, from, keep, n, float(means[c]), first, second);
        }
        if (!keep) {
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
