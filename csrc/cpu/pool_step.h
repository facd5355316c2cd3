// Max pooling of codes on the CPU, as a step (steps.h): for each row of outputs first the largest codes of the rows
// that its windows see, which are as long as an image is wide, then of these the largest of each window's columns, at
// every column, whatever the stride: long rows are what vector registers are for.
#pragma once

#include <algorithm>
#include <cstring>

#include "../pool.h"
#include "steps.h"

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

// Where a row of outputs is made. The band is a row of the image with its padding, which is zero.
struct PoolBuffers {
    std::vector<uint8_t> band, columns;

    explicit PoolBuffers(const PoolProblem& p)
        : band(p.channels *
               std::max(p.padding.width + p.in.width, last(p) + p.dilation.width * (p.kernel.width - 1))),
          columns(p.stride.width > 1 ? p.channels * last(p) : 0) {}

    // Columns where windows may begin.
    static int64_t last(const PoolProblem& p) { return p.stride.width * (p.out.width - 1) + 1; }
};

struct PoolRow {
    PTQ_INLINE static void run(const PoolProblem* problem, int64_t row, PoolBuffers* buffers) {
        const PoolProblem& p = *problem;
        const int64_t image = row / p.out.height, line = p.in.width * p.channels, length = p.out.width * p.channels;
        uint8_t* y = p.y + row * length;
        const Inside rows = p.rows(row % p.out.height);
        if (rows.count <= 0) {
            std::fill_n(y, length, uint8_t{0});
            return;
        }
        uint8_t* band = buffers->band.data();
        largest_codes(band + p.padding.width * p.channels, p.x + (image * p.in.height + rows.first) * line,
                      p.dilation.height * line, rows.count, line);
        const int64_t step = p.dilation.width * p.channels;
        if (p.stride.width == 1) return largest_codes(y, band, step, p.kernel.width, length);
        uint8_t* columns = buffers->columns.data();
        largest_codes(columns, band, step, p.kernel.width, static_cast<int64_t>(buffers->columns.size()));
        for (int64_t o = 0; o < p.out.width; ++o)
            std::memcpy(y + o * p.channels, columns + o * p.stride.width * p.channels, p.channels);
    }
};

class MaxPool : public Step {
public:
    explicit MaxPool(const PoolProblem& problem) : problem_(problem), rows_(problem.batch * problem.out.height) {
        const int64_t codes = problem.in.width * problem.channels * (problem.kernel.height + problem.kernel.width);
        rows_per_task_ = kPooledCodes / std::max<int64_t>(codes, 1) + 1;
    }

    // What the next runs pool.
    void place(const uint8_t* x, uint8_t* y) {
        problem_.x = x;
        problem_.y = y;
    }

    int64_t tasks() const override { return ceil_div(rows_, rows_per_task_); }

    void run(Tasks& tasks, Scratch&) const override {
        PoolBuffers buffers(problem_);
        for (int64_t task; (task = tasks.take()) >= 0;) {
            const int64_t end = std::min(rows_, (task + 1) * rows_per_task_);
            for (int64_t row = task * rows_per_task_; row < end; ++row) simd::run<PoolRow>(&problem_, row, &buffers);
        }
    }

private:
    PoolProblem problem_;
    int64_t rows_, rows_per_task_;
};

}  // namespace ptq4cuda
