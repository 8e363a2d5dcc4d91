// The expected results of a forward and a backward step, with the error that each may have.
#pragma once

#include "forward_reference.hpp"

namespace batchnorm::tests {

class Reference : public ForwardReference {
  public:
    Values dx, dresidual, dgamma, dbeta;

    using ForwardReference::ForwardReference;

    // Where rounding may decide the activation's side, the actual output's side counts.
    void backward(const std::vector<double>& actual_y) {
        find_gates(actual_y);
        const Index channels = p.layout.channels;
        dx.resize(static_cast<Index>(p.x.size()));
        dgamma.resize(channels), dbeta.resize(channels);
        for (Index c = 0; c < channels; ++c) {
            for (Index g = 0; g < p.layout.groups; ++g) add_gradients(g, c);
            round(dgamma, c, p.gamma_type), round(dbeta, c, p.beta_type);
        }
    }

  private:
    // g = act'(.) dy everywhere; `doubt_` where either side of the activation would be right.
    void find_gates(const std::vector<double>& actual_y) {
        dresidual.resize(static_cast<Index>(p.x.size()));
        doubt_.assign(p.x.size(), 0);
        for (Index o = 0; o < p.layout.outer; ++o) {
            for (Index c = 0; c < p.layout.channels; ++c) {
                for (Index i = 0; i < p.layout.inner; ++i) {
                    if (p.is_zeroed(o, i)) continue;
                    const auto at = static_cast<std::size_t>(p.at(o, c, i));
                    if (p.options.activation == Activation::none) {
                        dresidual.value[at] = p.dy[at];
                    } else {
                        find_gate(at, actual_y[at]);
                    }
                }
            }
        }
    }

    void find_gate(std::size_t i, double actual) {
        const Real before = before_.value[i], error = before_.error[i];
        const bool clear = std::fabs(before) > error + smallest(p.type);
        const bool negative = clear ? before <= 0 : actual <= 0;
        const Real slope =
            p.options.activation == Activation::relu ? Real(0) : Real(kNegativeSlope);
        const Real dy = p.dy[i], g = !negative ? dy : slope == 0 ? 0 : dy * slope;
        // Computed once more from x, the sign is that of a number that a half type may round to 0.
        const bool half = p.type == Type::f16 || p.type == Type::bf16;
        if (half && !clear && !p.reads_y && actual == 0) doubt_[i] = 1;
        dresidual.set(static_cast<Index>(i), g, 2 * unit * std::fabs(g) + (g == dy ? 0 : tiny));
        round(dresidual, static_cast<Index>(i), p.type);
        if (doubt_[i]) dresidual.error[i] = kAnything;
    }

    // Sums of g and g x̂ over real rows, of their absolute values, and what doubt and subnormal
    // products add.
    struct Sums {
        Real g = 0, gx = 0, size_g = 0, size_gx = 0, doubt_g = 0, doubt_gx = 0;
    };

    Sums sum_gradients(Index g, Index c) {
        Sums sums;
        const Channel& k = channel(g, c);
        for (const Position& row : rows(g)) {
            const auto at = static_cast<std::size_t>(p.at(row.o, c, row.i));
            const Real v = dresidual.value[at], xhat = (x(row.o, c, row.i) - k.mean) * k.rstd;
            sums.g += v, sums.gx += v * xhat;
            sums.size_g += std::fabs(v), sums.size_gx += std::fabs(v * xhat);
            // Products may be subnormal: those of the slope, and those of sums in double.
            if (p.options.activation == Activation::leaky_relu)
                sums.doubt_g += tiny, sums.doubt_gx += tiny * std::fabs(xhat);
            sums.doubt_gx += smallest(Type::f64) * (1 + k.rstd);
            // In float32 a sum of products that have all vanished counts as 0.
            if (sums_narrowly(p.type, static_cast<Index>(k.count)))
                sums.doubt_gx += smallest(Type::f32) / 2 * k.rstd;
            if (!doubt_[at]) continue;
            sums.doubt_g += std::fabs(Real(p.dy[at]));
            sums.doubt_gx += std::fabs(Real(p.dy[at]) * xhat);
        }
        return sums;
    }

    // Few products and sums are in double; only the slope is rounded to the type of the arithmetic.
    // In float32 x - mean, the product and three additions are rounded, each by one unit.
    Real sum_error(const Channel& k) const {
        const bool sloped = p.options.activation == Activation::leaky_relu;
        const Real few = sloped ? 4 * unit + 1e-12L : p.type == Type::f64 ? 1e-12L : 1e-11L;
        return few + (sums_narrowly(p.type, static_cast<Index>(k.count)) ? 5 * unit : 0);
    }

    void add_gradients(Index g, Index c) {
        if (rows(g).empty()) return;
        const Channel& k = channel(g, c);
        const Sums s = sum_gradients(g, c);
        const Real g_error = sum_error(k) * s.size_g + s.doubt_g;
        const Real gx_error = sum_error(k) * s.size_gx + s.doubt_gx + k.var_error * s.size_gx +
                              k.mean_error * k.rstd * std::fabs(s.g);
        const auto at = static_cast<std::size_t>(c);
        dbeta.value[at] += s.g, dbeta.error[at] += g_error;
        dgamma.value[at] += k.r * s.gx + k.d * s.g;
        dgamma.error[at] += 2 * smallest(Type::f64) +
                            std::fabs(k.r) * (gx_error + k.var_error * std::fabs(s.gx)) +
                            std::fabs(k.d) * g_error + k.d_error * std::fabs(s.g);
        for (const Position& row : rows(g)) find_dx(k, s, g_error, gx_error, row, c);
    }

    void find_dx(const Channel& k, const Sums& s, Real g_error, Real gx_error, const Position& row,
                 Index c) {
        const Index i = p.at(row.o, c, row.i);
        const auto at = static_cast<std::size_t>(i);
        const Real xhat = (x(row.o, c, row.i) - k.mean) * k.rstd, g = dresidual.value[at];
        const Real scale = k.rstd * k.r * get(p.gamma, c, 1), size = std::fabs(scale);
        if (doubt_[at]) return dx.set(i, 0, kAnything);
        if (!k.own) {
            dx.set(i, g * scale,
                   8 * unit * std::fabs(g * scale) + 4 * tiny * (1 + size + std::fabs(g)));
            return round(dx, i, p.type);
        }
        if (k.count == 1 && std::isfinite(xhat * scale)) return;  // 0, to the bit (S7)
        // What multiplies x - mean may be subnormal too.
        const Real least = tiny * (1 + std::fabs(xhat) + std::fabs(x(row.o, c, row.i) - k.mean)) *
                           (1 + size) * (1 + k.rstd);
        const Real mean_g = s.g / k.count, along = s.gx / k.count;
        const Real terms = std::fabs(g) + std::fabs(mean_g) + std::fabs(xhat * along);
        const Real error = (14 * unit + 3 * k.var_error) * terms +
                           (g_error + std::fabs(xhat) * gx_error) / k.count +
                           k.mean_error * k.rstd * std::fabs(along);
        dx.set(i, scale * (g - mean_g - xhat * along), size * error + 8 * least + tiny * terms);
        round(dx, i, p.type);
    }

    std::vector<char> doubt_;
};

}  // namespace batchnorm::tests
