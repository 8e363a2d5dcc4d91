#include "channels.hpp"

#include "vector.hpp"

namespace batchnorm::BATCHNORM_ISA {

namespace {

template <class T>
void load_all(const void* data, Index first, Index n, double* out, Index stride) {
    const T* in = static_cast<const T*>(data) + first;
    if (stride == 1) {
        for (Index i = 0; i < n; ++i) out[i] = widen(in[i]);
    } else {
        for (Index i = 0; i < n; ++i) out[i] = widen(in[i * stride]);
    }
}

template <class T>
void store_all(void* data, Index first, Index n, const double* in) {
    T* out = static_cast<T*>(data) + first;
    for (Index i = 0; i < n; ++i) narrow(Compute<T>(in[i]), out[i]);
}

}  // namespace

void load(const PerChannel& array, Index first, Index n, double* out, Index stride) {
    switch (array.type) {
        case Type::f16:
            return load_all<Half>(array.data, first, n, out, stride);
        case Type::bf16:
            return load_all<Bfloat>(array.data, first, n, out, stride);
        case Type::f32:
            return load_all<float>(array.data, first, n, out, stride);
        case Type::f64:
            return load_all<double>(array.data, first, n, out, stride);
    }
}

namespace {

void store(const PerChannel& array, Index first, Index n, const double* in) {
    switch (array.type) {
        case Type::f16:
            return store_all<Half>(array.data, first, n, in);
        case Type::bf16:
            return store_all<Bfloat>(array.data, first, n, in);
        case Type::f32:
            return store_all<float>(array.data, first, n, in);
        case Type::f64:
            return store_all<double>(array.data, first, n, in);
    }
}

// Functions of their own, since only a function's arguments can be declared not to overlap.
void find_moments(Index n, double count, const double* __restrict sum,
                  const double* __restrict square, double* __restrict mean, double* __restrict low,
                  double* __restrict var) {
    for (Index i = 0; i < n; ++i) {
        const double anchor = mean[i], shift = sum[i] / count, moved = anchor + shift;
        const double back = moved - anchor;  // Knuth's two-sum: mean + low is anchor + shift
        low[i] = (anchor - (moved - back)) + (shift - back);
        mean[i] = moved;
        const double found = square[i] / count - shift * shift;
        var[i] = found < 0 || count == 1 ? 0.0 : found;
    }
}

// Marks unsound sums, and leaves their anchors as they are.
void find_narrow_moments(Index n, double count, double eps, const double* __restrict sum,
                         const double* __restrict square, double* __restrict mean,
                         double* __restrict low, double* __restrict var) {
    for (Index i = 0; i < n; ++i) {
        const double anchor = mean[i], shift = sum[i] / count, mean_square = square[i] / count;
        const double moved = anchor + shift, back = moved - anchor;
        const double found = mean_square - shift * shift;
        const bool sound = is_sound(anchor, shift, mean_square, eps);
        low[i] = sound ? (anchor - (moved - back)) + (shift - back) : 0.0;
        mean[i] = sound ? moved : anchor;
        var[i] = !sound ? kUnsound : found < 0 ? 0.0 : found;
    }
}

}  // namespace

void finish_moments(const Statistics& s, Index first, Index n, double count, const double* sum,
                    const double* square, const double* narrow_eps) {
    double* mean = s.row(Statistics::mean) + first;
    double* low = s.row(Statistics::low) + first;
    double* var = s.row(Statistics::var) + first;
    if (count <= 0) {
        for (Index i = 0; i < n; ++i) mean[i] = low[i] = var[i] = 0.0;
    } else if (narrow_eps != nullptr) {
        find_narrow_moments(n, count, *narrow_eps, sum, square, mean, low, var);
    } else {
        find_moments(n, count, sum, square, mean, low, var);
    }
}

namespace {

constexpr Index kPart = 64;  // channels that are worked on at a time

// A per-channel array, `absent` everywhere where there is none.
struct Values {
    double at[kPart];

    Values(const PerChannel& array, Index first, Index n, double absent) {
        if (array) {
            load(array, first, n, at);
        } else {
            for (Index i = 0; i < n; ++i) at[i] = absent;
        }
    }
};

// Moments for the running statistics: averages over ghost groups (S12).
struct Averages {
    bool usable[kPart];  // has real rows, and all its moments are finite (S9)
    double mean[kPart], var[kPart], unbiased[kPart];

