// Transforms of Winograd's convolution (conv_winograd.h).
#include "conv_winograd.h"

#include <numeric>

namespace ptq4cuda {
namespace {

constexpr uint8_t kShift = 2 * kWindowCode;  // makes unsigned bytes of what may be negative

constexpr uint8_t shift_of(int position) { return position == 5 ? 0 : kShift; }  // of sums in both directions: none

// The matrices times a column, of numbers or of vectors of them.
template <class T>
PTQ_INLINE void times_bt(const T& d0, const T& d1, const T& d2, const T& d3, T (&to)[4]) {
    to[0] = d0 - d2;
    to[1] = d1 + d2;
    to[2] = d2 - d1;
    to[3] = d1 - d3;
}

template <class T>
PTQ_INLINE void times_at(const T& m0, const T& m1, const T& m2, const T& m3, T& first, T& second) {
    first = m0 + m1 + m2;
    second = m1 - m2 - m3;
}

void times_g(int g0, int g1, int g2, int (&to)[4]) {
    to[0] = 2 * g0;
    to[1] = g0 + g1 + g2;
    to[2] = g0 - g1 + g2;
    to[3] = 2 * g2;
}

// Bytes and 16-bit numbers of a vector.
template <int kBytes>
struct VectorOf;
template <>
struct VectorOf<64> {
    typedef uint8_t Bytes __attribute__((vector_size(64)));
    typedef uint16_t Wide __attribute__((vector_size(64)));
};
template <>
struct VectorOf<32> {
    typedef uint8_t Bytes __attribute__((vector_size(32)));
    typedef uint16_t Wide __attribute__((vector_size(32)));
};
template <>
struct VectorOf<16> {
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    typedef uint16_t Wide __attribute__((vector_size(16)));
};

// Arithmetic is that of bytes, which loses nothing where the result is one.
struct TransformWindow {
    // `kBytes` channels, whose codes are added to `codes`, in 16 bits.
    template <int kBytes>
    static PTQ_INLINE void channels(const uint8_t* const* pixels, int64_t at, int64_t stride, uint8_t* to,
                                    typename VectorOf<kBytes>::Wide (&codes)[4]) {
        using Bytes = typename VectorOf<kBytes>::Bytes;
        using Wide = typename VectorOf<kBytes>::Wide;
        Bytes d[4][4], t[4][4];
        for (int i = 0; i < kPositions; ++i) std::memcpy(&d[i / 4][i % 4], pixels[i] + at, kBytes);
        Wide columns[2][4];
        for (int s = 0; s < 4; ++s) {
            Bytes column[4];
            times_bt(d[0][s], d[1][s], d[2][s], d[3][s], column);
            for (int r = 0; r < 4; ++r) t[r][s] = column[r];
            const Bytes three[2] = {column[1] + d[0][s], column[1] + d[3][s]};
            for (int a = 0; a < 2; ++a) columns[a][s] = ((Wide)three[a] & 255) + ((Wide)three[a] >> 8);
        }
        for (int r = 0; r < 4; ++r) {
            Bytes row[4];
            times_bt(t[r][0], t[r][1], t[r][2], t[r][3], row);
            for (int s = 0; s < 4; ++s) {
                row[s] += shift_of(4 * r + s);
                std::memcpy(to + (4 * r + s) * stride + at, &row[s], kBytes);
            }
        }
        for (int a = 0; a < 2; ++a) {
            const Wide middle = columns[a][1] + columns[a][2];
            codes[2 * a] += middle + columns[a][0];
            codes[2 * a + 1] += middle + columns[a][3];
        }
    }

    // As many channels as vectors hold.
    template <int kBytes>
    static PTQ_INLINE void vectors(const uint8_t* const* pixels, int64_t& at, int64_t count, int64_t stride,
                                   uint8_t* to, int32_t* sums) {
        if (at + kBytes > count) return;
        typename VectorOf<kBytes>::Wide codes[4] = {};
        for (; at + kBytes <= count; at += kBytes) channels<kBytes>(pixels, at, stride, to, codes);
        for (int i = 0; i < 4; ++i) {
            uint16_t values[kBytes / sizeof(uint16_t)];
            std::memcpy(values, &codes[i], kBytes);
            for (uint16_t value : values) sums[i] += value;
        }
    }

    static PTQ_INLINE void run(const uint8_t* const* pixels, int64_t count, int64_t stride, uint8_t* to,
                               int32_t* sums) {
        int64_t at = 0;
        for (int i = 0; i < 4; ++i) sums[i] = 0;
        vectors<64>(pixels, at, count, stride, to, sums);
        vectors<32>(pixels, at, count, stride, to, sums);
        vectors<16>(pixels, at, count, stride, to, sums);
    }
};

struct TransformProducts {
    // Unsigned, for sums may leave 32 bits meanwhile, and come back into them.
    typedef uint32_t Sums __attribute__((vector_size(kPanelOutputs * sizeof(uint32_t))));
    typedef int32_t Ints __attribute__((vector_size(kPanelOutputs * sizeof(int32_t))));

    static PTQ_INLINE void load(const int32_t* from, Sums& to) { std::memcpy(&to, from, sizeof to); }

