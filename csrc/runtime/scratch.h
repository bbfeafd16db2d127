// Memory that a call needs only while it runs.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace mlxgpt {

/// n floats on a 64-byte boundary, valid until the calling thread's next call of scratch. The memory is used
/// again from call to call: fresh memory would cost a page fault for every 4 KB each time.
inline float* scratch(size_t n) {
    struct Free {
        void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
    };
    thread_local std::unique_ptr<float, Free> buffer;
    thread_local size_t size = 0;
    if (n > size) {
        buffer.reset();
        size = 0;
        buffer.reset(static_cast<float*>(::operator new(n * sizeof(float), std::align_val_t{64})));
        size = n;
    }
    return buffer.get();
}

}  // namespace mlxgpt
