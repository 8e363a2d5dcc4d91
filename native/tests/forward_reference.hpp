// The expected results of a forward step: textbook sums over lists of real rows, in long double,
// with the error that each result may have.
#pragma once

#include "passes/soundness.hpp"
#include "problem.hpp"

namespace batchnorm::tests {

struct Values {
    std::vector<Real> value, error;

    void resize(Index n) {
        value.assign(static_cast<std::size_t>(n), 0);
        error.assign(static_cast<std::size_t>(n), 0);
    }
    void set(Index i, Real v, Real e) {
        value[static_cast<std::size_t>(i)] = v;
        error[static_cast<std::size_t>(i)] = e;
    }
};

// An error that allows any value.
constexpr Real kAnything = std::numeric_limits<Real>::infinity();

class ForwardReference {
  public:
    Values count, batch_mean, batch_var;  // as moments() leaves them
    Values y, mean, var, stddev, renorm_mean, renorm_stddev;
    std::int64_t batches;

    explicit ForwardReference(const Problem& problem)
        : batches(problem.batches),
          p(problem),
          unit(half_ulp(compute_type(p.type))),
          tiny(smallest(compute_type(p.type))),
          channels_(static_cast<std::size_t>(p.layout.statistics())) {
        list_rows();
        find_moments();
        find_averages();
        find_coefficients();
        find_y();
        find_running();
    }

  protected:
    struct Position {
        Index o, i;
    };

    // One channel of one group: moments, what normalizes, and how far off both may be.
    struct Channel {
        Real count = 0, mean = 0, var = 0, mean_error = 0, var_error = 0;
        Real rstd = 0, r = 1, d = 0, d_error = 0;
        bool own = false;  // normalized by its own moments
    };

    Channel& channel(Index g, Index c) {
        return channels_[static_cast<std::size_t>(g * p.layout.channels + c)];
    }
    static Real get(const std::vector<double>& values, Index i, Real absent) {
        return values.empty() ? absent : Real(values[static_cast<std::size_t>(i)]);
    }
    Real x(Index o, Index c, Index i) const { return p.x[static_cast<std::size_t>(p.at(o, c, i))]; }

    // The error that one rounding to the stored type adds.
    void round(Values& values, Index i, Type type) const {
        const auto at = static_cast<std::size_t>(i);
        // Half types round twice, from double to float first.
        const Real ulps = half_ulp(type) + (type == Type::f64 ? 0 : half_ulp(Type::f32));
        const Real size = std::fabs(values.value[at]) + values.error[at];  // of what is rounded
        values.error[at] += ulps * size + smallest(type);
    }

    const std::vector<Position>& rows(Index g) const { return rows_[static_cast<std::size_t>(g)]; }

    const Problem& p;
    const Real unit, tiny;  // rounding of the arithmetic, relative and absolute
    Values before_;         // the activation

  private:
    // Averages over groups, for the running statistics (S12).
    struct Average {
        bool usable = false;
        Real mean = 0, var = 0, unbiased = 0, mean_error = 0, var_error = 0;
    };

    void list_rows() {
        rows_.resize(static_cast<std::size_t>(p.layout.groups));
        for (Index o = 0; o < p.layout.outer; ++o) {
            for (Index i = 0; i < p.layout.inner; ++i) {
                if (p.is_real(o, i))
                    rows_[static_cast<std::size_t>(p.group_of(o))].push_back({o, i});
            }
        }
    }

    Real mean_around(Real anchor, Index g, Index c) const {
        Real sum = 0;
        for (const Position& at : rows(g)) sum += x(at.o, c, at.i) - anchor;
        return anchor + sum / static_cast<Real>(rows(g).size());
    }

    void find_moments() {
        count.resize(p.layout.groups);
        batch_mean.resize(p.layout.statistics()), batch_var.resize(p.layout.statistics());
        for (Index g = 0; g < p.layout.groups; ++g) {
            count.set(g, static_cast<Real>(rows(g).size()), 0);
            for (Index c = 0; c < p.layout.channels; ++c) {
                Channel& k = channel(g, c);
                k.count = static_cast<Real>(rows(g).size());
                if (k.count > 0) find_moments(k, g, c);
                const Index at = g * p.layout.channels + c;
                // Compared as one double.
                batch_mean.set(at, k.mean, k.mean_error + half_ulp(Type::f64) * std::fabs(k.mean));
                // Squares that all vanish in float32 count as 0 beside eps.
                const Real lost = sums_narrowly(p.type, static_cast<Index>(k.count)) ? tiny : 0;
                batch_var.set(at, k.var,
                              k.var * k.var_error + 2 * smallest(Type::f64) +
                                  (p.options.eps >= 0x1p-120 ? lost : 0));
            }
        }
    }

