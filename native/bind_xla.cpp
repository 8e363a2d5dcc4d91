// Two steps as XLA custom calls on the CPU: operands and attributes come in, the passes run on
// XLA's own threads. batchnorm/jax/custom_calls.py is the other side.
#include "bind_xla.hpp"

#include <algorithm>
#include <memory>
#include <new>
#include <string>

#include "batchnorm.hpp"
#include "float_mode.hpp"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using namespace batchnorm;

namespace {

// What a call's shapes decide, in this order; see `_geometry` in custom_calls.py.
enum Size { outer, channels, inner, groups, run, repeat, mask_outer, mask_inner, kSizes };
enum Number { eps, rmin, rmax, dmax, kNumbers };

class Pool : public Scheduler {
  public:
    explicit Pool(ffi::ThreadPool pool) : Scheduler{&Pool::schedule_on}, pool_(pool) {}

    Threads threads() const {
        return {static_cast<int>(std::clamp<Index>(pool_.num_threads(), 1, 256)), nullptr, this};
    }

  private:
    static void schedule_on(const Scheduler& self, void (*task)(void*), void* data) {
        static_cast<const Pool&>(self).pool_.Schedule([task, data] { task(data); });
    }

    mutable ffi::ThreadPool pool_;
};

Type type_of(ffi::DataType type) {
    switch (type) {
        case ffi::DataType::F16:
            return Type::f16;
        case ffi::DataType::BF16:
            return Type::bf16;
        case ffi::DataType::F64:
            return Type::f64;
        default:
            return Type::f32;
    }
}

bool is_absent(ffi::AnyBuffer buffer) { return buffer.element_count() == 0; }

PerChannel per_channel(ffi::AnyBuffer buffer) {
    if (is_absent(buffer)) return {};
    return {buffer.untyped_data(), type_of(buffer.element_type())};
}

// The statistics of a step: doubles in here, x's working type outside.
class Workspace {
  public:
    explicit Workspace(const Layout& layout)
        : layout_(layout),
          data_(new double[static_cast<std::size_t>(Statistics::doubles(layout))]) {
        std::fill_n(data_.get(), Statistics::doubles(layout), 0.0);
    }

    Statistics statistics() const { return {data_.get(), layout_.statistics()}; }

    template <class T>
    void store(T* rows, T* count) const {
        const Statistics s = statistics();
        for (Index i = 0; i < s.size; ++i) {
            const double mean = s.row(Statistics::mean)[i];
            const T high = T(mean);
            for (int r = 0; r < Statistics::kRows; ++r) {
                rows[r * s.size + i] = T(s.data[r * s.size + i]);
            }
            rows[Statistics::mean * s.size + i] = high;
            rows[Statistics::low * s.size + i] =
                T((mean - double(high)) + s.row(Statistics::low)[i]);
        }
        std::copy_n(s.count(), layout_.groups, count);
    }

    template <class T>
    void load(const T* rows, const T* count) {
        const Statistics s = statistics();
        std::copy_n(rows, Statistics::kRows * s.size, data_.get());
        std::copy_n(count, layout_.groups, s.count());
        if (sizeof(T) == sizeof(double)) return;
        for (Index i = 0; i < s.size; ++i) {
            s.row(Statistics::mean)[i] += s.row(Statistics::low)[i];  // exact: two floats
            s.row(Statistics::low)[i] = 0.0;
        }
    }

  private:
    Layout layout_;
    std::unique_ptr<double[]> data_;
};

// A call's geometry, threads and mask, and the error if they do not go together.
struct Call {
    Step step;
    Pool pool;
    ffi::Error error = ffi::Error::Success();

    Call(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer mask,
         ffi::Span<const int64_t> sizes)
        : pool(threads) {
        if (sizes.size() != kSizes) {
            error = ffi::Error::InvalidArgument("batchnorm: geometry must have 8 entries");
            return;
        }
        const int64_t* n = sizes.begin();
        step.type = type_of(x.element_type());
        step.layout = {n[outer], n[channels], n[inner], n[groups], n[run]};
        const auto elements = static_cast<Index>(x.element_count());
        if (elements != n[outer] * n[channels] * n[inner]) {
            error = ffi::Error::InvalidArgument(
                "batchnorm: geometry must have the elements of x, " + std::to_string(elements));
        }
        if (!is_absent(mask)) {
            const auto width = static_cast<int>(ffi::ByteWidth(mask.element_type()));
            step.mask = {mask.untyped_data(), width, n[repeat], n[mask_outer], n[mask_inner]};
        }
        step.options.threads = pool.threads();
        step.x = array(x);
    }

