// act'(y) dy, the first step of both gradient reduction and gradient application (S18).
#pragma once

#include "sums.hpp"

namespace batchnorm::BATCHNORM_ISA {

// One vector of act'(y) dy, from y itself or, where y is null, from y computed again from x.
template <Activation kAct, class T, class IO>
BATCHNORM_INLINE Vector<T> gate_vector(const T* dy, const T* x, const T* y, IO io,
                                       const Coefficients<Vector<T>>& k) {
    const Vector<T> g = io.load(dy);
    if constexpr (kAct == Activation::none) {
        return g;
    } else {
        return gate<kAct>(g, y != nullptr ? io.load(y) : affine(io.load(x), k));
    }
}

// A line of it: in the type of the arithmetic, or rounded to that of x.
template <bool kByLane, class T, class L, class G>
void gate_line(const T* dy, const T* x, const T* y, G* g, Index n, const L& lanes, Index c,
               Activation activation) {
    with_activation(activation, [&](auto act) {
        for_vectors<T, kByLane>(
            lanes, c, n, [=](Index i, const auto& k, auto io) BATCHNORM_INLINE_LAMBDA {
                io.store(g + i, gate_vector<act.value>(dy + i, at(x, i), at(y, i), io, k));
            });
    });
}

}  // namespace batchnorm::BATCHNORM_ISA