    void find_moments(Channel& k, Index g, Index c) {
        const Position& first = rows(g).front();
        k.mean = mean_around(mean_around(x(first.o, c, first.i), g, c), g, c);
        Real sum = 0;
        for (const Position& at : rows(g)) {
            const Real d = x(at.o, c, at.i) - k.mean;
            sum += d * d;
        }
        k.var = k.count == 1 ? 0 : sum / k.count;  // S7
        // float64 takes its sums around the mean; the others, if few, in double around some real
        // row, whose distance from the mean may cost a factor of the count in the variance.
        const bool wide = p.type == Type::f64;
        k.var_error = wide ? Real(1e-12L) : 1e-13L * (10 + k.count);
        k.mean_error = (wide ? 3e-13L : 1e-10L) * std::sqrt(k.var) + mean_rounding(k.mean);
        if (!sums_narrowly(p.type, static_cast<Index>(k.count))) return;
        // As derived in passes/soundness.hpp.
        k.var_error += (6 * (1 + kFar) + 8 * std::sqrt(kFar * (1 + kFar))) * half_ulp(Type::f32);
        k.mean_error += 4 * std::sqrt(1 + kFar) * half_ulp(Type::f32) * std::sqrt(k.var);
    }

    // The mean is carried in two numbers of the arithmetic; sums of gradients take it in double.
    Real mean_rounding(Real around) const {
        const Real least = 2 * smallest(Type::f64);
        if (p.type == Type::f64) return std::ldexp(std::fabs(around), -62) + least;
        return (2 * unit * unit + half_ulp(Type::f64)) * std::fabs(around) + least;
    }

    void find_averages() {
        for (Index c = 0; c < p.layout.channels; ++c) {
            Average a;
            Real groups = 0, absolute = 0;
            a.usable = true;
            for (Index g = 0; g < p.layout.groups; ++g) {
                const Channel& k = channel(g, c);
                if (k.count == 0) continue;
                groups += 1;
                a.usable = a.usable && std::isfinite(k.mean) && std::isfinite(k.var);
                a.mean += k.mean, a.var += k.var, a.mean_error += k.mean_error;
                a.unbiased += k.count > 1 ? k.var * k.count / (k.count - 1) : k.var;
                absolute += std::fabs(k.mean);
                a.var_error = std::max(a.var_error, k.var_error);
            }
            a.usable = a.usable && groups > 0;
            if (groups > 0) a.mean /= groups, a.var /= groups, a.unbiased /= groups;
            if (groups > 0) a.mean_error = (a.mean_error + 1e-15L * absolute) / groups;
            averages_.push_back(a);
        }
    }

    Real clip(Real value, Real low, Real high) const {
        return value < low ? low : value > high ? high : value;
    }

    void find_coefficients() {
        for (Index g = 0; g < p.layout.groups; ++g) {
            for (Index c = 0; c < p.layout.channels; ++c) {
                Channel& k = channel(g, c);
                k.own = p.options.batch && k.count > 0;
                if (k.own) {
                    if (p.options.renorm) renormalize(k, averages_[static_cast<std::size_t>(c)], c);
                } else {
                    k.mean = get(p.mean, c, 0), k.var = get(p.var, c, 1);
                    k.mean_error = mean_rounding(k.mean), k.var_error = 1e-15L;
                }
                k.rstd = 1 / std::sqrt(k.var + Real(p.options.eps));
            }
        }
    }

    void renormalize(Channel& k, const Average& average, Index c) const {
        const Options& o = p.options;
        const Real floor = std::sqrt(Real(o.eps));
        const Real stddev_now = std::max(get(p.renorm_stddev, c, 1), floor);
        const Real mean_now = get(p.renorm_mean, c, 0);
        k.r = clip(std::sqrt(average.var + Real(o.eps)) / stddev_now, o.rmin, o.rmax);
        k.d = clip((average.mean - mean_now) / stddev_now, -Real(o.dmax), o.dmax);
        const Real size = std::fabs(average.mean) + std::fabs(mean_now);
        k.d_error = (average.mean_error + 1e-15L * size) / stddev_now;
        k.var_error = std::max(k.var_error, average.var_error);
    }

