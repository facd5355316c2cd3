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

constexpr int64_t kTasksPerThread = 2;  // at least, where there is enough to do

// Memory of a thread that steps may use as they like; what one leaves there means nothing to the next.
struct Scratch {
    simd::Vector<uint8_t> bytes, gathered;  // beside each other
    std::vector<const uint8_t*> pointers;

    // At least so many bytes, with any values.
    uint8_t* at_least(int64_t size) { return at_least(bytes, size); }
    static uint8_t* at_least(simd::Vector<uint8_t>& memory, int64_t size) {
        if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
        return memory.data();
    }
};

// The tasks of a step as one thread takes them. They are shared out: it takes those of its own share one after
// another, then what others have left of theirs. A share's tasks are neighbours, so that a thread finds in its own
// caches most of what it reads of the step before.
class Tasks {
public:
    // A line of memory each, so that threads do not slow each other down.
    struct alignas(simd::kLine) Count {
        std::atomic<int64_t> value = 0;
    };

    // `taken` counts the tasks that are taken of each share.
    Tasks(int64_t count, Count* taken, int64_t shares, int64_t own)
        : count_(count), shares_(shares), own_(own), share_(own), left_(shares), taken_(taken) {}

    // One that nobody has taken, or -1 if there is none.
    int64_t take() {
        for (; left_ > 0; --left_, share_ = share_ + 1 < shares_ ? share_ + 1 : 0) {
            const int64_t begin = count_ * share_ / shares_, end = count_ * (share_ + 1) / shares_;
            std::atomic<int64_t>& taken = taken_[share_].value;
            if (taken.load(std::memory_order_relaxed) >= end - begin) continue;
            const int64_t i = taken++;
            if (i >= end - begin) continue;
            ++held_;
            return begin + i;
        }
        return -1;
    }
    // The number of the thread.
    int64_t own() const { return own_; }
    // How many take() gave.
    int64_t held() const { return held_; }

private:
    int64_t count_, shares_, own_, share_, left_, held_ = 0;
    Count* taken_;
};

class Step {
public:
    virtual ~Step() = default;
    virtual int64_t tasks() const = 0;
    // Computes tasks until there is none to take.
    virtual void run(Tasks& tasks, Scratch& scratch) const = 0;
};

class Steps {
public:
    explicit Steps(std::vector<std::unique_ptr<const Step>> steps) : steps_(std::move(steps)) {}

    // May be called again, by one thread at a time.
    void run() {
        failed_ = false;
        int64_t most = 0;
        for (const auto& step : steps_) most = std::max(most, step->tasks());
        const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), most);
        taken_ = std::vector<Tasks::Count>(steps_.size() * threads);
        done_ = std::vector<Tasks::Count>(steps_.size());
        torch::stable::parallel_for(0, threads, 1, [&](int64_t own, int64_t) { go_through(own, threads); });
        if (failed_) std::rethrow_exception(std::exchange(failure_, nullptr));
    }

private:
    void go_through(int64_t own, int64_t shares) {
        Scratch scratch;
        for (size_t i = 0; i < steps_.size(); ++i) {
            const int64_t count = steps_[i]->tasks();
            std::atomic<int64_t>& done = done_[i].value;
            Tasks tasks(count, &taken_[i * shares], shares, own);
            try {
                steps_[i]->run(tasks, scratch);
                done.fetch_add(tasks.held(), std::memory_order_release);
            } catch (...) {  // nobody may wait for what will not be done
                if (!failed_.exchange(true)) failure_ = std::current_exception();
            }
            for (int waited = 0; done.load(std::memory_order_acquire) < count; ++waited) {
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
    std::vector<Tasks::Count> taken_, done_;  // of each step: taken of each share, done in all
    std::atomic<bool> failed_ = false;
    std::exception_ptr failure_;
};

inline void run_step(std::unique_ptr<const Step> step) {
    std::vector<std::unique_ptr<const Step>> steps;
    steps.push_back(std::move(step));
    Steps(std::move(steps)).run();
}

}  // namespace ptq4cuda
