// A custom call in XLA's C interface: buffers, attributes by name, threads.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "batchnorm.hpp"
#include "xla/ffi/api/c_api.h"

namespace batchnorm::bind {

// A call with other arguments than its handler expects; XLA raises the message.
struct Refusal : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// An array without gaps. An absent one is empty.
struct Buffer {
    XLA_FFI_DataType type = XLA_FFI_DataType_INVALID;
    void* data = nullptr;
    Index elements = 0;

    explicit Buffer(const void* given) {
        const auto& buffer = *static_cast<const XLA_FFI_Buffer*>(given);
        type = buffer.dtype, data = buffer.data, elements = 1;
        for (int64_t i = 0; i < buffer.rank; ++i) elements *= buffer.dims[i];
    }

    explicit operator bool() const { return elements != 0; }
    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }
};

// Named values, which may hold further ones.
class Attributes {
  public:
    explicit Attributes(const XLA_FFI_Attrs& given) : given_(given) {}

    Attributes dictionary(const char* name) const {
        const void* found = find(name, XLA_FFI_AttrType_DICTIONARY, "a dictionary");
        return Attributes(*static_cast<const XLA_FFI_Attrs*>(found));
    }
    Index integer(const char* name) const {
        return scalar<int64_t>(name, XLA_FFI_DataType_S64, "an int64");
    }
    double number(const char* name) const {
        return scalar<double>(name, XLA_FFI_DataType_F64, "a float64");
    }
    bool flag(const char* name) const {
        return scalar<bool>(name, XLA_FFI_DataType_PRED, "a bool");
    }

  private:
    [[noreturn]] static void refuse(const char* name, const char* kind) {
        throw Refusal(std::string("batchnorm: attribute ") + name + " must be " + kind);
    }

    const void* find(const char* name, XLA_FFI_AttrType type, const char* kind) const {
        const std::size_t length = std::strlen(name);
        for (int64_t i = 0; i < given_.size; ++i) {
            const XLA_FFI_ByteSpan& found = *given_.names[i];
            if (found.len != length || std::memcmp(found.ptr, name, length) != 0) continue;
            if (given_.types[i] != type) break;
            return given_.attrs[i];
        }
        refuse(name, kind);
    }

    template <class T>
    T scalar(const char* name, XLA_FFI_DataType type, const char* kind) const {
        const void* found = find(name, XLA_FFI_AttrType_SCALAR, kind);
        const auto& scalar = *static_cast<const XLA_FFI_Scalar*>(found);
        if (scalar.dtype != type) refuse(name, kind);
        return *static_cast<const T*>(scalar.value);
    }

    const XLA_FFI_Attrs& given_;
};

// XLA's threads in the form that the passes use.
class XlaPool : public Scheduler {
  public:
    explicit XlaPool(const XLA_FFI_CallFrame& frame)
        : Scheduler{&XlaPool::schedule_on}, api_(frame.api), ctx_(frame.ctx) {}

    Threads threads() const {
        constexpr int64_t kMost = 256;
        int64_t count = 0;
        XLA_FFI_ThreadPool_NumThreads_Args args{};
        args.struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE;
        args.ctx = ctx_, args.num_threads = &count;
        if (!succeeds(api_->XLA_FFI_ThreadPool_NumThreads(&args))) count = 1;
        return {static_cast<int>(count < 1 ? 1 : count > kMost ? kMost : count), nullptr, this};
    }

  private:
    static void schedule_on(const Scheduler& self, void (*task)(void*), void* data) {
        const auto& pool = static_cast<const XlaPool&>(self);
        XLA_FFI_ThreadPool_Schedule_Args args{};
        args.struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE;
        args.ctx = pool.ctx_, args.task = task, args.data = data;
        if (!pool.succeeds(pool.api_->XLA_FFI_ThreadPool_Schedule(&args))) task(data);
    }

    bool succeeds(XLA_FFI_Error* error) const {
        if (error == nullptr) return true;
        XLA_FFI_Error_Destroy_Args args{};
        args.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE;
        args.error = error;
        api_->XLA_FFI_Error_Destroy(&args);
        return false;
    }

    const XLA_FFI_Api* api_;
    XLA_FFI_ExecutionContext* ctx_;
};

inline XLA_FFI_Error* make_error(const XLA_FFI_Api& api, XLA_FFI_Error_Code code,
                                 const char* message) {
    XLA_FFI_Error_Create_Args args{};
    args.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
    args.message = message, args.errc = code;
    return api.XLA_FFI_Error_Create(&args);
}

// Answers XLA's question for the version of its interface; false if this is no such question.
inline bool tells_version(XLA_FFI_CallFrame& frame) {
    const XLA_FFI_Extension_Base* extension = frame.extension_start;
    if (extension == nullptr || extension->type != XLA_FFI_Extension_Metadata) return false;
    XLA_FFI_Metadata& metadata =
        *reinterpret_cast<const XLA_FFI_Metadata_Extension*>(extension)->metadata;
    metadata.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                            XLA_FFI_API_MINOR};
    metadata.traits = 0;
    metadata.state_type_id = XLA_FFI_UNKNOWN_TYPE_ID;
    return true;
}

// Runs f on a call, whose numbers of operands and results it checks; exceptions become XLA errors.
template <class F>
XLA_FFI_Error* handle(XLA_FFI_CallFrame* frame, int operands, int results, F f) {
    if (tells_version(*frame)) return nullptr;
    try {
        if (frame->args.size != operands || frame->rets.size != results)
            throw Refusal("batchnorm: a call must have " + std::to_string(operands) +
                          " operands and " + std::to_string(results) + " results");
        f(*frame);
        return nullptr;
    } catch (const Refusal& refusal) {
        return make_error(*frame->api, XLA_FFI_Error_Code_INVALID_ARGUMENT, refusal.what());
    } catch (const std::bad_alloc&) {
        return make_error(*frame->api, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED,
                          "batchnorm: no memory for the statistics of a step");
    }
}

}  // namespace batchnorm::bind
