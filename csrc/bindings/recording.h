// Kernel calls that are made once from Python and then again without it.
//
// Included by bindings.cpp alone.
#pragma once

#include <functional>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/arguments.h"

namespace mlxgpt {
namespace {

/// Calls of kernels, to be made again on what the same arrays then hold. They stay alive as long as it does.
class Recording {
  public:
    Recording() = default;
    Recording(const Recording&) = delete;
    Recording& operator=(const Recording&) = delete;

    void start() {
        if (active_ != nullptr) fail("recording", "one is being made already in this thread");
        active_ = this;
    }
    void stop() {
        if (active_ == this) active_ = nullptr;
    }
    ~Recording() { stop(); }

    void replay() const {
        if (active_ == this) fail("recording", "it is still being made");
        const py::gil_scoped_release release;
        for (const auto& call : calls_) call();
    }
    size_t size() const { return calls_.size(); }

    /// Makes a call, without the GIL, and records it if a recording is being made. `arguments` hold its
    /// arrays.
    template <class Call, class... Arguments>
    static void run(Call call, Arguments... arguments) {
        {
            const py::gil_scoped_release release;
            call();
        }
        if (active_ == nullptr) return;
        auto held = std::make_shared<std::tuple<Arguments...>>(std::move(arguments)...);
        active_->calls_.push_back([call, held] { call(); });
    }

  private:
    static thread_local Recording* active_;
    std::vector<std::function<void()>> calls_;
};
thread_local Recording* Recording::active_ = nullptr;

}  // namespace
}  // namespace mlxgpt
