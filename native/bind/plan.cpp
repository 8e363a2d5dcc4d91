#include "bind/plan.hpp"

#include <algorithm>
#include <string>

namespace nb = nanobind;

namespace batchnorm::bind {

Plan::Plan(Type type, const Layout& layout, Index row, int activation, bool zero_padding)
    : row_(row) {
    check(layout.outer >= 0, "outer", "at least 0", layout.outer);
    check(layout.channels >= 0, "channels", "at least 0", layout.channels);
    check(layout.inner >= 0, "inner", "at least 0", layout.inner);
    check(layout.groups >= 0, "groups", "at least 0", layout.groups);
    check(layout.run >= 1, "run", "at least 1", layout.run);
    check(activation >= 0 && activation <= 2, "activation", "0, 1 or 2", activation);
    if (!addressable(layout, 0)) refuse("kernels: x has more elements than memory.");
    if (!countable(layout)) refuse("kernels: x has more statistics than memory.");
    const bool divides = layout.groups == 0 ? layout.outer == 0
                                            : layout.outer % layout.groups == 0 &&
                                                  layout.outer / layout.groups % layout.run == 0;
    check(divides, "outer", "a multiple of groups * run", layout.outer);
    checked_row(layout, "row", row);
    step_.type = type, step_.layout = layout;
    step_.options.activation = static_cast<Activation>(activation);
    step_.options.zero_padding = zero_padding;
}

void Plan::set_mask(int width, Index repeat, Index outer, Index inner) {
    check(width == 1 || width == 2 || width == 4 || width == 8, "mask width", "1, 2, 4 or 8",
          width);
    check(repeat >= 1, "mask repeat", "at least 1", repeat);
    step_.mask = {nullptr, width, repeat, outer, inner};
}

Kept* Plan::moments(Address x, Address mask, int threads) const {
    auto kept = std::make_unique<Kept>(step_.layout);
    Step step = begin(mask, *kept, threads);
    step.x = array("x", x, row_);
    require("x", step.x);
    nb::gil_scoped_release release;
    batchnorm::moments(step);
    return kept.release();
}

Kept* Plan::forward(const Forward& call) const {
    std::unique_ptr<Kept> own;
    if (call.kept == nullptr) own = std::make_unique<Kept>(step_.layout);
    Kept* const kept = call.kept == nullptr ? own.get() : call.kept;
    if (!kept->fits(step_.layout)) refuse("kernels: kept must come from a step of this plan.");
    if (call.kept != nullptr && !call.batch) refuse("kernels: kept moments need batch=True.");
    Step step = begin(call.mask, *kept, call.threads);
    step.x = array("x", call.x, row_);
    require("x", step.x);
    step.residual = array("residual", call.residual, call.residual_row);
    step.y = array("y", call.y, dense());
    require("y", step.y);
    step.gamma = call.state.gamma, step.beta = call.state.beta, step.running = call.state.running;
    Options& options = step.options;
    options.eps = call.eps, options.decay = call.decay;
    options.batch = call.batch, options.update = call.update, options.unbiased = call.unbiased;
    if (call.renorm != nullptr) {
        options.renorm = true, options.renorm_decay = call.renorm->decay;
        options.rmin = call.renorm->rmin, options.rmax = call.renorm->rmax;
        options.dmax = call.renorm->dmax;
    }
    check_running(step);
    kept->renorm = options.renorm;
    nb::gil_scoped_release release;
    if (call.kept == nullptr) {
        batchnorm::forward(step);
    } else {
        batchnorm::normalize(step);
    }
    return own ? own.release() : kept;
}

Kept* Plan::restore(Address data, Index size, bool renorm) const {
    const Index wanted = Statistics::doubles(step_.layout);
    check(size == wanted, "the size of kept", std::to_string(wanted).c_str(), size);
    const auto* first = static_cast<const double*>(aligned("kept", data, 8));
    auto kept = std::make_unique<Kept>(step_.layout);
    std::copy_n(first, size, kept->statistics().data);
    kept->renorm = renorm;
    return kept.release();
}

void Plan::backward(const Inputs& in, const Gradients& out, const Kept& kept, bool batch,
                    int threads) const {
    Step step = begin_gradient(in, out, kept, threads);
    check_gate(step, static_cast<bool>(step.dx));
    step.options.batch = batch;
    nb::gil_scoped_release release;
    const std::unique_ptr<double[]> sums(new double[sum_count()]);
    batchnorm::backward(step, sums.get());
}

Doubles Plan::reduce(const Inputs& in, const Gradients& out, const Kept& kept, int threads) const {
    const Step step = begin_gradient(in, out, kept, threads);
    check_gate(step, true);
    std::unique_ptr<double[]> sums(new double[sum_count()]());
    {
        nb::gil_scoped_release release;
        batchnorm::reduce(step, sums.get());
    }
    nb::capsule owner(sums.get(), [](void* p) noexcept { delete[] static_cast<double*>(p); });
    double* const data = sums.release();
    return {data, {sum_count()}, owner};
}

void Plan::apply(const Inputs& in, const Gradients& out, const GivenSums& sums, const Kept& kept,
                 int threads) const {
    const Step step = begin_gradient(in, out, kept, threads);
    require("dx", step.dx);
    check_gate(step, true);
    check(sums.shape(0) == sum_count(), "sums", "two for each statistic",
          static_cast<Index>(sums.shape(0)));
    nb::gil_scoped_release release;
    batchnorm::apply(step, sums.data());
}

Step Plan::begin(Address mask, const Kept& kept, int threads) const {
    Step step = step_;
    step.mask.data = aligned("mask", mask, step.mask.width);
    step.statistics = kept.statistics();
    check(threads >= 1, "threads", "at least 1", threads);
    step.options.threads = {threads, team_, nullptr};
    return step;
}

Step Plan::begin_gradient(const Inputs& in, const Gradients& out, const Kept& kept,
                          int threads) const {
    if (!kept.fits(step_.layout)) refuse("kernels: kept must come from a step of this plan.");
    Step step = begin(in.mask, kept, threads);
    step.dy = array("dy", in.dy, in.dy_row);
    require("dy", step.dy);
    step.x = array("x", in.x, row_);
    require("x", step.x);
    step.y = array("y", in.y, dense());
    step.dx = array("dx", out.dx, dense());
    step.dresidual = array("dresidual", out.dresidual, dense());
    step.dgamma = per_channel("dgamma", out.dgamma, type_of(out.dgamma_type));
    step.dbeta = per_channel("dbeta", out.dbeta, type_of(out.dbeta_type));
    step.options.renorm = kept.renorm;
    return step;
}

void Plan::check_running(const Step& step) const {
    const Running& running = step.running;
    const Options& options = step.options;
    const bool empty = step.layout.channels == 0;
    if ((options.update || options.renorm) && !(empty || (running.mean && running.var)))
        refuse("kernels: an update needs running statistics.");
    if (options.renorm &&
        !(empty || (running.stddev && running.renorm_mean && running.renorm_stddev)))
        refuse("kernels: renorm needs all its statistics; got a null pointer.");
    if (options.update && options.decay < 0 && running.batches == nullptr)
        refuse("kernels: the cumulative average needs the number of batches.");
}

void Plan::check_gate(const Step& step, bool has_dx) const {
    const bool gated = step_.options.activation != Activation::none;
    if (!step.dresidual) return;
    const bool zeroes = step.mask && step_.options.zero_padding;
    if (!has_dx || !(gated ? static_cast<bool>(step.y) : zeroes))
        refuse("kernels: dresidual needs dx, and an activation and y, or padding that is zeroed.");
}

// Null for an absent array; an empty one may be null too.
Array Plan::array(const char* name, Address address, Index row) const {
    if (address == 0) return {};
    void* data = aligned(name, address, kBytes[static_cast<int>(step_.type)]);
    return {data, checked_row(step_.layout, name, row)};
}

void Plan::require(const char* name, const Array& array) const {
    if (!array && step_.layout.statistics() > 0 && step_.layout.positions() > 0)
        refuse(std::string("kernels: ") + name + " is missing; got a null pointer.");
}

}  // namespace batchnorm::bind