    Averages(const Step& step, Index first, Index n) {
        const Statistics& s = step.statistics;
        Index groups = 0;
        for (Index i = 0; i < n; ++i) usable[i] = true, mean[i] = var[i] = unbiased[i] = 0.0;
        for (Index g = 0; g < step.layout.groups; ++g) {
            const double count = s.count()[g];
            if (count <= 0) continue;
            ++groups;
            const double factor = count > 1 ? count / (count - 1.0) : 1.0;
            const double* means = s.row(Statistics::mean) + g * step.layout.channels + first;
            const double* vars = s.row(Statistics::var) + g * step.layout.channels + first;
            for (Index i = 0; i < n; ++i) {
                usable[i] =
                    usable[i] && is_finite(step.type, means[i]) && is_finite(step.type, vars[i]);
                mean[i] += means[i];
                var[i] += vars[i];
                unbiased[i] += vars[i] * factor;
            }
        }
        for (Index i = 0; i < n; ++i) {
            usable[i] = usable[i] && groups > 0;
            if (groups < 2) continue;
            mean[i] /= static_cast<double>(groups);
            var[i] /= static_cast<double>(groups);
            unbiased[i] /= static_cast<double>(groups);
        }
    }

    // In the type to which statistics of an x of this type are rounded (S16).
    static bool is_finite(Type type, double value) {
        return __builtin_isfinite(type == Type::f64 ? value : static_cast<float>(value));
    }
};

double clip(double value, double low, double high) {  // NaN stays NaN
    return value < low ? low : value > high ? high : value;
}

void renormalize(const Step& step, Index first, Index n, const Averages& average, double* r,
                 double* d) {
    const Options& o = step.options;
    const double root = __builtin_sqrt(o.eps), floor = root < 0x1p-126 ? 0x1p-126 : root;
    const Values stddev(step.running.renorm_stddev, first, n, 1.0);
    const Values mean(step.running.renorm_mean, first, n, 0.0);
    for (Index i = 0; i < n; ++i) {
        const double reference = stddev.at[i] < floor ? floor : stddev.at[i];
        r[i] = clip(__builtin_sqrt(average.var[i] + o.eps) / reference, o.rmin, o.rmax);
        d[i] = clip((average.mean[i] - mean.at[i]) / reference, -o.dmax, o.dmax);
    }
}

// Moves usable channels of a running statistic towards `value`; leaves `now` at their new values.
void move(const PerChannel& array, Index first, Index n, const bool* usable, double decay,
          const double* value, double* now) {
    load(array, first, n, now);
    for (Index i = 0; i < n; ++i) {
        if (usable[i]) now[i] = decay * now[i] + (1.0 - decay) * value[i];
    }
    store(array, first, n, now);
}

bool update_running(const Step& step, Index first, Index n, const Averages& average) {
    const Options& o = step.options;
    const Running& running = step.running;
    bool any = false;
    for (Index i = 0; i < n; ++i) any = any || average.usable[i];
    if (!any) return false;
    const double decay =
        o.decay >= 0 ? o.decay : 1.0 - 1.0 / (static_cast<double>(*running.batches) + 1.0);
    double now[kPart];
    move(running.mean, first, n, average.usable, decay, average.mean, now);
    if (!o.renorm) {
        const double* var = o.unbiased ? average.unbiased : average.var;
        move(running.var, first, n, average.usable, decay, var, now);
        return true;
    }
    double deviation[kPart], variance[kPart];
    for (Index i = 0; i < n; ++i) deviation[i] = __builtin_sqrt(average.var[i] + o.eps);
    move(running.stddev, first, n, average.usable, decay, deviation, now);
    load(running.var, first, n, variance);
    for (Index i = 0; i < n; ++i) {
        const double moved = now[i] * now[i] - o.eps;
        if (average.usable[i]) variance[i] = moved > 0 ? moved : 0.0;
    }
    store(running.var, first, n, variance);
    move(running.renorm_mean, first, n, average.usable, o.renorm_decay, average.mean, now);
    move(running.renorm_stddev, first, n, average.usable, o.renorm_decay, deviation, now);
    return true;
}

// rstd is 0 where var + eps is at most `least`: such a channel counts as constant (S7).
void find_affine(const double* __restrict var, const double* __restrict gamma,
                 const double* __restrict beta, double eps, double least, Index n,
                 double* __restrict rstd, double* __restrict scale, double* __restrict offset) {
    for (Index i = 0; i < n; ++i) {
        const double power = var[i] + eps;
        rstd[i] = power >= 0 && power <= least ? 0.0 : 1.0 / __builtin_sqrt(power);
        scale[i] = rstd[i] * gamma[i];
        offset[i] = beta[i];
    }
}

bool finish_part(const Step& step, Index first, Index n) {
    const Options& o = step.options;
    const Statistics& s = step.statistics;
    const Values gamma(step.gamma, first, n, 1.0), beta(step.beta, first, n, 0.0);
    const Values running_mean(step.running.mean, first, n, 0.0);
    const Values running_var(step.running.var, first, n, 1.0);
    // The square of the smallest deviation whose reciprocal is finite in x's arithmetic.
    const double least = step.type == Type::f64 ? 0x1p-1022 : 0x1p-252;
    double r[kPart], d[kPart];
    bool updated = false;
    if (o.batch && (o.update || o.renorm)) {
        const Averages average(step, first, n);
        if (o.renorm) renormalize(step, first, n, average, r, d);
        if (o.update) updated = update_running(step, first, n, average);
    }
    for (Index g = 0; g < step.layout.groups; ++g) {
        const Index at = g * step.layout.channels + first;
        const bool own = o.batch && s.count()[g] > 0;
        double* mean = s.row(Statistics::mean) + at;
        double* scale = s.row(Statistics::scale) + at;
        double* offset = s.row(Statistics::offset) + at;
        const double* var = own ? s.row(Statistics::var) + at : running_var.at;
        find_affine(var, gamma.at, beta.at, o.eps, least, n, s.row(Statistics::rstd) + at, scale,
                    offset);
        if (!own) {
            double* low = s.row(Statistics::low) + at;
            for (Index i = 0; i < n; ++i) mean[i] = running_mean.at[i], low[i] = 0.0;
        }
        if (!o.renorm) continue;
        for (Index i = 0; i < n; ++i) {
            s.row(Statistics::r)[at + i] = own ? r[i] : 1.0;
            s.row(Statistics::d)[at + i] = own ? d[i] : 0.0;
            if (own) scale[i] *= r[i], offset[i] += d[i] * gamma.at[i];
        }
    }
    return updated;
}

}  // namespace

bool finish_channels(const Step& step, Index first, Index end) {
    bool updated = false;
    for (Index c = first; c < end; c += kPart) {
        const Index n = end - c < kPart ? end - c : kPart;
        if (finish_part(step, c, n)) updated = true;
    }
    return updated;
}

void finish_gradients(const Step& step, const double* sums, Index first, Index end) {
    const Statistics& s = step.statistics;
    for (Index c = first; c < end; c += kPart) {
        const Index n = end - c < kPart ? end - c : kPart;
        double dgamma[kPart] = {}, dbeta[kPart] = {};
        for (Index g = 0; g < step.layout.groups; ++g) {
            const Index at = g * step.layout.channels + c;
            const double* rstd = s.row(Statistics::rstd) + at;
            const double *sum = sums + at, *product = sums + s.size + at;
            for (Index i = 0; i < n; ++i) dbeta[i] += sum[i];
            if (!step.options.renorm) {
                for (Index i = 0; i < n; ++i) dgamma[i] += rstd[i] * product[i];
                continue;
            }
            const double *r = s.row(Statistics::r) + at, *d = s.row(Statistics::d) + at;
            for (Index i = 0; i < n; ++i) {
                const double xhat = rstd[i] * product[i];
                dgamma[i] += r[i] * xhat + d[i] * sum[i];
            }
        }
        if (step.dgamma) store(step.dgamma, c, n, dgamma);
        if (step.dbeta) store(step.dbeta, c, n, dbeta);
    }
}

}  // namespace batchnorm::BATCHNORM_ISA