    Array array(ffi::AnyBuffer buffer) const {
        if (is_absent(buffer)) return {};
        return {buffer.untyped_data(), step.layout.channels * step.layout.inner};
    }
};

template <class F>
ffi::Error guarded(F f) {
    const KeepSubnormals mode;  // the statistics are stored and loaded here
    try {
        f();
        return ffi::Error::Success();
    } catch (const std::bad_alloc&) {
        return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                          "batchnorm: no memory for the statistics of a step");
    }
}

ffi::Error forward(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer mask,
                   ffi::AnyBuffer gamma, ffi::AnyBuffer beta, ffi::AnyBuffer running_mean,
                   ffi::AnyBuffer running_var, ffi::AnyBuffer renorm_mean,
                   ffi::AnyBuffer renorm_stddev, ffi::Result<ffi::AnyBuffer> y,
                   ffi::Result<ffi::AnyBuffer> statistics, ffi::Result<ffi::AnyBuffer> count,
                   ffi::Span<const int64_t> geometry, ffi::Span<const double> numbers, bool batch,
                   bool renorm) {
    Call call(threads, x, mask, geometry);
    if (call.error.failure()) return call.error;
    if (numbers.size() != kNumbers)
        return ffi::Error::InvalidArgument("batchnorm: numbers must have 4 entries");
    Step& step = call.step;
    step.y = call.array(*y);
    step.gamma = per_channel(gamma), step.beta = per_channel(beta);
    step.running.mean = per_channel(running_mean), step.running.var = per_channel(running_var);
    step.running.renorm_mean = per_channel(renorm_mean);
    step.running.renorm_stddev = per_channel(renorm_stddev);
    Options& options = step.options;
    options.eps = numbers.begin()[eps], options.batch = batch, options.renorm = renorm;
    options.rmin = numbers.begin()[rmin], options.rmax = numbers.begin()[rmax];
    options.dmax = numbers.begin()[dmax];
    return guarded([&] {
        Workspace workspace(step.layout);
        step.statistics = workspace.statistics();
        if (batch) moments(step);
        normalize(step);
        if (statistics->element_type() == ffi::DataType::F64) {
            workspace.store(statistics->typed_data<double>(), count->typed_data<double>());
        } else {
            workspace.store(statistics->typed_data<float>(), count->typed_data<float>());
        }
    });
}

ffi::Error backward(ffi::ThreadPool threads, ffi::AnyBuffer dy, ffi::AnyBuffer x,
                    ffi::AnyBuffer mask, ffi::AnyBuffer statistics, ffi::AnyBuffer count,
                    ffi::Result<ffi::AnyBuffer> dx, ffi::Result<ffi::AnyBuffer> dgamma,
                    ffi::Result<ffi::AnyBuffer> dbeta, ffi::Span<const int64_t> geometry,
                    bool batch, bool renorm) {
    Call call(threads, x, mask, geometry);
    if (call.error.failure()) return call.error;
    Step& step = call.step;
    step.dy = call.array(dy), step.dx = call.array(*dx);
    step.dgamma = per_channel(*dgamma), step.dbeta = per_channel(*dbeta);
    step.options.batch = batch, step.options.renorm = renorm;
    return guarded([&] {
        Workspace workspace(step.layout);
        step.statistics = workspace.statistics();
        if (statistics.element_type() == ffi::DataType::F64) {
            workspace.load(statistics.typed_data<double>(), count.typed_data<double>());
        } else {
            workspace.load(statistics.typed_data<float>(), count.typed_data<float>());
        }
        const auto size = static_cast<std::size_t>(2 * step.layout.statistics());
        std::unique_ptr<double[]> sums(new double[size]);
        if (batch || step.dgamma || step.dbeta) reduce(step, sums.get());
        if (step.dx) apply(step, sums.get());
    });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(batchnorm_xla_forward, forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const int64_t>>("geometry")
                                  .Attr<ffi::Span<const double>>("numbers")
                                  .Attr<bool>("batch")
                                  .Attr<bool>("renorm"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(batchnorm_xla_backward, backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const int64_t>>("geometry")
                                  .Attr<bool>("batch")
                                  .Attr<bool>("renorm"));

namespace batchnorm {

void* const kXlaForward = reinterpret_cast<void*>(&batchnorm_xla_forward);
void* const kXlaBackward = reinterpret_cast<void*>(&batchnorm_xla_backward);

}  // namespace batchnorm
