// Kernel calls that are recorded once and replayed without going through Python.
#pragma once

#include <functional>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/arguments.h"

namespace mlxgpt {

/// Calls of kernels, with the arrays that they read and write. Replaying makes the calls again with the
/// arrays' contents at that time.
class Recording {
  public:
    Recording() = default;
    Recording(const Recording&) = delete;
    Recording& operator=(const Recording&) = delete;

    void start() {
        if (active_ != nullptr)
            fail("recording", "another recording is being made in this thread, expected one at a time");
        active_ = this;
    }
    void stop() {
        if (active_ == this) active_ = nullptr;
    }
    ~Recording() { stop(); }

    void replay() const {
        if (active_ == this) fail("recording", "replay() is called before its with statement has ended");
        const py::gil_scoped_release release;
        for (const auto& call : calls_) call();
    }
    size_t size() const { return calls_.size(); }

    /// Makes a call without the GIL, and adds it to the recording that is being made in this thread, if any.
    /// `arguments` keep the call's arrays alive.
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
    inline static thread_local Recording* active_ = nullptr;
    std::vector<std::function<void()>> calls_;
};

}  // namespace mlxgpt