    void find_y() {
        y.resize(static_cast<Index>(p.x.size()));
        before_.resize(static_cast<Index>(p.x.size()));
        for (Index o = 0; o < p.layout.outer; ++o) {
            for (Index c = 0; c < p.layout.channels; ++c) {
                for (Index i = 0; i < p.layout.inner; ++i) find_y(o, c, i);
            }
        }
    }

    void find_y(Index o, Index c, Index i) {
        const Index at = p.at(o, c, i);
        if (p.is_zeroed(o, i)) return y.set(at, 0, 0);
        const Channel& k = channel(p.group_of(o), c);
        const Real gamma = get(p.gamma, c, 1), beta = get(p.beta, c, 0);
        const Real residual = get(p.residual, at, 0);
        const Real value = x(o, c, i), scale = k.rstd * k.r * gamma;
        const Real along = (value - k.mean) * scale;
        const Real before = along + k.d * gamma + beta + residual;
        const Real terms =
            std::fabs(along) + std::fabs(k.d * gamma) + std::fabs(beta) + std::fabs(residual);
        Real error = 8 * unit * terms + std::fabs(scale) * k.mean_error +
                     std::fabs(along) * k.var_error + std::fabs(gamma) * k.d_error +
                     4 * tiny * (1 + std::fabs(scale) + std::fabs(value - k.mean));
        // Padding may hold values that overflow in the arithmetic; any result is right there.
        if (!p.is_real(o, i) && !(terms < largest(p.type) / 16)) error = kAnything;
        before_.set(at, before, error);
        y.set(at, activate(before), error);
        if (error != kAnything) round(y, at, p.type);
    }

    Real activate(Real v) const {
        if (p.options.activation == Activation::none || !(v <= 0)) return v;
        return p.options.activation == Activation::relu ? 0 : v * Real(kNegativeSlope);
    }

    void find_running() {
        const Index n = p.has_running ? p.layout.channels : 0;
        for (Values* v : {&mean, &var, &stddev, &renorm_mean, &renorm_stddev}) v->resize(n);
        bool any = false;
        for (Index c = 0; c < n; ++c) {
            const Average& a = averages_[static_cast<std::size_t>(c)];
            const bool moves = p.options.batch && p.options.update && a.usable;
            any = any || moves;
            keep(c);
            if (moves) move(c, a);
        }
        if (any) ++batches;
    }

    void keep(Index c) {
        mean.set(c, get(p.mean, c, 0), 0), var.set(c, get(p.var, c, 0), 0);
        stddev.set(c, get(p.stddev, c, 0), 0);
        renorm_mean.set(c, get(p.renorm_mean, c, 0), 0);
        renorm_stddev.set(c, get(p.renorm_stddev, c, 0), 0);
    }

    void move(Index c, const Average& a) {
        const Options& o = p.options;
        const Real decay =
            o.decay >= 0 ? Real(o.decay) : 1 - 1 / (static_cast<Real>(p.batches) + 1);
        move(mean, c, decay, a.mean, a.mean_error);
        if (!o.renorm) {
            const Real value = o.unbiased ? a.unbiased : a.var;
            return move(var, c, decay, value, a.var_error * value);
        }
        const Real deviation = std::sqrt(a.var + Real(o.eps)), error = deviation * a.var_error;
        move(stddev, c, decay, deviation, error);
        const Real moved = stddev.value[static_cast<std::size_t>(c)];
        // The variance follows the deviation as it is stored, or as it was before rounding.
        var.set(c, std::max(moved * moved - Real(o.eps), Real(0)),
                2 * moved * stddev.error[static_cast<std::size_t>(c)] + 1e-15L * Real(o.eps));
        round(var, c, p.running_type);
        move(renorm_mean, c, o.renorm_decay, a.mean, a.mean_error);
        move(renorm_stddev, c, o.renorm_decay, deviation, error);
    }

    void move(Values& values, Index c, Real decay, Real to, Real error) const {
        const Real from = values.value[static_cast<std::size_t>(c)];
        const Real roundings = 1e-15L * (std::fabs(from) + std::fabs(to));
        values.set(c, decay * from + (1 - decay) * to, (1 - decay) * error + roundings);
        round(values, c, p.running_type);
    }

    std::vector<std::vector<Position>> rows_;
    std::vector<Channel> channels_;
    std::vector<Average> averages_;
};

}  // namespace batchnorm::tests
