#include "channels.hpp"

#include <cmath>
#include <cstring>

#define BATCHNORM_ISA scalar
#include "vector.hpp"

namespace batchnorm {

double load(const PerChannel& array, Index c) {
    switch (array.type) {
        case Type::f16:
            return scalar::widen(static_cast<const scalar::Half*>(array.data)[c]);
        case Type::bf16:
            return scalar::widen(static_cast<const scalar::Bfloat*>(array.data)[c]);
        case Type::f32:
            return static_cast<const float*>(array.data)[c];
        case Type::f64:
            break;
    }
    return static_cast<const double*>(array.data)[c];
}

void store(const PerChannel& array, Index c, double value) {
    switch (array.type) {
        case Type::f16:
            return scalar::narrow(static_cast<float>(value),
                                  static_cast<scalar::Half*>(array.data)[c]);
        case Type::bf16:
            return scalar::narrow(static_cast<float>(value),
                                  static_cast<scalar::Bfloat*>(array.data)[c]);
        case Type::f32:
            static_cast<float*>(array.data)[c] = static_cast<float>(value);
            return;
        case Type::f64:
            static_cast<double*>(array.data)[c] = value;
    }
}

void finish_moments(const Statistics& s, Index i, double count, double sum, double square) {
    double& mean = s.row(Statistics::mean)[i];
    double& low = s.row(Statistics::low)[i];
    double& var = s.row(Statistics::var)[i];
    if (count <= 0) {
        mean = low = var = 0.0;
        return;
    }
    const double anchor = mean, shift = sum / count;
    mean = anchor + shift;
    const double moved = mean - anchor;  // what rounding left of the shift, and of the anchor
    low = (anchor - (mean - moved)) + (shift - moved);
    var = square / count - shift * shift;
    if (var < 0 || count == 1) var = 0.0;
}

namespace {

// The type that statistics of an x of this type are rounded to (S16).
bool is_finite(Type type, double value) {
    return std::isfinite(type == Type::f64 ? value : static_cast<float>(value));
}

// One channel's moments as the running statistics see them: ghost groups averaged (S12).
struct Average {
    bool usable = false;  // counted something, and all of it finite (S9)
    double mean = 0.0, var = 0.0, unbiased = 0.0;
};

Average average_groups(const Step& step, Index c) {
    const Statistics& s = step.statistics;
    Average average;
    Index groups = 0;
    bool finite = true;
    for (Index g = 0; g < step.layout.groups; ++g) {
        const Index i = g * step.layout.channels + c;
        const double count = s.count()[g];
        if (count <= 0) continue;
        const double mean = s.row(Statistics::mean)[i], var = s.row(Statistics::var)[i];
        finite = finite && is_finite(step.type, mean) && is_finite(step.type, var);
        ++groups;
        average.mean += mean;
        average.var += var;
        average.unbiased += count > 1 ? var * (count / (count - 1.0)) : var;
    }
    average.usable = groups > 0 && finite;
    if (groups > 1) {
        average.mean /= static_cast<double>(groups);
        average.var /= static_cast<double>(groups);
        average.unbiased /= static_cast<double>(groups);
    }
    return average;
}

double clip(double value, double low, double high) {  // NaN stays NaN
    return value < low ? low : value > high ? high : value;
}

void renormalize(const Step& step, Index c, const Average& average, double& r, double& d) {
    const Options& o = step.options;
    const double stddev = load(step.running.renorm_stddev, c), floor = std::sqrt(o.eps);
    const double reference = stddev < floor ? floor : stddev;
    r = clip(std::sqrt(average.var + o.eps) / reference, o.rmin, o.rmax);
    d = clip((average.mean - load(step.running.renorm_mean, c)) / reference, -o.dmax, o.dmax);
}

void move(const PerChannel& array, Index c, double decay, double value) {
    store(array, c, decay * load(array, c) + (1.0 - decay) * value);
}

void update_running(const Step& step, Index c, const Average& average) {
    const Options& o = step.options;
    const Running& running = step.running;
    const double decay =
        o.decay >= 0 ? o.decay : 1.0 - 1.0 / (static_cast<double>(*running.batches) + 1.0);
    move(running.mean, c, decay, average.mean);
    if (!o.renorm) return move(running.var, c, decay, o.unbiased ? average.unbiased : average.var);
    const double deviation = std::sqrt(average.var + o.eps);
    move(running.stddev, c, decay, deviation);
    const double stddev = load(running.stddev, c), variance = stddev * stddev - o.eps;
    store(running.var, c, variance > 0 ? variance : 0.0);
    move(running.renorm_mean, c, o.renorm_decay, average.mean);
    move(running.renorm_stddev, c, o.renorm_decay, deviation);
}

}  // namespace

bool finish_channels(const Step& step, Index first, Index end) {
    const Options& o = step.options;
    const Statistics& s = step.statistics;
    bool updated = false;
    for (Index c = first; c < end; ++c) {
        const double gamma = step.gamma ? load(step.gamma, c) : 1.0;
        const double beta = step.beta ? load(step.beta, c) : 0.0;
        const double running_mean = step.running.mean ? load(step.running.mean, c) : 0.0;
        const double running_var = step.running.var ? load(step.running.var, c) : 1.0;
        double r = 1.0, d = 0.0;
        Average average;
        if (o.batch && (o.update || o.renorm)) {
            average = average_groups(step, c);
            if (o.renorm) renormalize(step, c, average, r, d);
        }
        for (Index g = 0; g < step.layout.groups; ++g) {
            const Index i = g * step.layout.channels + c;
            const bool own = o.batch && s.count()[g] > 0;
            if (!own) s.row(Statistics::mean)[i] = running_mean, s.row(Statistics::low)[i] = 0.0;
            const double var = own ? s.row(Statistics::var)[i] : running_var;
            if (!o.batch) s.row(Statistics::var)[i] = running_var;
            const double rstd = 1.0 / std::sqrt(var + o.eps);
            s.row(Statistics::rstd)[i] = rstd;
            s.row(Statistics::scale)[i] = own ? rstd * r * gamma : rstd * gamma;
            s.row(Statistics::offset)[i] = own ? d * gamma + beta : beta;
            s.row(Statistics::r)[i] = own ? r : 1.0;
            s.row(Statistics::d)[i] = own ? d : 0.0;
        }
        if (o.batch && o.update && average.usable) {
            update_running(step, c, average);
            updated = true;
        }
    }
    return updated;
}

void finish_gradients(const Step& step, const double* sums, Index first, Index end) {
    const Statistics& s = step.statistics;
    for (Index c = first; c < end; ++c) {
        double dgamma = 0.0, dbeta = 0.0;
        for (Index g = 0; g < step.layout.groups; ++g) {
            const Index i = g * step.layout.channels + c;
            const double xhat = s.row(Statistics::rstd)[i] * sums[s.size + i];
            dgamma += s.row(Statistics::r)[i] * xhat + s.row(Statistics::d)[i] * sums[i];
            dbeta += sums[i];
        }
        if (step.dgamma) store(step.dgamma, c, dgamma);
        if (step.dbeta) store(step.dbeta, c, dbeta);
    }
}

}  // namespace batchnorm
