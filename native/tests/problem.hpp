// A case as plain numbers.
#pragma once

#include <algorithm>
#include <vector>

#include "elements.hpp"

namespace batchnorm::tests {

// A case as plain numbers; absent arrays are empty.
struct Problem {
    Type type = Type::f32, running_type = Type::f32;
    Type gamma_type = Type::f32, beta_type = Type::f32;
    Layout layout;
    Options options;
    std::vector<double> x, residual, dy;  // (outer, channels, inner)
    std::vector<char> real;               // (outer, inner)
    std::vector<double> gamma, beta, mean, var, stddev, renorm_mean, renorm_stddev;
    std::int64_t batches = 0;
    bool has_running = false, reads_y = true;

    Index at(Index o, Index c, Index i) const {
        return (o * layout.channels + c) * layout.inner + i;
    }
    bool is_real(Index o, Index i) const {
        return real[static_cast<std::size_t>(o * layout.inner + i)] != 0;
    }
    // Padding whose y and dresidual are 0 (S4).
    bool is_zeroed(Index o, Index i) const { return options.zero_padding && !is_real(o, i); }
    Index group_of(Index o) const { return o / layout.run % layout.groups; }  // S12
};

}  // namespace batchnorm::tests
