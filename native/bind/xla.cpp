// XLA's custom calls: reads operands and attributes, and runs the passes on XLA's own threads.
#include "bind/xla.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "bind/xla_call.hpp"
#include "driver/float_mode.hpp"

namespace batchnorm::bind {
namespace {

Type type_of(XLA_FFI_DataType type) {
    switch (type) {
        case XLA_FFI_DataType_F16:
            return Type::f16;
        case XLA_FFI_DataType_BF16:
            return Type::bf16;
        case XLA_FFI_DataType_F64:
            return Type::f64;
        default:
            return Type::f32;
    }
}

// Bytes of a mask's element.
int width_of(XLA_FFI_DataType type) {
    switch (type) {
        case XLA_FFI_DataType_PRED:
        case XLA_FFI_DataType_S8:
        case XLA_FFI_DataType_U8:
            return 1;
        case XLA_FFI_DataType_S16:
        case XLA_FFI_DataType_U16:
            return 2;
        case XLA_FFI_DataType_S32:
        case XLA_FFI_DataType_U32:
            return 4;
        case XLA_FFI_DataType_S64:
        case XLA_FFI_DataType_U64:
            return 8;
        default:
            throw Refusal("batchnorm: a mask must be of booleans or integers");
    }
}

PerChannel per_channel(const Buffer& buffer) {
    if (!buffer) return {};
    return {buffer.data, type_of(buffer.type)};
}

// The values of `from` in `to`, where a step moves them.
PerChannel copy(const Buffer& from, const Buffer& to, const Layout& layout) {
    if (from.type != to.type || from.elements != layout.channels || to.elements != from.elements)
        throw Refusal(
            "batchnorm: running statistics must have a value for each channel, and keep "
            "their type");
    const PerChannel found = per_channel(to);
    if (found)
        std::memcpy(to.data, from.data,
                    static_cast<std::size_t>(from.elements * kBytes[static_cast<int>(found.type)]));
    return found;
}

double number_at(const Buffer& buffer, Index i) {
    if (buffer.type == XLA_FFI_DataType_F64) return buffer.as<const double>()[i];
    return double(buffer.as<const float>()[i]);
}

// The statistics of a step: doubles in this library, x's working type in XLA's arrays.
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

Layout layout_of(const Attributes& layout) {
    return {layout.integer("outer"), layout.integer("channels"), layout.integer("inner"),
            layout.integer("groups"), layout.integer("run")};
}

Mask mask_of(const Buffer& buffer, const Attributes& view) {
    if (!buffer) return {};
    return {buffer.data, width_of(buffer.type), view.integer("repeat"), view.integer("outer"),
            view.integer("inner")};
}

// A call's operands and results by position, and the step made of them and of the attributes.
class Call {
  public:
    Call(const XLA_FFI_CallFrame& frame, int x, int mask)
        : attributes(frame.attrs), frame_(frame), pool_(frame) {
        const Buffer array = operand(x);
        step.type = type_of(array.type);
        step.layout = layout_of(attributes.dictionary("layout"));
        step.mask = mask_of(operand(mask), attributes.dictionary("view"));
        const Layout& layout = step.layout;
        if (array.elements != layout.outer * layout.channels * layout.inner)
            throw Refusal("batchnorm: layout must have the elements of x, " +
                          std::to_string(array.elements));
        step.options.batch = attributes.flag("batch");
        step.options.renorm = attributes.flag("renorm");
        step.options.threads = pool_.threads();
        step.x = rows(array);
    }

    Buffer operand(int i) const { return Buffer(frame_.args.args[i]); }
    Buffer result(int i) const { return Buffer(frame_.rets.rets[i]); }

    Array rows(const Buffer& buffer) const {
        if (!buffer) return {};
        return {buffer.data, step.layout.channels * step.layout.inner};
    }

    Step step;
    Attributes attributes;

  private:
    const XLA_FFI_CallFrame& frame_;
    XlaPool pool_;
};

// Operands: x, mask, gamma, beta, running mean and variance, renormalization's mean, stddev and
// limits: rmin, rmax, dmax, and the decay, so that a program takes any. Results: y, statistics,
// count, and the running mean and variance after the step, if it moves them.
void forward(const XLA_FFI_CallFrame& frame) {
    const KeepSubnormals mode;  // the statistics are stored here
    Call call(frame, 0, 1);
    Step& step = call.step;
    step.gamma = per_channel(call.operand(2)), step.beta = per_channel(call.operand(3));
    step.running.mean = per_channel(call.operand(4));
    step.running.var = per_channel(call.operand(5));
    step.running.renorm_mean = per_channel(call.operand(6));
    step.running.renorm_stddev = per_channel(call.operand(7));
    step.y = call.rows(call.result(0));
    Options& options = step.options;
    options.eps = call.attributes.number("eps");
    if (options.renorm) {
        const Buffer limits = call.operand(8);
        if (limits.elements != 3) throw Refusal("batchnorm: limits must have 3 elements");
        options.rmin = number_at(limits, 0), options.rmax = number_at(limits, 1);
        options.dmax = number_at(limits, 2);
    }
    options.zero_padding = call.attributes.flag("zero_padding");
    options.update = call.attributes.flag("update");
    if (options.update) {
        const Buffer decay = call.operand(9);
        if (decay.elements != 1) throw Refusal("batchnorm: decay must have 1 element");
        options.decay = number_at(decay, 0);
        step.running.mean = copy(call.operand(4), call.result(3), step.layout);
        step.running.var = copy(call.operand(5), call.result(4), step.layout);
    }
    const Buffer statistics = call.result(1), count = call.result(2);
    const Workspace workspace(step.layout);
    step.statistics = workspace.statistics();
    batchnorm::forward(step);
    if (statistics.type == XLA_FFI_DataType_F64) {
        workspace.store(statistics.as<double>(), count.as<double>());
    } else {
        workspace.store(statistics.as<float>(), count.as<float>());
    }
}

// Operands: dy, x, mask, statistics, count. Results: dx, dgamma, dbeta.
void backward(const XLA_FFI_CallFrame& frame) {
    const KeepSubnormals mode;  // the statistics are loaded here
    Call call(frame, 1, 2);
    Step& step = call.step;
    step.dy = call.rows(call.operand(0)), step.dx = call.rows(call.result(0));
    step.dgamma = per_channel(call.result(1)), step.dbeta = per_channel(call.result(2));
    const Buffer statistics = call.operand(3), count = call.operand(4);
    Workspace workspace(step.layout);
    step.statistics = workspace.statistics();
    if (statistics.type == XLA_FFI_DataType_F64) {
        workspace.load(statistics.as<double>(), count.as<double>());
    } else {
        workspace.load(statistics.as<float>(), count.as<float>());
    }
    const auto size = static_cast<std::size_t>(2 * step.layout.statistics());
    const std::unique_ptr<double[]> sums(new double[size]);
    batchnorm::backward(step, sums.get());
}

XLA_FFI_Error* handle_forward(XLA_FFI_CallFrame* frame) { return handle(frame, 10, 5, forward); }
XLA_FFI_Error* handle_backward(XLA_FFI_CallFrame* frame) { return handle(frame, 5, 3, backward); }

}  // namespace

void* const kXlaForward = reinterpret_cast<void*>(&handle_forward);
void* const kXlaBackward = reinterpret_cast<void*>(&handle_backward);

}  // namespace batchnorm::bind
