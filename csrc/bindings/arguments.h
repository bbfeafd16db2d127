// The arguments of bindings: arrays are objects that export the buffer protocol. They are checked one by one
// and against each other; a fault raises std::invalid_argument, ValueError in Python, with one line that says
// which.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/overlap.h"
#include "kernels/table.h"
#include "ops/attention.h"

namespace py = pybind11;

namespace mlxgpt {

enum class Access { kRead, kReadUnaligned, kWrite };

template <class List>
std::string shape_text(const List& shape) {
    std::string text;
    for (const auto n : shape) text += (text.empty() ? "" : ", ") + std::to_string(n);
    return "(" + text + (shape.size() == 1 ? ",)" : ")");
}

[[noreturn]] inline void fail(const std::string& where, const std::string& what) {
    throw std::invalid_argument(where + ": " + what);
}

constexpr int kMostSize = 1 << 30;  // so that the sum of two sizes fits an int

/// An argument's memory, with its name and its function's name for messages.
struct Memory {
    std::string where, name;
    py::buffer_info info;

    /// types: the allowed letters of the buffer protocol; `expected` says the same in words.
    Memory(const char* where_, const std::string& name_, const py::buffer& buffer, Access access,
           const char* types, const char* expected)
        : where(where_), name(name_), info(buffer.request()) {
        if (type() == '\0' || std::strchr(types, type()) == nullptr)
            fail(where, name + " has buffer format '" + info.format + "', expected " + expected);
        for (const auto n : info.shape)
            if (n < 1 || n > kMostSize)
                fail(where, name + " is " + shape_text(info.shape) + ", expected sizes from 1 to " +
                                std::to_string(kMostSize));
        if (access == Access::kWrite && info.readonly)
            fail(where, name + " is read-only, expected a writable array");
        const auto multiple = " a multiple of " + std::to_string(info.itemsize) + " bytes";
        if (access != Access::kReadUnaligned && reinterpret_cast<uintptr_t>(info.ptr) % info.itemsize != 0)
            fail(where, name + " does not begin on" + multiple);
        for (const auto stride : info.strides)
            if (stride % info.itemsize != 0)
                fail(where,
                     name + " has a stride of " + std::to_string(stride) + " bytes, expected" + multiple);
        if (access == Access::kWrite) check_distinct_elements();
    }

    int size(size_t axis) const { return static_cast<int>(info.shape[axis]); }

    /// The letter of the elements' type in the buffer protocol, or 0 if the format is not a single letter.
    /// For unaligned arrays NumPy writes '=' (native byte order) before it.
    char type() const {
        const size_t at = info.format[0] == '=' || info.format[0] == '@' ? 1 : 0;
        return info.format.size() == at + 1 ? info.format[at] : '\0';
    }

    void expect_contiguous() const {
        py::ssize_t stride = info.itemsize;
        for (size_t axis = info.shape.size(); axis-- > 0; stride *= info.shape[axis])
            if (info.shape[axis] > 1 && info.strides[axis] != stride)
                fail(where, name + " is not contiguous");
    }

    // No two elements share memory if each axis, in order of strides, steps past all that the axes before it
    // span.
    void check_distinct_elements() const {
        std::vector<std::pair<py::ssize_t, py::ssize_t>> axes;
        for (size_t axis = 0; axis < info.shape.size(); ++axis)
            if (info.shape[axis] > 1) axes.emplace_back(std::abs(info.strides[axis]), info.shape[axis]);
        std::sort(axes.begin(), axes.end());
        py::ssize_t span = info.itemsize;
        for (const auto& [stride, n] : axes) {
            if (stride < span) fail(where, name + " has elements that share memory, expected distinct ones");
            span = stride * (n - 1) + span;
        }
    }
};

/// Letters of the buffer protocol, and what they mean. It has none for bfloat16, which is passed as bits in
/// uint16.
struct Types {
    const char *letters, *text;
};
constexpr Types kFloats{"feH", "float32 ('f'), float16 ('e') or bfloat16 bits in uint16 ('H')"};
constexpr Types kWeights{
    "feHI", "float32 ('f'), float16 ('e'), bfloat16 bits in uint16 ('H') or quantized words in uint32 ('I')"};

/// An array of floats, or of another type in `types`.
struct Array : Memory {
    Storage storage = Storage::kFloat32;

    Array(const char* where_, const std::string& name_, const py::buffer& buffer, Access access,
          Types types = kFloats)
        : Memory(where_, name_, buffer, access, types.letters, types.text) {
        if (type() == 'H') storage = Storage::kBFloat16;
        if (type() == 'e') storage = Storage::kFloat16;
    }

