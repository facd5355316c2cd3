// The inner loops of conv2d_integer on the CPU: integer sums of a few pixels and a few panels of 16 outputs. What an
// instruction set computes with is a Tiles: conv_tiles.cpp has those for any processor, conv_tiles_avx2.cpp,
// conv_tiles_avx_vnni.cpp, conv_tiles_avx512.cpp, conv_tiles_vnni.cpp and conv_tiles_amx.cpp the others.
//
// Two kinds of layers have a tile of their own, as most of a word of channels would be empty: depthwise ones, whose
// sums are over taps alone, and dense ones, the first of a network, where a pixel has less channels than a word.
// There the pixels of a row follow each other without gaps, and a word holds channels of several pixels.
#pragma once

#include <cstring>
#include <vector>

#include "../conv.h"
#include "simd.h"

namespace ptq4cuda {

constexpr int kTilePixels = 12;  // at most
constexpr int kTilePanels = 4;
constexpr int kPanelSums = kTilePixels * kPanelOutputs;  // sums are [panels][kTilePixels][kPanelOutputs]

// Structs go by reference: a copy of what has just been written piece by piece would wait for the writes.

// What one pixel reads: `count` stretches of `words` 32-bit words each, at these bytes from the pixel's address.
// There may be more planes, so many bytes apart, with weights and sums of their own (conv_winograd.h), but not where
// sums are narrow.
struct Taps {
    const int64_t* offsets;
    int64_t count, words;
    int64_t planes = 1, plane = 0;
};

// The weights of the panels of a tile.
struct Panels {
    const int8_t* weights;
    int64_t bytes;  // from panel to panel
    int count;
};

// Computes sums[plane][b][p][o] of `count` pixels, from a channel on. The sums have 16 bits for `span` steps.
using DotTile = void (*)(const uint8_t* const* pixels, int count, int64_t channel, const Taps& taps, int64_t span,
                         const Panels& panels, int32_t* sums);

// A depthwise block is some panels; its weights are [groups of taps][channels][taps of a group], those that are
// missing zero, the channels as place_in_block says: the order into which unpacking bytes brings them, and out of
// which packing does. Computes sums[b][p][o] of pixel p and channel 16 b + o of the block, or of the one at that
// place.
struct TapGroups {
    const int64_t* offsets;  // of every tap
    int64_t count;
    bool columns;  // each group is a column of the kernel
};
using DepthwiseTile = void (*)(const uint8_t* const* pixels, int count, int64_t channel, const TapGroups& taps,
                               const int8_t* weights, int64_t channels, int32_t* sums);

constexpr int64_t place_in_block(int64_t channel, int panels) {
    return channel % kPanelOutputs / 4 * 4 * panels + channel / kPanelOutputs * 4 + channel % 4;
}

// AMX multiplies a matrix of 64 codes of each of 16 pixels by one of their weights for a panel (conv_tiles_amx.cpp).
constexpr int kMatrixRows = 16, kMatrixBytes = 64;
constexpr int kMatrixPixels = 2 * kMatrixRows;                   // of a tile
constexpr int kMatrixPanelSums = kMatrixPixels * kPanelOutputs;  // of which sums are [panels][kMatrixPixels][16]

// What a pixel reads, cut into chunks of as many bytes as a row of a matrix has: all of kMatrixBytes, or a single
// one.
struct Chunks {
    // Bytes of a chunk that follow each other in memory.
    struct Piece {
        int64_t offset;  // from the pixel's address to where byte 0 of the chunk would be
        uint64_t mask;   // which bytes of the chunk they are
    };
    std::vector<Piece> pieces;
    std::vector<int64_t> first_piece;  // of each chunk, and the end
    std::vector<int64_t> weights;      // where those of each begin, from the beginning of a panel's
    std::vector<int64_t> in_place;     // where each begins, from the pixel's address, if all are whole lines
    std::vector<int64_t> gathered;     // where each begins in memory where rows have been gathered
    int words = 0;                     // of a chunk

    Chunks() = default;
    explicit Chunks(const Taps& taps);
    int64_t count() const { return static_cast<int64_t>(weights.size()); }
    // What gathering takes for a tile.
    int64_t bytes() const { return count() * kMatrixPixels * kMatrixBytes; }
};

// The matrices of 16 pixels: rows so many bytes apart, and where each chunk begins.
struct Matrices {
    const uint8_t* rows;
    int64_t stride;
    const int64_t* chunks;
};

struct MatrixTiles {
    // Before and after the others, on the same thread.
    void (*begin)(int words);
    void (*end)();
    // The matrices of up to kMatrixPixels pixels, from a channel on: where they lie, or gathered in memory.
    void (*gather)(const uint8_t* const* pixels, int count, int64_t channel, const Chunks& chunks, uint8_t* memory,
                   Matrices (&matrices)[2]);
    // Computes the sums of so many pixels.
    void (*multiply)(const Matrices (&matrices)[2], int count, const Chunks& chunks, const Panels& panels,
                     int32_t* sums);
};

struct Tiles {
    DotTile dot;
    bool narrow_sums;  // of 16 bits: needs a span, and nibbles where codes leave none
    DotTile dense;
    int dense_codes;          // in a word of a dense row: 4 bytes, or 2 that are widened to 16 bits
    int panels;               // that dot and dense take at a time, at most
    int pixels[kTilePanels];  // of a tile of one panel, of two...
    DepthwiseTile depthwise;
    int depthwise_panels, depthwise_taps;   // of a block, of a group; the weights of a group fill a word
    bool whole_blocks;                      // a depthwise block of less channels is slow
    bool block_order;                       // sums of a depthwise block are in the order of place_in_block
    const MatrixTiles* matrices = nullptr;  // which are faster, where there are any
};

// For any processor, and for those with each instruction set.
extern const Tiles kTiles;
#if defined(__x86_64__)
extern const Tiles kTilesAvx2, kTilesAvxVnni, kTilesAvx512, kTilesVnni;
extern const MatrixTiles kMatricesAmx;

// Which they have, too, but for AVX-512 with VNNI.
void depthwise_tile_avx2(const uint8_t* const* pixels, int count, int64_t channel, const TapGroups& taps,
                         const int8_t* weights, int64_t channels, int32_t* sums);
#endif

// Those of this processor.
const Tiles& best_tiles();

// Calls f with a number from 1 to `most` as a constant.
template <int most, class F>
void with_constant(int number, const F& f) {
    if constexpr (most > 1)
        if (number < most) return with_constant<most - 1>(number, f);
    f(std::integral_constant<int, most>{});
}

}  // namespace ptq4cuda
