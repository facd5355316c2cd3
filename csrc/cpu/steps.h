// Steps that threads go through together, one after another: each is cut into tasks, which a thread takes when it is
// done with its last one, and the next step begins when all of them are done. Nobody waits for a thread that holds no
// task: one that comes late, as on a busy machine, finds what there is left to do.
#pragma once

#include <atomic>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include "../ops.h"
#include "simd.h"

namespace ptq4cuda {

// Memory of a thread that steps may use as they like; what one leaves there means nothing to the next.
struct Scratch {
    simd::Vector<uint8_t> bytes;
    std::vector<const uint8_t*> pointers;

    // At least so many bytes, with any values.
    uint8_t* at_least(int64_t size) {
        if (static_cast<int64_t>(bytes.size()) < size) bytes.resize(size);
        return bytes.data();
    }
};

class Step {
public:
    virtual ~Step() = default;
    virtual int64_t tasks() const = 0;
    // Computes tasks of its choice until `next` gives none below tasks(); returns how many.
    virtual int64_t run(std::atomic<int64_t>& next, Scratch& scratch) const = 0;
};

class Steps {
public:
    explicit Steps(std::vector<std::unique_ptr<const Step>> steps)
        : steps_(std::move(steps)), states_(steps_.size()) {}

    void run() {
        int64_t most = 0;
        for (const auto& step : steps_) most = std::max(most, step->tasks());
        const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), most);
        torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { go_through(); });
        if (failure_) std::rethrow_exception(failure_);
    }

private:
    // A line of memory each, so that threads do not slow each other down.
    struct alignas(simd::kLine) State {
        std::atomic<int64_t> next = 0;
        alignas(simd::kLine) std::atomic<int64_t> done = 0;
    };

    void go_through() {
        Scratch scratch;
        for (size_t i = 0; i < steps_.size(); ++i) {
            State& state = states_[i];
            const int64_t tasks = steps_[i]->tasks();
            if (state.next.load(std::memory_order_relaxed) < tasks) {
                try {
                    state.done.fetch_add(steps_[i]->run(state.next, scratch), std::memory_order_release);
                } catch (...) {  // nobody may wait for what will not be done
                    if (!failed_.exchange(true)) failure_ = std::current_exception();
                }
            }
            for (int waited = 0; state.done.load(std::memory_order_acquire) < tasks; ++waited) {
                if (failed_.load(std::memory_order_acquire)) return;
                waited < kSpins ? pause() : std::this_thread::yield();
            }
        }
    }

    static constexpr int kSpins = 4000;  // some microseconds: less than a switch to another thread and back

    static void pause() {
#if defined(__x86_64__)
        _mm_pause();
#endif
    }

    std::vector<std::unique_ptr<const Step>> steps_;
    std::vector<State> states_;
    std::atomic<bool> failed_ = false;
    std::exception_ptr failure_;
};

inline void run_step(std::unique_ptr<const Step> step) {
    std::vector<std::unique_ptr<const Step>> steps;
    steps.push_back(std::move(step));
    Steps(std::move(steps)).run();
}

}  // namespace ptq4cuda
