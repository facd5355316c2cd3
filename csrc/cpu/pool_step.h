// Max pooling of codes on the CPU, as a step (steps.h): for each row of outputs first the largest codes of the rows
// that its windows see, which are as long as an image is wide, then of these the largest of each window's columns, at
// every column, whatever the stride: long rows are what vector registers are for.
#pragma once

#include <algorithm>
#include <cstring>

#include "../pool.h"
#include "link.h"

namespace ptq4cuda {

constexpr int64_t kPooledCodes = 1 << 15;  // read, worth a task

// The largest of `taps` pieces of `count` codes that lie `step` apart.
PTQ_INLINE void largest_codes(uint8_t* y, const uint8_t* x, int64_t step, int64_t taps, int64_t count) {
    std::copy_n(x, count, y);  // of no codes, unlike memcpy, also from nowhere
    for (int64_t t = 1; t < taps; ++t) {
        const uint8_t* other = x + t * step;
        for (int64_t i = 0; i < count; ++i) y[i] = other[i] > y[i] ? other[i] : y[i];
    }
}

// What is pooled, and where it goes. Of both there may be only the rows from one on: rows are counted through all
// images.
struct PoolCall {
    const uint8_t* x;  // [N, H, W, C]
    uint8_t* y;        // [N, out H, out W, C]
    int64_t x_from = 0, y_from = 0;
};

// Where a row of outputs is made. The band is a row of the image with its padding, which is zero.
struct PoolBuffers {
    uint8_t *band, *columns;

    PoolBuffers(const PoolProblem& p, Scratch& scratch) {
        const int64_t margin = p.padding.width * p.channels, end = margin + p.in.width * p.channels;
        const int64_t size = std::max(end, (last(p) + p.dilation.width * (p.kernel.width - 1)) * p.channels);
        band = scratch.at_least(size + bytes_of_columns(p));
        columns = band + size;
        std::fill(band, band + margin, uint8_t{0});
        std::fill(band + end, columns, uint8_t{0});
    }

    // Columns where windows may begin.
    static int64_t last(const PoolProblem& p) { return p.stride.width * (p.out.width - 1) + 1; }
    static int64_t bytes_of_columns(const PoolProblem& p) { return p.stride.width > 1 ? p.channels * last(p) : 0; }
};

struct PoolRow {
    // A row of the outputs of image n.
    PTQ_INLINE static void run(const PoolProblem* problem, const PoolCall* call, int64_t n, int64_t row,
                               const PoolBuffers* buffers) {
        const PoolProblem& p = *problem;
        const int64_t line = p.in.width * p.channels, length = p.out.width * p.channels;
        uint8_t* y = call->y + (n * p.out.height + row - call->y_from) * length;
        const Inside rows = p.rows(row);
        if (rows.count <= 0) {
            std::fill_n(y, length, uint8_t{0});
            return;
        }
        uint8_t* band = buffers->band;
        largest_codes(band + p.padding.width * p.channels,
                      call->x + (n * p.in.height + rows.first - call->x_from) * line, p.dilation.height * line,
                      rows.count, line);
        const int64_t step = p.dilation.width * p.channels;
        if (p.stride.width == 1) return largest_codes(y, band, step, p.kernel.width, length);
        uint8_t* columns = buffers->columns;
        largest_codes(columns, band, step, p.kernel.width, PoolBuffers::bytes_of_columns(p));
        for (int64_t o = 0; o < p.out.width; ++o)
            std::memcpy(y + o * p.channels, columns + o * p.stride.width * p.channels, p.channels);
    }
};

// Of one or two images of the same size.
class MaxPool : public Link {
public:
    explicit MaxPool(const PoolProblem& problem) : problem_(problem), calls_{{problem.x, problem.y}} {
        const int64_t codes = problem.in.width * problem.channels * (problem.kernel.height + problem.kernel.width);
        rows_per_task_ = kPooledCodes / std::max<int64_t>(codes, 1) + 1;
    }

    // What the next runs pool.
    void place(std::vector<PoolCall> calls) { calls_ = std::move(calls); }

    int64_t tasks() const override { return ceil_div(problem_.batch * problem_.out.height, rows_per_task_); }

    void run(Tasks& tasks, Scratch& scratch) const override {
        const PoolBuffers buffers(problem_, scratch);
        const int64_t height = problem_.out.height;
        for (int64_t task; (task = tasks.take()) >= 0;) {
            const int64_t end = std::min(problem_.batch * height, (task + 1) * rows_per_task_);
            for (const PoolCall& call : calls_)
                for (int64_t row = task * rows_per_task_; row < end; ++row)
                    simd::run<PoolRow>(&problem_, &call, row / height, row % height, &buffers);
        }
    }

    const Geometry& geometry() const override { return problem_; }

    void rows(const Bands& bands, int64_t n, int64_t top, int64_t bottom, Scratch& scratch) const override {
        const PoolBuffers buffers(problem_, scratch);
        for (size_t i = 0; i < calls_.size(); ++i) {
            PoolCall call = calls_[i];
            if (bands.in[i].codes) call.x = bands.in[i].codes, call.x_from = bands.in[i].from;
            if (bands.out[i].codes) call.y = bands.out[i].codes, call.y_from = bands.out[i].from;
            for (int64_t row = top; row < bottom; ++row) simd::run<PoolRow>(&problem_, &call, n, row, &buffers);
        }
    }

private:
    PoolProblem problem_;
    std::vector<PoolCall> calls_;
    int64_t rows_per_task_;
};

}  // namespace ptq4cuda