    void expect_shape(std::initializer_list<py::ssize_t> shape, const std::string& text) const {
        if (!std::equal(info.shape.begin(), info.shape.end(), shape.begin(), shape.end()))
            fail(where, name + " is " + shape_text(info.shape) + ", expected " + text);
    }
    void expect_shape(std::initializer_list<py::ssize_t> shape) const {
        expect_shape(shape, shape_text(shape));
    }

    void expect_storage(const Array& like) const {
        if (storage != like.storage)
            fail(where, name + " has buffer format '" + info.format + "', expected that of " + like.name +
                            ", '" + like.info.format + "'");
    }

    void expect_float32() const {
        if (type() != 'f')
            fail(where, name + " has buffer format '" + info.format + "', expected float32 ('f')");
    }

    void expect_unit_stride() const {
        if (info.shape.back() > 1 && info.strides.back() != info.itemsize)
            fail(where, name + " has a stride of " + std::to_string(info.strides.back() / info.itemsize) +
                            " elements along its last axis, expected 1");
    }

    Tensor4 tensor() const {
        expect_unit_stride();
        const py::ssize_t size = info.itemsize;
        return {info.ptr, storage, info.strides[0] / size, info.strides[1] / size, info.strides[2] / size};
    }

    float* contiguous() const {
        expect_float32();
        expect_contiguous();
        return static_cast<float*>(info.ptr);
    }
    /// The data of a float32 array of this shape without gaps.
    float* contiguous(std::initializer_list<py::ssize_t> shape) const {
        expect_shape(shape);
        return contiguous();
    }
};

/// The values of an argument of int32 ids, with its name for messages.
struct Values {
    const int32_t* data = nullptr;
    py::ssize_t size = 0;
    std::string where, name;

    /// Fails unless each value is in [least, limit); least is 0 or -1.
    void expect_within(int least, py::ssize_t limit, const char* what = "id") const {
        for (py::ssize_t i = 0; i < size; ++i)
            if (data[i] < least || data[i] >= limit)
                fail(where, name + " holds " + std::to_string(data[i]) + ", expected " +
                                (least < 0 ? "-1 or " : "") + "0 <= " + what + " < " + std::to_string(limit));
    }
};

/// An argument of int32 ids, without gaps.
struct Ids : Memory {
    Ids(const char* where_, const char* name_, const py::buffer& buffer)
        : Memory(where_, name_, buffer, Access::kRead, "i", "int32 ('i')") {
        expect_contiguous();
    }
    Values values() const { return {static_cast<const int32_t*>(info.ptr), info.size, where, name}; }

    void expect_length(int n) const {
        if (info.ndim != 1 || info.shape[0] != n)
            fail(where, name + " is " + shape_text(info.shape) + ", expected (" + std::to_string(n) + ",)");
    }

    /// Checks that each id is in [least, limit), and returns them.
    const int32_t* within(int least, py::ssize_t limit) const {
        values().expect_within(least, limit);
        return static_cast<const int32_t*>(info.ptr);
    }
};

/// Fails if an output shares memory with another argument. Null pointers stand for arguments that are None.
inline void expect_distinct(std::initializer_list<const Memory*> outputs,
                            std::initializer_list<const Memory*> inputs) {
    const auto layout = [](const Memory* m) {
        return Layout{m->info.ptr, m->info.itemsize, m->info.shape, m->info.strides};
    };
    const auto compare = [&](const Memory* a, const Memory* b) {
        if (a != nullptr && b != nullptr && share_memory(layout(a), layout(b)))
            fail(a->where,
                 a->name + " and " + b->name + " share memory, expected " + a->name + " to have its own");
    };
    for (auto output = outputs.begin(); output != outputs.end(); ++output) {
        for (const Memory* input : inputs) compare(*output, input);
        for (auto other = output + 1; other != outputs.end(); ++other) compare(*output, *other);
    }
}

using MaybeBuffer = std::optional<py::buffer>;

/// An array argument that may be None.
struct MaybeArray {
    std::optional<Array> array;

