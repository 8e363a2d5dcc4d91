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

// One line of dx; `keep`: which elements are real.
template <Activation kAct, bool kByLane, class T, class L>
BATCHNORM_INLINE void line(bool batch, const T* dy, const T* x, const T* y, T* dx, Index n,
                           const L& lanes, Index c, bool streams, Keep keep = {}) {
    const auto run = [&](auto finish) BATCHNORM_INLINE_LAMBDA {
        fill_vectors<T, kByLane>(
            lanes, c, dx, n, streams, [=](Index i, const auto& k, auto io) BATCHNORM_INLINE_LAMBDA {
                const auto g = gate_vector<kAct>(dy + i, at(x, i), at(y, i), io, k);
                io.store(dx + i, finish(i, g, k, io));
            });
    };
    if (!batch) {
        run([=](Index i, auto g, const auto& k, auto) BATCHNORM_INLINE_LAMBDA {
            const auto v = g * k.scale;
            return !keep ? v : keep_lanes(v, keep + i);
        });
    } else if (!keep) {
        run([=](Index i, auto g, const auto& k, auto io)
                BATCHNORM_INLINE_LAMBDA { return gradient(g, io.load(x + i), k); });
    } else {
        run([=](Index i, auto g, const auto& k, auto io) BATCHNORM_INLINE_LAMBDA {
            return keep_lanes(gradient(g, io.load(x + i), k), keep + i);
        });
    }
}

template <class T>
struct Source {
    Activation gate;  // that is still to be taken
    Array g;

    explicit Source(const Step& s)
        : gate(has_gradient<T>(s) ? Activation::none : s.options.activation),
          g(has_gradient<T>(s) ? s.dresidual : s.dy) {}
};

template <class T, class L>
void apply_padded_rows(const Step& s, Index o, Index offset, Index n, const L& lanes) {
    set_zero(element<T>(s.dx, o, offset), n);
    if (!s.dresidual) return;
    T* dresidual = element<T>(s.dresidual, o, offset);
    if (s.options.zero_padding) return set_zero(dresidual, n);
    gate_line<true>(element<const T>(s.dy, o, offset), element<const T>(s.x, o, offset),
                    element<const T>(s.y, o, offset), dresidual, n, lanes, 0, s.options.activation);
}

// Rows in one line: several where all arrays are contiguous.
Index rows_in_line(const Step& s) {
    const Index width = s.layout.channels * s.layout.inner;
    const Array all[] = {s.x, s.y, s.dy, s.dx, s.dresidual};
    for (const Array& a : all) {
        if (a && a.stride != width) return 1;
    }
    return rows_together(width);
}

// Not inlined, since rows are walked in many ways.
template <Activation kAct, class T, class L>
void fill_rows(const Step& s, const Block& b, Index o, Index rows, const L& lanes) {
    const Index first = b.channel * s.layout.inner, n = rows * b.channels * s.layout.inner;
    line<kAct, true>(s.options.batch, element<const T>(Source<T>(s).g, o, first),
                     element<const T>(s.x, o, first), element<const T>(s.y, o, first),
                     element<T>(s.dx, o, first), n, lanes, 0, b.streams);
}

template <Activation kAct, class T>
void apply_rows(const Step& s, const Block& b, const double* sums) {
    const Index span = s.layout.inner, width = b.channels * span, first = b.channel * span;
    const Index joined = b.channels == s.layout.channels ? rows_in_line(s) : 1;
    const Lanes<Compute<T>, kWideLanes> lanes(s, b, joined * width,
                                              s.options.batch ? sums : nullptr);
    const Source<T> from(s);
    const auto compute = [&](Index o, Index rows) { fill_rows<kAct, T>(s, b, o, rows, lanes); };
    const auto fetch = [&](Index o) {
        fetch_line(element<const T>(from.g, o, first), width);
        fetch_line(element<const T>(s.x, o, first), width);
    };
    const auto pad = [&](Index o, Index rows) {
        apply_padded_rows<T>(s, o, first, rows * width, lanes);
    };
    for_each_run(s.layout, b.group, b.first, b.rows, [&](Index o, Index n) {
        if (s.mask) {
            for_padded_rows(s.mask, o, n, width, joined, fetch, compute, pad);
            return true;
        }
        for (Index r = 0; r < n; r += joined) compute(o + r, n - r < joined ? n - r : joined);
        return true;
    });
}

template <Activation kAct, class T>
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
                line<kAct, false>(s.options.batch, g + first, x + first, at(y, first), dx + first,
                                  end - first, lanes, c, b.streams,
                                  kind == Piece::real ? Keep{} : piece.keep(first));
            }
        }
    });
}

}  // namespace

template <class T>
void apply_block(const Step& step, const Block& block, const double* sums) {
    with_activation(Source<T>(step).gate, [&](auto act) {
        if (by_rows(step)) {
            apply_rows<act.value, T>(step, block, sums);
        } else {
            apply_positions<act.value, T>(step, block, sums);
        }
    });
    if (block.streams) settle();
}

template void apply_block<Half>(const Step&, const Block&, const double*);
template void apply_block<Bfloat>(const Step&, const Block&, const double*);
template void apply_block<float>(const Step&, const Block&, const double*);
template void apply_block<double>(const Step&, const Block&, const double*);

}  // namespace batchnorm::BATCHNORM_ISA
