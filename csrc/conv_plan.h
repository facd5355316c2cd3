// How conv2d_integer cuts a convolution into blocks on CUDA: the size of a tile, and whether the columns are shared
// out. Plain arithmetic on sizes, so that it can be printed and tested without a GPU (ptq4cuda/ops/plan.py).
//
// The multiprocessor that gets most blocks decides when a launch ends. A block of it costs issue slots,
//
//     warps of a block * (kFixedSlots + chunks of a block * slots of a chunk)
//
// of which a multiprocessor has four a cycle and uses kIssue, with fewer than kFullWarps warps accordingly less; and
// it fetches the bytes of its chunks from the second-level cache. What takes more cycles counts. Shares of the
// columns cost another launch and the bytes of their sums, written and read. Of all tiles and numbers of shares the
// one with the least cycles is taken, of equal ones the first; a tile half of which would do is left out.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace ptq4cuda {

// A convolution as a matrix product.
struct ConvSize {
    int64_t pixels;   // of the output, of all images
    int64_t outputs;  // of a group
    int64_t groups;
    int64_t chunks;  // of 64 columns
};

// How codes are fetched.
struct ConvCodes {
    bool packed, vectors;  // vectors: 16 bytes at a time, else words

    constexpr int pixel_bytes() const { return packed ? 32 : 64; }  // of a chunk
};

struct ConvTile {
    int outputs, pixels;

    constexpr int warps() const { return outputs * pixels / (64 * 32); }
    constexpr int resident() const { return 16 / warps(); }  // blocks on a multiprocessor: a thread has 128 registers
};

constexpr std::array<ConvTile, 4> kConvTiles = {{{128, 128}, {64, 128}, {64, 64}, {64, 32}}};

// Issue slots of a warp for a chunk, 32 products, by tile: the loop of conv_kernel as tools/sass.py counts it.
constexpr std::array<int, 4> conv_slots(const ConvCodes& codes) {
    if (codes.packed) return codes.vectors ? std::array{140, 146, 156, 168} : std::array{178, 187, 198, 211};
    return codes.vectors ? std::array{122, 136, 148, 160} : std::array{165, 187, 197, 208};
}

constexpr int kFixedSlots = 1800;             // of a warp, before and after its chunks
constexpr double kIssue = 0.6;                // of the issue slots
constexpr int64_t kFullWarps = 12;            // warps of a multiprocessor that reach it
constexpr double kCacheBytesPerCycle = 24.0;  // of a multiprocessor, from and to the second-level cache
constexpr double kLaunchCycles = 5000.0;      // another launch
constexpr int kLeastChunks = 4;               // of a share of the columns: less does not pay for filling the buffers
constexpr int64_t kMostSplits = 32;

struct ConvPlan {
    int tile = 0;  // its index
    int64_t splits = 1, blocks = 0;
    int64_t busiest = 0;  // blocks of the multiprocessor that has most
    double cycles = 0.0;
};

constexpr ConvPlan plan_conv(const ConvSize& size, const ConvCodes& codes, int64_t multiprocessors) {
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const std::array<int, 4> slots = conv_slots(codes);
    ConvPlan best;
    for (size_t t = 0; t < kConvTiles.size(); ++t) {
        const ConvTile& tile = kConvTiles[t];
        if (t + 1 < kConvTiles.size() &&
            ((tile.outputs > 64 && size.outputs <= tile.outputs / 2) || size.pixels <= tile.pixels / 2))
            continue;
        const int64_t tiles = ceil_div(size.pixels, tile.pixels) * ceil_div(size.outputs, tile.outputs) * size.groups;
        const int64_t most = std::clamp<int64_t>(size.chunks / kLeastChunks, 1, kMostSplits);
        for (int64_t splits = 1; splits <= most; ++splits) {
            ConvPlan plan{static_cast<int>(t), splits, tiles * splits, 0, 0.0};
            plan.busiest = ceil_div(plan.blocks, multiprocessors);
            const int64_t chunks = ceil_div(size.chunks, splits);
            const int64_t warps = std::min<int64_t>(plan.busiest, tile.resident()) * tile.warps();
            const double full = static_cast<double>(std::min(warps, kFullWarps)) / static_cast<double>(kFullWarps);
            const int64_t issued = plan.busiest * tile.warps() * (kFixedSlots + chunks * slots[t]);
            const int64_t fetched = plan.busiest * chunks * (tile.outputs * 64 + tile.pixels * codes.pixel_bytes());
            plan.cycles = std::max(static_cast<double>(issued) / (4 * kIssue * full),
                                   static_cast<double>(fetched) / kCacheBytesPerCycle);
            if (splits > 1) {
                const int64_t sums = size.pixels * size.outputs * size.groups * splits;
                plan.cycles += kLaunchCycles + static_cast<double>(8 * sums) /
                                                   (kCacheBytesPerCycle * static_cast<double>(multiprocessors));
            }
            if (best.blocks == 0 || plan.cycles < best.cycles) best = plan;
        }
    }
    return best;
}

}  // namespace ptq4cuda
