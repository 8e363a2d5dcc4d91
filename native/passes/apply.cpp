// Gradient application: dx from g and its sums (S8, S18).
#include "gate.hpp"
#include "padded_rows.hpp"
#include "pieces.hpp"

namespace batchnorm::BATCHNORM_ISA {
namespace {

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
    set_zero(element<T>(s.dx, o, offset), n);
    if (!s.dresidual) return;
    T* dresidual = element<T>(s.dresidual, o, offset);
    if (s.options.zero_padding) return set_zero(dresidual, n);
    gate_to(element<const T>(s.dy, o, offset), element<const T>(s.y, o, offset), dresidual, n,
            s.options.activation);
}

// Rows in one line: several where all arrays are contiguous.
Index rows_in_line(const Step& s) {
    const Index width = s.layout.channels * s.layout.inner;
    const Array all[] = {s.x, s.y, s.dy, s.dx, s.dresidual};
    for (const Array& a : all) {
        if (a && a.stride != width) return 1;
    }
    return s.mask ? rows_per_line(width) : rows_together(width);
}

template <class T>
void apply_rows(const Step& s, const Block& b, const double* sums) {
    const Index span = s.layout.inner, width = b.channels * span, first = b.channel * span;
    const Index joined = b.channels == s.layout.channels ? rows_in_line(s) : 1;
    const Lanes<Compute<T>, kWideLanes> lanes(s, b, joined * width,
                                              s.options.batch ? sums : nullptr);
    const Source<T> from(s);
    const auto compute = [&](Index o, Index rows) {
        apply_row<T>(s, from, o, first, rows * width, lanes.from());
    };
    const auto fetch = [&](Index o) {
        fetch_line(element<const T>(from.g, o, first), width);
        fetch_line(element<const T>(s.x, o, first), width);
    };
    const auto pad = [&](Index o) { apply_padded_row<T>(s, o, first, width); };
    for_each_run(s.layout, b.group, b.first, b.rows, [&](Index o, Index n) {
        if (s.mask) {
            for_padded_rows(s.mask, o, n, joined, fetch, compute, pad);
            return true;
        }
        for (Index r = 0; r < n; r += joined) compute(o + r, n - r < joined ? n - r : joined);
        return true;
    });
}

constexpr Index kBlanked = 512;

template <class T>
void apply_positions(const Step& s, const Block& b, const double* sums) {
    const Lanes<Compute<T>, kMaxChannels> lanes(s, b, b.channels, s.options.batch ? sums : nullptr);
    const Source<T> from(s);
    for_each_piece(s, b, true, [&](Index o, Index i, Index, const Piece& piece) {
        for (Index c = 0; c < b.channels; ++c) {
            const Index offset = (b.channel + c) * s.layout.inner + i;
            T* dx = element<T>(s.dx, o, offset);
            const T *g = element<const T>(from.g, o, offset), *x = element<const T>(s.x, o, offset),
                    *y = element<const T>(s.y, o, offset);
            for (const auto& [first, end, kind] : piece) {
                if (kind == Piece::padding) {
                    set_zero(dx + first, end - first);
                    continue;
                }
                // Padded positions are zeroed while their part of dx is in the nearest cache.
                const Index part = kind == Piece::real ? end - first : kBlanked;
                for (Index p = first; p < end; p += part) {
                    const Index n = end - p < part ? end - p : part;
                    apply_chunks<0>(s, g + p, x + p, at(y, p), dx + p, n, from.gated,
                                    lanes.from(c));
                    if (kind == Piece::mixed) zero_padding(dx + p, piece.keep(p), n);
                }
            }
        }
    });
}

}  // namespace

template <class T>
void apply_block(const Step& step, const Block& block, const double* sums) {
    if (by_rows(step)) return apply_rows<T>(step, block, sums);
    apply_positions<T>(step, block, sums);
}

template void apply_block<Half>(const Step&, const Block&, const double*);
template void apply_block<Bfloat>(const Step&, const Block&, const double*);
template void apply_block<float>(const Step&, const Block&, const double*);
template void apply_block<double>(const Step&, const Block&, const double*);

}  // namespace batchnorm::BATCHNORM_ISA
