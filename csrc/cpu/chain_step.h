// Steps of which each reads what the one before it has just written, as one: a few rows of the last one's outputs at
// a time, and of the others the rows that these need. What lies between them stays in the second-level cache and has
// no place elsewhere, which is what takes the time where a step computes little of much, as poolings and convolutions
// of one pixel or of one channel do.
//
// A thread goes down the rows of an image. Where windows overlap, the rows that it has of the last task are kept.
#pragma once

#include "link.h"

namespace ptq4cuda {

constexpr int64_t kChainBytes = 192 << 10;    // between the links, of a thread, if that is more than a row
constexpr int64_t kTaskPixels = 24;           // that could be computed while a task begins
constexpr int64_t kChainWeights = 128 << 10;  // of all of them, at most: they pass by in each task

class Chain : public Step {
public:
    struct Part {
        std::unique_ptr<const Link> link;
        std::vector<int64_t> passed;  // which of its outputs the next one reads, as its first input and as its second
    };

    // How a link reads.
    struct Reader {
        const Geometry* geometry;
        int64_t inputs;
    };

    static int64_t tasks_wanted() { return torch::stable::get_num_threads() * kTasksPerThread; }

    // Rows of the last outputs that make a task: few enough for the cache, and for threads to have as much to do as
    // each other; as few as that allows, but a task takes its time beside its pixels.
    static int64_t rows_of(const std::vector<Reader>& readers) {
        const Geometry& last = *readers.back().geometry;
        const auto pixels_in_turn = [&](int64_t rows) {
            const int64_t tasks = last.batch * ceil_div(last.out.height, rows);
            return ceil_div(tasks, int64_t{torch::stable::get_num_threads()}) * (rows * last.out.width + kTaskPixels);
        };
        int64_t most = 1, least = pixels_in_turn(1);
        while (most < last.out.height && bytes_of(readers, most + 1) <= kChainBytes)
            least = std::min(least, pixels_in_turn(++most));
        int64_t rows = 1;
        while (20 * pixels_in_turn(rows) > 21 * least) ++rows;
        return rows;
    }

    // What a thread holds between them for so many rows of the last outputs.
    static int64_t bytes_of(const std::vector<Reader>& readers, int64_t rows) {
        int64_t bytes = 0;
        for (size_t i = readers.size(); i-- > 1;) bytes += readers[i].inputs * bytes_read(*readers[i].geometry, rows);
        return bytes;
    }

    Chain(std::vector<Part> parts, int64_t rows) : parts_(std::move(parts)), rows_(rows), places_(parts_.size()) {
        for (size_t i = parts_.size(); i-- > 1;) {
            const int64_t bytes = bytes_read(geometry(i), rows);
            for (size_t j = 0; j < parts_[i - 1].passed.size(); ++j, bytes_ += bytes)
                places_[i - 1].push_back(bytes_);
        }
        bands_ = ceil_div(geometry(parts_.size() - 1).out.height, rows_);
    }

    // Where what lies between goes: bytes_of for each thread. The first link reads, and all make what else they do,
    // where they were told.
    void place(uint8_t* memory) { memory_ = memory; }

    int64_t tasks() const override { return geometry(parts_.size() - 1).batch * bands_; }

    void run(Tasks& tasks, Scratch& scratch) const override {
        const size_t n = parts_.size();
        std::vector<Rows> held(n), fresh(n);  // of the outputs of each: what there is, what there is to compute
        for (int64_t task, last = -1; (task = tasks.take()) >= 0; last = task) {
            const int64_t image = task / bands_, top = task % bands_ * rows_;
            if (task != last + 1 || top == 0) std::fill(held.begin(), held.end(), Rows{});
            fresh[n - 1] = {top, std::min(top + rows_, geometry(n - 1).out.height)};
            for (size_t i = n - 1; i-- > 0;) {
                const Rows wanted = read_by(geometry(i + 1), fresh[i + 1]), before = held[i];
                fresh[i] = take_up(held[i], wanted);
                for (int64_t place : places_[i]) keep(before, held[i], memory_of(tasks, place), row_bytes(i));
            }
            for (size_t i = 0; i < n; ++i) {
                if (fresh[i].begin == fresh[i].end) continue;
                Bands bands;
                for (size_t j = 0; i > 0 && j < places_[i - 1].size(); ++j)
                    bands.in[j] = {memory_of(tasks, places_[i - 1][j]),
                                   image * geometry(i).in.height + held[i - 1].begin};
                for (size_t j = 0; j < places_[i].size(); ++j)
                    bands.out[parts_[i].passed[j]] = {memory_of(tasks, places_[i][j]),
                                                      image * geometry(i).out.height + held[i].begin};
                parts_[i].link->rows(bands, image, fresh[i].begin, fresh[i].end, scratch);
            }
        }
    }

private:
    struct Rows {
        int64_t begin = 0, end = 0;
    };

    const Geometry& geometry(size_t i) const { return parts_[i].link->geometry(); }

    // Of an output of a link that the next one reads.
    int64_t row_bytes(size_t i) const { return geometry(i + 1).in.width * geometry(i + 1).channels; }

    // Of an input, for so many rows of the outputs, which become the rows of the input.
    static int64_t bytes_read(const Geometry& geometry, int64_t& rows) {
        rows = std::min(geometry.rows_read(rows), geometry.in.height);
        return ceil_div(rows * geometry.in.width * geometry.channels, simd::kLine) * simd::kLine;
    }

    // The rows of the input that some rows of outputs are computed of.
    static Rows read_by(const Geometry& geometry, const Rows& outputs) {
        if (outputs.begin == outputs.end) return {};
        const int64_t first = outputs.begin * geometry.stride.height - geometry.padding.height;
        const int64_t end = first + geometry.rows_read(outputs.end - outputs.begin);
        const int64_t begin = std::clamp<int64_t>(first, 0, geometry.in.height);
        return {begin, std::clamp<int64_t>(end, begin, geometry.in.height)};
    }

    // Lets the rows that are held begin with the first one that is wanted, and returns those that are missing.
    static Rows take_up(Rows& held, const Rows& wanted) {
        if (wanted.begin == wanted.end) return {};
        if (wanted.begin < held.begin || wanted.begin >= held.end) return held = wanted;
        const Rows fresh = {held.end, std::max(held.end, wanted.end)};
        held = {wanted.begin, fresh.end};
        return fresh;
    }

    // Moves what there was before and is still held to the start of the memory.
    static void keep(const Rows& before, const Rows& held, uint8_t* memory, int64_t row_bytes) {
        if (before.begin < held.begin && held.begin < before.end)
            std::memmove(memory, memory + (held.begin - before.begin) * row_bytes,
                         (before.end - held.begin) * row_bytes);
    }

    uint8_t* memory_of(const Tasks& tasks, int64_t place) const { return memory_ + tasks.own() * bytes_ + place; }

    std::vector<Part> parts_;
    int64_t rows_;
    uint8_t* memory_ = nullptr;
    std::vector<std::vector<int64_t>> places_;  // of what each passes on, in the memory of a thread
    int64_t bytes_ = 0, bands_;
};

}  // namespace ptq4cuda
