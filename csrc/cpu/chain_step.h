// Convolutions of which each reads what the one before it has just written, as one step: a few rows of the last one's
// outputs at a time, and of the others the rows that these need. What lies between them stays in the second-level
// cache and has no place elsewhere, which is what takes the time where a convolution computes little of much, as
// those of one pixel and of one channel do.
//
// A thread goes down the rows of an image. Where kernels overlap, the rows that it has of the last task are kept.
#pragma once

#include "conv_step.h"

namespace ptq4cuda {

constexpr int64_t kChainBytes = 192 << 10;    // between the convolutions, of a thread, if that is more than a row
constexpr int64_t kTaskPixels = 24;           // that could be computed while a task begins
constexpr int64_t kChainWeights = 128 << 10;  // of all of them, at most: they pass by in each task

class Chain : public Step {
public:
    using Codes = Convolution<uint8_t>;
    struct Link {
        std::unique_ptr<Codes> convolution;
        bool also;  // the next one reads the second output
    };

    static int64_t tasks_wanted() { return torch::stable::get_num_threads() * kTasksPerThread; }

    // Rows of the last outputs that make a task: few enough for the cache, and for threads to have as much to do as
    // each other; as few as that allows, but a task takes its time beside its pixels.
    static int64_t rows_of(const std::vector<const ConvShape*>& shapes) {
        const ConvShape& last = *shapes.back();
        const auto pixels_in_turn = [&](int64_t rows) {
            const int64_t tasks = last.batch * ceil_div(last.out.height, rows);
            return ceil_div(tasks, int64_t{torch::stable::get_num_threads()}) * (rows * last.out.width + kTaskPixels);
        };
        int64_t most = 1, least = pixels_in_turn(1);
        while (most < last.out.height && bytes_of(shapes, most + 1) <= kChainBytes)
            least = std::min(least, pixels_in_turn(++most));
        int64_t rows = 1;
        while (20 * pixels_in_turn(rows) > 21 * least) ++rows;
        return rows;
    }

    // What a thread holds between them for so many rows of the last outputs.
    static int64_t bytes_of(const std::vector<const ConvShape*>& shapes, int64_t rows) {
        int64_t bytes = 0;
        for (size_t i = shapes.size(); i-- > 1;) bytes += bytes_before(*shapes[i], rows);
        return bytes;
    }

    Chain(std::vector<Link> links, int64_t rows) : links_(std::move(links)), rows_(rows), offsets_(links_.size()) {
        for (size_t i = links_.size(); i-- > 1;) {
            offsets_[i - 1] = bytes_;
            bytes_ += bytes_before(links_[i].convolution->shape(), rows);
        }
        const ConvShape& last = links_.back().convolution->shape();
        bands_ = ceil_div(last.out.height, rows_);
        tasks_ = last.batch * bands_;
    }

    // What the next runs convolve, convolution by convolution; what lies between goes to the memory, bytes_of for
    // each thread.
    void place(const std::vector<ConvCall<uint8_t>>& calls, uint8_t* memory) {
        for (size_t i = 0; i < links_.size(); ++i) links_[i].convolution->place(calls[i]);
        memory_ = memory;
    }

    int64_t tasks() const override { return tasks_; }

    void run(Tasks& tasks, Scratch& scratch) const override {
        const size_t n = links_.size();
        std::vector<Rows> held(n), fresh(n);  // of the outputs of each: what there is, what there is to compute
        for (int64_t task, last = -1; (task = tasks.take()) >= 0; last = task) {
            const int64_t image = task / bands_, top = task % bands_ * rows_;
            if (task != last + 1 || top == 0) std::fill(held.begin(), held.end(), Rows{});
            fresh[n - 1] = {top, std::min(top + rows_, links_[n - 1].convolution->shape().out.height)};
            for (size_t i = n - 1; i-- > 0;) {
                const Rows wanted = read_by(links_[i + 1].convolution->shape(), fresh[i + 1]);
                fresh[i] = keep(held[i], wanted, memory_of(tasks, i), row_bytes(links_[i].convolution->shape()));
            }
            for (size_t i = 0; i < n; ++i) {
                if (fresh[i].begin == fresh[i].end) continue;
                const ConvShape& shape = links_[i].convolution->shape();
                ConvCall<uint8_t> call = links_[i].convolution->call();
                if (i > 0) {
                    call.x = memory_of(tasks, i - 1);
                    call.x_from = image * shape.in.height + held[i - 1].begin;
                }
                if (i < n - 1) {
                    (links_[i].also ? call.also : call.y) = memory_of(tasks, i);
                    (links_[i].also ? call.also_from : call.y_from) = image * shape.out.height + held[i].begin;
                }
                links_[i].convolution->rows(call, image, fresh[i].begin, fresh[i].end, scratch);
            }
        }
    }

private:
    struct Rows {
        int64_t begin = 0, end = 0;
    };

    static int64_t row_bytes(const ConvShape& shape) { return shape.out.width * shape.out_channels; }

    // Of the input of a convolution, for so many rows of its outputs, which become the rows of its input.
    static int64_t bytes_before(const ConvShape& shape, int64_t& rows) {
        rows = std::min(shape.rows_read(rows), shape.in.height);
        return ceil_div(rows * shape.in.width * shape.channels, simd::kLine) * simd::kLine;
    }

    // The rows of the input that some rows of outputs are computed of.
    static Rows read_by(const ConvShape& shape, const Rows& outputs) {
        if (outputs.begin == outputs.end) return {};
        const int64_t first = outputs.begin * shape.stride.height - shape.padding.height;
        const int64_t end = first + shape.rows_read(outputs.end - outputs.begin);
        const int64_t begin = std::clamp<int64_t>(first, 0, shape.in.height);
        return {begin, std::clamp<int64_t>(end, begin, shape.in.height)};
    }

    // Lets the rows that are held begin with the first one that is wanted, moves them to the start of the memory, and
    // returns those that are missing.
    static Rows keep(Rows& held, const Rows& wanted, uint8_t* memory, int64_t row_bytes) {
        if (wanted.begin == wanted.end) return {};
        if (wanted.begin < held.begin || wanted.begin >= held.end) {
            held = wanted;
            return wanted;
        }
        std::memmove(memory, memory + (wanted.begin - held.begin) * row_bytes, (held.end - wanted.begin) * row_bytes);
        const Rows fresh = {held.end, std::max(held.end, wanted.end)};
        held = {wanted.begin, fresh.end};
        return fresh;
    }

    uint8_t* memory_of(const Tasks& tasks, size_t i) const { return memory_ + tasks.own() * bytes_ + offsets_[i]; }

    std::vector<Link> links_;
    int64_t rows_;
    uint8_t* memory_ = nullptr;
    std::vector<int64_t> offsets_;  // of the outputs of each, in the memory of a thread
    int64_t bytes_ = 0, bands_, tasks_;
};

}  // namespace ptq4cuda