    MaybeArray(const char* where, const char* name, const MaybeBuffer& buffer, Access access,
               Types types = kFloats) {
        if (buffer) array.emplace(where, name, *buffer, access, types);
    }
    operator const Array*() const { return array ? &*array : nullptr; }
    const Array* operator->() const { return &*array; }
};

/// The distance in elements from one row of a matrix to the next. Rows must be contiguous and in ascending
/// order.
inline py::ssize_t stride_of_rows(const Array& a) {
    a.expect_unit_stride();
    const auto rows = a.info.shape[0], columns = a.info.shape[1];
    const auto stride = rows > 1 ? a.info.strides[0] / a.info.itemsize : columns;
    if (stride < columns || stride > INT32_MAX)
        fail(a.where, a.name + " has rows " + std::to_string(stride) + " elements apart, expected " +
                          std::to_string(columns) + " or more");
    return stride;
}

/// A float32 matrix.
inline Rows matrix(const Array& a) {
    a.expect_float32();
    return {static_cast<float*>(a.info.ptr), stride_of_rows(a)};
}

/// Checks a float32 matrix's shape. None gives null rows.
inline Rows matrix(const Array& a, int rows, int columns) {
    a.expect_shape({rows, columns});
    return matrix(a);
}
inline Rows matrix(const MaybeArray& a, int rows, int columns) {
    return a ? matrix(*a.array, rows, columns) : Rows{};
}

/// Checks weights (rows, columns) in any storage. Quantized weights, and no others, have scales and biases;
/// the shapes tell the number of bits and the size of a group.
inline Weights weights_of(const Array& a, const MaybeArray& scales, const MaybeArray& biases,
                          py::ssize_t rows, py::ssize_t columns) {
    Weights weights;
    weights.data = a.info.ptr;
    weights.storage = a.storage;
    if (a.type() != 'I') {
        for (const MaybeArray* other : {&scales, &biases})
            if (*other)
                fail(a.where, (*other)->name + " is given and " + a.name + " has buffer format '" +
                                  a.info.format + "', expected quantized words in uint32 ('I')");
        a.expect_shape({rows, columns});
        weights.stride = stride_of_rows(a);
        return weights;
    }
    if (!scales || !biases) fail(a.where, a.name + " is quantized, expected scales and biases");
    const py::ssize_t words = a.info.ndim == 2 ? a.info.shape[1] : 0;
    weights.bits = words * 8 == columns ? 4 : 8;
    const auto in_words = [&](int bits) {
        return shape_text(std::vector<py::ssize_t>{rows, columns * bits / 32});
    };
    if (a.info.ndim != 2 || a.info.shape[0] != rows || words * 32 != columns * weights.bits)
        fail(a.where, a.name + " is " + shape_text(a.info.shape) + ", expected " + in_words(4) +
                          " words for 4 bits or " + in_words(8) + " for 8 bits an element");
    const py::ssize_t groups = scales->info.ndim == 2 ? scales->info.shape[1] : 0;
    for (const int group : {32, 64, 128})
        if (groups * group == columns) weights.group = group;
    if (weights.group == 0 || scales->info.shape[0] != rows)
        fail(a.where, "scales is " + shape_text(scales->info.shape) + ", expected (" + std::to_string(rows) +
                          ", n) with n groups of 32, 64 or 128 in " + std::to_string(columns) + " elements");
    biases->expect_shape({rows, groups});
    biases->expect_storage(*scales.array);
    scales->expect_contiguous();
    biases->expect_contiguous();
    weights.stride = stride_of_rows(a);
    weights.storage = scales->storage;
    weights.scales = scales->info.ptr;
    weights.biases = biases->info.ptr;
    weights.scale_stride = groups;
    return weights;
}

/// Checks the shape of a float32 array without gaps. None gives null.
inline float* contiguous(const MaybeArray& a, std::initializer_list<py::ssize_t> shape) {
    return a ? a->contiguous(shape) : nullptr;
}

/// shape: the names of the axes, as in "(rows, n_in)".
inline void expect_axes(const Memory& a, int n_axes, const char* shape) {
    if (a.info.ndim != n_axes)
        fail(a.where, a.name + " is " + shape_text(a.info.shape) + ", expected " + shape);
}

inline void expect_finite(const char* where, const char* name, double value) {
    if (!std::isfinite(value))
        fail(where, name + (" is " + std::to_string(value)) + ", expected a finite number");
}

/// One of many arrays, without gaps.
struct Extent {
    const float* begin;
    py::ssize_t size;
    std::string name;
    bool written;
};

/// Fails if an array that is written shares memory with another. The arrays are sorted by address, as there
/// are too many to compare each pair.
inline void expect_distinct(const char* where, std::vector<Extent> all) {
    std::sort(all.begin(), all.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
    const Extent *furthest = nullptr, *furthest_written = nullptr;
    const auto reaches = [](const Extent* a, const Extent& b) {
        return a != nullptr && a->begin + a->size > b.begin;
    };
    for (const Extent& b : all) {
        const Extent* a = b.written ? furthest : furthest_written;
        if (reaches(a, b))
            fail(where, a->name + " and " + b.name + " share memory, expected " +
                            (b.written ? b.name : a->name) + " to have its own");
        const auto further = [&](const Extent* than) {
            return than == nullptr || b.begin + b.size > than->begin + than->size;
        };
        if (further(furthest)) furthest = &b;
        if (b.written && further(furthest_written)) furthest_written = &b;
    }
}

}  // namespace mlxgpt