    static PTQ_INLINE void run(const int32_t* products, int windows, int64_t panels, const int32_t* fields,
                               const int32_t (*codes)[4], int32_t* sums) {
        const int64_t position = panels * kPanelSums;
        for (int64_t b = 0; b < panels; ++b, fields += kWindowFields * kPanelOutputs) {
            Sums field[kWindowFields];
            for (int f = 0; f < kWindowFields; ++f) load(fields + f * kPanelOutputs, field[f]);
            for (int w = 0; w < windows; ++w) {
                const int64_t at = b * kPanelSums + w * kPanelOutputs;
                Sums rows[2][4];
                for (int s = 0; s < 4; ++s) {
                    Sums m[4];
                    for (int r = 0; r < 4; ++r) load(products + (4 * r + s) * position + at, m[r]);
                    times_at(m[0], m[1], m[2], m[3], rows[0][s], rows[1][s]);
                }
                for (int a = 0; a < 2; ++a) {
                    Sums y[2];
                    times_at(rows[a][0], rows[a][1], rows[a][2], rows[a][3], y[0], y[1]);
                    for (int x = 0; x < 2; ++x) {
                        const Sums quarter = (Sums)((Ints)(y[x] - field[kOffsetShare + 2 * a + x]) >> 2);
                        y[x] = quarter * field[kStep] + field[kMiddle] * static_cast<uint32_t>(codes[w][2 * a + x]);
                        std::memcpy(sums + a * position + b * kPanelSums + (2 * w + x) * kPanelOutputs, &y[x],
                                    sizeof y[x]);
                    }
                }
            }
        }
    }
};

// The weights of an output as step * level + middle.
struct Grid {
    int step = 0, middle = 0;
};

Grid grid_of(const std::vector<int>& weights) {
    const auto [lowest, highest] = std::minmax_element(weights.begin(), weights.end());
    int step = 0;
    for (int w : weights) step = std::gcd(step, w - *lowest);
    if (step == 0) return {1, *lowest};
    return {step, *lowest + ((*highest - *lowest) / step + 1) / 2 * step};
}

}  // namespace

std::optional<WindowWeights> window_weights(const ConvShape& shape, const int8_t* panels, const uint8_t* largest) {
    WindowWeights made;
    if (std::any_of(largest, largest + shape.channels, [](uint8_t code) { return code > kWindowCode; }))
        return std::nullopt;
    const int64_t channels = shape.channels, count = shape.panels_per_group();
    const int64_t panel = channels * kPanelOutputs;
    made.weights.resize(kPositions * count * panel);
    made.fields.resize(count * kWindowFields * kPanelOutputs);
    std::vector<int> weights(9 * shape.channels);
    for (int64_t o = 0; o < shape.out_channels; ++o) {
        const int64_t p = o / kPanelOutputs, lane = o % kPanelOutputs;
        const int8_t* from = panels + p * shape.panel_words() * kPanelOutputs * kWordChannels;
        for (int64_t i = 0; i < 9 * shape.channels; ++i)
            weights[i] = from[(i / kWordChannels * kPanelOutputs + lane) * kWordChannels + i % kWordChannels];
        const Grid grid = grid_of(weights);
        uint32_t offsets[kPositions] = {};
        for (int64_t c = 0; c < channels; ++c) {
            int columns[4][3], rows[4];
            for (int s = 0; s < 3; ++s) {
                int g[3];
                for (int r = 0; r < 3; ++r) g[r] = (weights[(3 * r + s) * channels + c] - grid.middle) / grid.step;
                times_g(g[0], g[1], g[2], rows);
                for (int r = 0; r < 4; ++r) columns[r][s] = rows[r];
            }
            for (int r = 0; r < 4; ++r) {
                times_g(columns[r][0], columns[r][1], columns[r][2], rows);
                for (int s = 0; s < 4; ++s) {
                    if (rows[s] < -128 || rows[s] > 127) return std::nullopt;
                    const int64_t word =
                        (p * kPositions + 4 * r + s) * panel / kWordChannels + c / kWordChannels * kPanelOutputs;
                    made.weights[(word + lane) * kWordChannels + c % kWordChannels] = static_cast<int8_t>(rows[s]);
                    offsets[4 * r + s] += static_cast<uint32_t>(rows[s] * shift_of(4 * r + s));
                }
            }
        }
        int32_t* fields = made.fields.data() + p * kWindowFields * kPanelOutputs + lane;
        fields[kStep * kPanelOutputs] = grid.step;
        fields[kMiddle * kPanelOutputs] = grid.middle;
        uint32_t rows[2][4], shares[4];
        for (int s = 0; s < 4; ++s)
            times_at(offsets[s], offsets[4 + s], offsets[8 + s], offsets[12 + s], rows[0][s], rows[1][s]);
        for (int a = 0; a < 2; ++a)
            times_at(rows[a][0], rows[a][1], rows[a][2], rows[a][3], shares[2 * a], shares[2 * a + 1]);
        for (int i = 0; i < 4; ++i) fields[(kOffsetShare + i) * kPanelOutputs] = static_cast<int32_t>(shares[i]);
    }
    return made;
}

void transform_window(const uint8_t* const (&pixels)[kPositions], int64_t channels, int64_t stride, uint8_t* to,
                      int32_t (&sums)[4]) {
    simd::run<TransformWindow>(static_cast<const uint8_t* const*>(pixels), channels, stride, to,
                               static_cast<int32_t*>(sums));
}

void transform_products(const int32_t* products, int windows, int64_t panels, const int32_t* fields,
                        const int32_t (*codes)[4], int32_t* sums) {
    simd::run<TransformProducts>(products, windows, panels, fields, codes, sums);
}

}  // namespace ptq4cuda
