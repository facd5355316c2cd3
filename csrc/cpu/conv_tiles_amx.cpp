// Tiles for AMX.
//
// One instruction multiplies a matrix of codes, 64 of each of 16 pixels, by one of weights, 64 for each of the 16
// outputs of a panel, and adds the products to a matrix of 16 x 16 sums of 32 bits, exactly. Four matrices of sums,
// those of 32 pixels and 2 panels, are held in registers, and each matrix that is loaded is multiplied twice:
//
//                            weights of panel 0, of panel 1: 64 x 16 each
//      codes of pixels 0-15     sums 0,0   sums 0,1
//      codes of pixels 16-31    sums 1,0   sums 1,1
//
// The panels hold weights as these matrices want them, 4 channels by 16 outputs in a line of memory. Codes must have
// their rows equally far apart, which pixels beside each other have; and a row that crosses lines of memory takes
// several times as long to load. So where rows are not whole lines they are gathered, once for all panels.
#include "conv_tiles.h"

#if defined(__x86_64__)

namespace ptq4cuda {
namespace {

// Registers: sums 0 to 3, codes 4 and 5, weights 6 and 7. Their names are parts of instructions, so they cannot be
// counted. (The compiler does not know what loads and stores of them read and write.)
#define PTQ_TILE_LOAD(tile, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(from), "r"(stride) : "memory")
#define PTQ_TILE_STORE(tile, to) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(kSumStride) : "memory")

constexpr int64_t kSumStride = kPanelOutputs * sizeof(int32_t);
constexpr int64_t kLoadedLine = kPanelOutputs * kWordChannels;  // of weights: a row of their matrix

PTQ_TARGET_AMX void begin(int words) {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } shapes;
    for (int tile = 0; tile < 8; ++tile) {
        const bool codes = tile == 4 || tile == 5;
        shapes.row_bytes[tile] = static_cast<uint16_t>(codes ? words * kWordChannels : kMatrixBytes);
        shapes.rows[tile] = static_cast<uint8_t>(tile < 6 ? kMatrixRows : words);
    }
    __asm__ volatile("ldtilecfg (%0)" ::"r"(&shapes) : "memory");
}

PTQ_TARGET_AMX void end() { _tile_release(); }

PTQ_TARGET_AMX inline void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Two matrices of pixels by `kPanels` panels, 1 or 2.
template <int kPanels>
PTQ_TARGET_AMX void multiply_pair(const Matrices (&m)[2], const Chunks& chunks, const int8_t* weights,
                                  int64_t panel_bytes, int32_t* sums) {
    clear_sums();
    for (int64_t i = 0; i < chunks.count(); ++i) {
        const int8_t* w = weights + chunks.weights[i];
        PTQ_TILE_LOAD(6, w, kLoadedLine);
        PTQ_TILE_LOAD(4, m[0].rows + m[0].chunks[i], m[0].stride);
        _tile_dpbusd(0, 4, 6);
        PTQ_TILE_LOAD(5, m[1].rows + m[1].chunks[i], m[1].stride);
        _tile_dpbusd(2, 5, 6);
        if constexpr (kPanels > 1) {
            PTQ_TILE_LOAD(7, w + panel_bytes, kLoadedLine);
            _tile_dpbusd(1, 4, 7);
            _tile_dpbusd(3, 5, 7);
        }
    }
    PTQ_TILE_STORE(0, sums);
    PTQ_TILE_STORE(2, sums + kMatrixRows * kPanelOutputs);
    if constexpr (kPanels > 1) {
        PTQ_TILE_STORE(1, sums + kMatrixPanelSums);
        PTQ_TILE_STORE(3, sums + kMatrixPanelSums + kMatrixRows * kPanelOutputs);
    }
}

// One matrix of pixels by up to 4 panels.
template <int kPanels>
PTQ_TARGET_AMX void multiply_single(const Matrices& m, const Chunks& chunks, const int8_t* weights,
                                    int64_t panel_bytes, int32_t* sums) {
    clear_sums();
    for (int64_t i = 0; i < chunks.count(); ++i) {
        const int8_t* w = weights + chunks.weights[i];
        PTQ_TILE_LOAD(4, m.rows + m.chunks[i], m.stride);
        PTQ_TILE_LOAD(6, w, kLoadedLine);
        _tile_dpbusd(0, 4, 6);
        if constexpr (kPanels > 1) {
            PTQ_TILE_LOAD(7, w + panel_bytes, kLoadedLine);
            _tile_dpbusd(1, 4, 7);
        }
        if constexpr (kPanels > 2) {
            PTQ_TILE_LOAD(6, w + 2 * panel_bytes, kLoadedLine);
            _tile_dpbusd(2, 4, 6);
        }
        if constexpr (kPanels > 3) {
            PTQ_TILE_LOAD(7, w + 3 * panel_bytes, kLoadedLine);
            _tile_dpbusd(3, 4, 7);
        }
    }
    PTQ_TILE_STORE(0, sums);
    if constexpr (kPanels > 1) PTQ_TILE_STORE(1, sums + kMatrixPanelSums);
    if constexpr (kPanels > 2) PTQ_TILE_STORE(2, sums + 2 * kMatrixPanelSums);
    if constexpr (kPanels > 3) PTQ_TILE_STORE(3, sums + 3 * kMatrixPanelSums);
}

void multiply(const Matrices (&matrices)[2], int count, const Chunks& chunks, const Panels& panels, int32_t* sums) {
    const int8_t* weights = panels.weights;
    if (count <= kMatrixRows)
        return with_constant<kTilePanels>(
            panels.count, [&](auto b) { multiply_single<b>(matrices[0], chunks, weights, panels.bytes, sums); });
    for (int b = 0; b < panels.count; b += 2, weights += 2 * panels.bytes, sums += 2 * kMatrixPanelSums)
        panels.count - b > 1 ? multiply_pair<2>(matrices, chunks, weights, panels.bytes, sums)
                             : multiply_pair<1>(matrices, chunks, weights, panels.bytes, sums);
}

// A chunk of some pixels, in so many pieces.
template <int kPieces>
PTQ_TARGET_AMX void gather_chunk(const uint8_t* const* pixels, int count, int64_t channel,
                                 const Chunks::Piece* pieces, uint8_t* to) {
    __mmask64 bytes[kPieces];
    int64_t at[kPieces];
#pragma GCC unroll 4
    for (int i = 0; i < kPieces; ++i) {
        bytes[i] = pieces[i].mask;
        at[i] = channel + pieces[i].offset;
    }
    for (int p = 0; p < count; ++p, to += kMatrixBytes) {
        __m512i codes = _mm512_maskz_loadu_epi8(bytes[0], pixels[p] + at[0]);
#pragma GCC unroll 4
        for (int i = 1; i < kPieces; ++i) codes = _mm512_mask_loadu_epi8(codes, bytes[i], pixels[p] + at[i]);
        _mm512_store_si512(to, codes);
    }
}

// Of any number of pieces.
PTQ_TARGET_AMX void gather_pieces(const uint8_t* const* pixels, int count, int64_t channel,
                                  const Chunks::Piece* pieces, int64_t number, uint8_t* to) {
    for (int p = 0; p < count; ++p, to += kMatrixBytes) {
        __m512i codes = _mm512_setzero_si512();
        for (int64_t i = 0; i < number; ++i)
            codes = _mm512_mask_loadu_epi8(codes, pieces[i].mask, pixels[p] + channel + pieces[i].offset);
        _mm512_store_si512(to, codes);
    }
}

void gather(const uint8_t* const* pixels, int count, int64_t channel, const Chunks& chunks, uint8_t* memory,
            Matrices (&matrices)[2]) {
    for (int i = 0; count > 0; ++i, count -= kMatrixRows, pixels += kMatrixRows, memory += chunks.bytes() / 2) {
        const int64_t apart = count > 1 ? pixels[1] - pixels[0] : 0;
        bool in_place = count >= kMatrixRows && !chunks.in_place.empty() && apart % simd::kLine == 0 &&
                        reinterpret_cast<uintptr_t>(pixels[0] + channel) % simd::kLine == 0;
        for (int p = 1; in_place && p < kMatrixRows; ++p) in_place = pixels[p] - pixels[p - 1] == apart;
        if (in_place) {
            matrices[i] = {pixels[0] + channel, apart, chunks.in_place.data()};
            continue;
        }
        const int n = std::min(count, kMatrixRows);
        for (int64_t c = 0; c < chunks.count(); ++c) {
            const Chunks::Piece* pieces = &chunks.pieces[chunks.first_piece[c]];
            const int64_t number = chunks.first_piece[c + 1] - chunks.first_piece[c];
            uint8_t* to = memory + chunks.gathered[c];
            if (number > 4)
                gather_pieces(pixels, n, channel, pieces, number, to);
            else
                with_constant<4>(static_cast<int>(number),
                                 [&](auto k) { gather_chunk<k>(pixels, n, channel, pieces, to); });
        }
        matrices[i] = {memory, kMatrixBytes, chunks.gathered.data()};
    }
}

}  // namespace

const MatrixTiles kMatricesAmx = {begin, end, gather, multiply};

}  // namespace ptq4cuda
#endif
