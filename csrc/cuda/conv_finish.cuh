// What becomes of the sums of a convolution: values or codes, packed or not, after a residual and an activation.
//
// A thread finishes an octet of channels for some pixels, step by step: all values are scaled, then all residuals
// added, and so on, in the registers of the sums. Whether a layer has a step is asked once, and what the step needs
// of a channel is read from shared memory once for all of the pixels. Codes gather in two words a pixel, as bytes,
// those of the even channels and those of the odd ones: a shift and a mask make of them the nibbles of a packed
// octet.
//
// The constants of a strip of 64 outputs are worked out by the block before its sums are ready. Where one of them is
// such that a short cut would not be exact (numerics.h), where an octet is not whole or memory not aligned, the octet
// is finished value by value instead.
#pragma once

#include "../conv.h"
#include "../division.h"
#include "launch.cuh"

namespace ptq4cuda {
namespace {

constexpr int kOctets = 8, kStrip = kOctets * kOctet;  // outputs whose constants lie together

struct Output {
    void* y;
    ScalarType dtype;
    bool vectors;  // octets are whole, and aligned in memory
    bool clamps;   // all outputs are codes, and the activation does nothing but clamp
};

// The code of a value in three instructions, for a quantizer whose zero point is at most kSmallZeroPoint and values
// that are not NaN. In units of 2^-24 a code is the last bits of a float from 0.5 to 1, where there is no room for
// fractions: the sum with 0.75 is rounded to an integer, half to even. All that is beyond becomes 0 or 1 with it.
constexpr float kSmallZeroPoint = 1 << 21;
constexpr int32_t kRoundingBits = 0x3f400000;  // of 0.75

struct alignas(16) CodeRange {
    float factor;             // 2^-24 / scale
    int32_t offset, largest;  // from the bits of the sum to the code, and the largest code

    static constexpr float kLeastInverse = 0x1p-100f;  // of a scale: its product with 2^-24 is exact

    CodeRange() = default;
    // Clamps to the limits of a quantizer and before that, in units of its steps, to `high`. (What is clamped before
    // it is rounded is clamped after, since limits are rounded as values are.)
    __device__ __forceinline__ CodeRange(const Quantizer& q, float high) : factor(q.inv_scale * 0x1p-24f) {
        const int32_t zero_point = static_cast<int32_t>(q.zero_point);
        offset = zero_point - kRoundingBits;
        largest =
            static_cast<int32_t>(rintf(fminf(fmaxf(high, 0.0f - q.zero_point), q.qmax - q.zero_point))) + zero_point;
    }
    __device__ __forceinline__ uint32_t operator()(float x) const {
        return add_clamped(std::bit_cast<int32_t>(__saturatef(x * factor + 0.75f)), offset, largest);
    }
};

// How the codes of an octet are put together and where they go.
struct alignas(16) OctetCodes {
    uint32_t first, second;  // which bytes of the two words have the high nibbles at even places, at odd places
    uint32_t first_mask, second_mask;  // which of these places there are
    int32_t begin, bytes;              // of a pixel: where they are
};

// A strip's constants by [channel of the octet][octet], so that the lanes of a warp read them from different banks.
struct Constants {
    using Pair = Vector<float, 2>;
    Pair affine[kOctet][kOctets], residual[kOctet][kOctets];  // scale, bias; minus shifted zero point, scale
    CodeRange out[kOctet][kOctets], also[kOctet][kOctets];
    OctetCodes out_codes[kOctets], also_codes[kOctets];
    int32_t zeros[kOctet][kOctets];  // zero_sums of all taps
    int32_t careful[kOctets];        // whether the octet is finished value by value
    int32_t activates[kOctets];      // whether its codes do not clamp as a ReLU does
    uint32_t
        byte_bits;  // kByteBits, where the compiler cannot know it: it would bring it to a register for each byte
};

// A code as the last bits of a float: exact, and an instruction.
constexpr float kByteShift = 1 << 23;
constexpr uint32_t kByteBits = 0x4b000000;

// --- places --------------------------------------------------------------------------------------------------------

// Where the windows of output pixels lie in the input. Pixels of a launch are counted in 31 bits.
struct Window {
    FastDivisor area, width;    // of an output image
    int pixels;                 // of the output
    int height_in, width_in;    // of an input image
    int pitch;                  // pixels from a row of it to the next one in memory
    int rows, columns;          // of the kernel
    int down_step, right_step;  // dilation
    int down_stride, right_stride, down_padding, right_padding;
    int64_t image_bytes;  // from an input image to the next one
    int pixel_bytes;
    bool borders;  // some taps are outside of the image

    // `border` are the pixels around each image that memory holds too.
    explicit Window(const ConvShape& s, const Extent& border = {0, 0})
        : area(s.out.area()),
          width(s.out.width),
          pixels(static_cast<int>(s.pixels())),
          height_in(static_cast<int>(s.in.height)),
          width_in(static_cast<int>(s.in.width)),
          pitch(static_cast<int>(s.in.width + 2 * border.width)),
          rows(static_cast<int>(s.kernel.height)),
          columns(static_cast<int>(s.kernel.width)),
          down_step(static_cast<int>(s.dilation.height)),
          right_step(static_cast<int>(s.dilation.width)),
          down_stride(static_cast<int>(s.stride.height)),
          right_stride(static_cast<int>(s.stride.width)),
          down_padding(static_cast<int>(s.padding.height)),
          right_padding(static_cast<int>(s.padding.width)),
          image_bytes((s.in.height + 2 * border.height) * pitch * s.pixel_bytes()),
          pixel_bytes(static_cast<int>(s.pixel_bytes())),
          borders(s.padding.height > 0 || s.padding.width > 0) {}
};

__device__ __forceinline__ bool inside(int i, int size) {
    return static_cast<unsigned>(i) < static_cast<unsigned>(size);
}

// The place of an output pixel in the input.
struct Pixel {
    int image, row, column;  // of the first tap, may be negative

    __device__ __forceinline__ Pixel(const Window& w, int index) {
        image = w.area.quotient(index);
        const int in_image = w.area.remainder(index, image), line = w.width.quotient(in_image);
        row = line * w.down_stride - w.down_padding;
        column = w.width.remainder(in_image, line) * w.right_stride - w.right_padding;
    }
    __device__ __forceinline__ const uint8_t* first_tap(const uint8_t* x, const Window& w) const {
        return x + image * w.image_bytes + (int64_t{row} * w.pitch + column) * w.pixel_bytes;
    }
};

// --- constants -----------------------------------------------------------------------------------------------------

// The numbers of bytes that `count` nibbles at every second place take, as a mask of those nibbles.
__device__ __forceinline__ uint32_t places(int count, uint32_t nibbles) {
    return count >= 4 ? nibbles : nibbles & ((1u << 8 * count) - 1);
}

// Works out the constants of kStrips strips from output `first` on, of which those before `end` exist. All threads of
// the block take part; they meet at a barrier before the constants are read.
template <int kThreads, int kStrips>
__device__ __forceinline__ void prepare(const ConvProblem& problem, const Output& output, bool has_zeros, int first,
                                        int end, Constants* strips) {
    constexpr unsigned kAll = 0xffffffffu;
    for (int c = threadIdx.x; c < kStrips * kStrip; c += kThreads) {  // whole warps
        Constants& to = strips[c / kStrip];
        const int j = c % kOctet, octet = c % kStrip / kOctet, channel = first + c;
        const bool exists = channel < end;
        bool plain = exists && output.vectors;
        bool activates =
            !output.clamps && (problem.activation.negative_slope != 1.0f || problem.activation.upper != INFINITY);
        Constants::Pair affine{}, residual{};
        if (exists) {
            affine = {{problem.scale[channel], problem.bias[channel]}};
            plain = plain && fabsf(affine.at[0]) < 0x1p60f && fabsf(affine.at[1]) < 0x1p60f;
            if (problem.residual) {
                const Quantizer q = problem.residual_quantizer[channel];
                residual = {{0.0f - (kByteShift + q.zero_point), q.scale}};
                plain = plain && fabsf(q.zero_point) <= kSmallZeroPoint && fabsf(q.scale) < 0x1p60f;
            }
        }
        to.residual[j][octet] = residual;
        to.affine[j][octet] = affine;
        if (has_zeros) {
            int32_t sum = 0;
            for (int tap = 0; exists && tap < static_cast<int>(problem.shape.kernel.area()); ++tap)
                sum += problem.zero_sums[tap * problem.shape.out_channels + channel];
            to.zeros[j][octet] = sum;
        }
        const auto prepare_codes = [&](const QuantizerTable& table, const Packing& packing,
                                       CodeRange(&ranges)[kOctet][kOctets], OctetCodes(&octets)[kOctets]) {
            Quantizer q = exists ? table[channel] : Quantizer{1.0f, 1.0f, 0.0f, 0.0f};
            const bool small = fabsf(q.zero_point) <= kSmallZeroPoint;
            if (!small) q.zero_point = 0.0f;
            plain = plain && small && q.inv_scale >= CodeRange::kLeastInverse && q.inv_scale < INFINITY;
            activates = activates || (problem.activation.negative_slope == 0.0f && q.zero_point > 0.0f);
            ranges[j][octet] = CodeRange(q, output.clamps ? problem.activation.upper * q.inv_scale : INFINITY);

            const int lane = c % 32;
            const unsigned high = __ballot_sync(kAll, q.qmax > 15.0f) >> (lane & 24) & 0xff;
            const int place = __popc(high & ((1u << j) - 1)), count = __popc(high);
            uint32_t selector = high >> j & 1 ? (j / 2 + j % 2 * 4u) << (place / 2 * 4 + place % 2 * 16) : 0;
            for (int lanes = 1; lanes < kOctet; lanes *= 2) selector |= __shfl_xor_sync(kAll, selector, lanes);
            OctetCodes& codes = octets[octet];
            if (j != 0) return;
            codes.first = selector & 0xffff;
            codes.second = selector >> 16;
            codes.begin = codes.bytes = 0;
            codes.first_mask = places((count + 1) / 2, 0x0f0f0f0f);
            codes.second_mask = places(count / 2, 0xf0f0f0f0);
            if (packing.starts && exists) {
                codes.begin = packing.begin(channel / kOctet);
                codes.bytes = packing.end(channel / kOctet) - codes.begin;
            }
        };
        if (output.dtype == ScalarType::Byte)
            prepare_codes(problem.out_quantizer, problem.out_packing, to.out, to.out_codes);
        if (problem.also) prepare_codes(problem.also_quantizer, problem.also_packing, to.also, to.also_codes);
        const unsigned all_plain = __ballot_sync(kAll, plain) >> (c % 32 & 24) & 0xff;
        const unsigned any_activates = __ballot_sync(kAll, activates) >> (c % 32 & 24) & 0xff;
        if (j == 0) to.careful[octet] = all_plain != 0xff;
        if (j == 0) to.activates[octet] = any_activates != 0;
        if (c % kStrip == 0) to.byte_bits = kByteBits;
    }
}

// --- an octet, value by value --------------------------------------------------------------------------------------

// Finishes the first `count` channels of an octet of one pixel, from output `first` on, by the functions of
// numerics.h and with accesses of single elements.
PTQ_NOINLINE __device__ void finish_carefully(const ConvProblem& problem, const Output& output, int64_t pixel,
                                              int first, int count, Vector<int32_t, kOctet> sums) {
    const int64_t at = pixel * problem.shape.out_channels + first;
    struct Nibbles {
        uint32_t low = 0, high = 0;
        int bits = 0;  // of the high ones
    } of_out, of_also;
    const auto put_code = [&](uint8_t* to, const Packing& packing, const Quantizer& q, float x, int j,
                              Nibbles& nibbles) {
        const uint32_t c = code(x, q);
        if (!packing.starts) {
            to[at + j] = static_cast<uint8_t>(c);
            return;
        }
        nibbles.low |= (c & 15) << 4 * j;
        if (q.qmax <= 15.0f) return;
        nibbles.high |= c >> 4 << nibbles.bits;
        nibbles.bits += 4;
    };
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
        const int32_t sum = sums.at[0];
#pragma unroll
        for (int i = 1; i < kOctet; ++i) sums.at[i - 1] = sums.at[i];  // they stay in registers
        float x = scaled_sum(sum, problem.scale[first + j], problem.bias[first + j]);
        if (problem.residual)
            x += value(static_cast<float>(problem.residual[at + j]), problem.residual_quantizer[first + j]);
        x = activated(x, problem.activation.negative_slope, problem.activation.upper);
        if (problem.also)
            put_code(problem.also, problem.also_packing, problem.also_quantizer[first + j], x, j, of_also);
        using torch::headeronly::BFloat16, torch::headeronly::Half;
        switch (output.dtype) {
            case ScalarType::Byte:
                put_code(static_cast<uint8_t*>(output.y), problem.out_packing, problem.out_quantizer[first + j], x, j,
                         of_out);
                break;
            case ScalarType::Half: static_cast<Half*>(output.y)[at + j] = static_cast<Half>(x); break;
            case ScalarType::BFloat16: static_cast<BFloat16*>(output.y)[at + j] = static_cast<BFloat16>(x); break;
            default: static_cast<float*>(output.y)[at + j] = x;
        }
    }
    const auto put_nibbles = [&](uint8_t* to, const Packing& packing, const Nibbles& nibbles) {
        if (!packing.starts) return;
        to += pixel * packing.bytes;
        for (int b = 0; b < kWordChannels; ++b) to[first / 2 + b] = static_cast<uint8_t>(nibbles.low >> 8 * b);
        const int32_t begin = packing.begin(first / kOctet), end = packing.end(first / kOctet);
        for (int32_t b = begin; b < end; ++b)
            to[b] = b - begin < 4 ? static_cast<uint8_t>(nibbles.high >> 8 * (b - begin)) : 0;
    };
    if (output.dtype == ScalarType::Byte) put_nibbles(static_cast<uint8_t*>(output.y), problem.out_packing, of_out);
    if (problem.also) put_nibbles(problem.also, problem.also_packing, of_also);
}

// --- octets of some pixels -----------------------------------------------------------------------------------------

using OctetBytes = Vector<uint32_t, 2>;

// The codes of an octet of a pixel packed: the low nibbles; the high ones as far as there are any, one behind the
// other.
__device__ __forceinline__ uint32_t low_nibbles(const uint32_t (&words)[2]) {
    return select_bits(0x0f0f0f0f, words[0], words[1] << 4);
}
__device__ __forceinline__ uint32_t high_nibbles(const OctetCodes& codes, const uint32_t (&words)[2]) {
    return (__byte_perm(words[0], words[1], codes.first) >> 4 & codes.first_mask) |
           (__byte_perm(words[0], words[1], codes.second) & codes.second_mask);
}

template <class T>
__device__ __forceinline__ void put_values(T* to, const float (&values)[kOctet]) {
    constexpr int V = std::min<int>(kOctet, 16 / sizeof(T));
#pragma unroll
    for (int i = 0; i < kOctet; i += V) {
        Vector<T, V> v;
#pragma unroll
        for (int j = 0; j < V; ++j) v.at[j] = static_cast<T>(values[i + j]);
        store<V>(to + i, v, true);
    }
}

// The share of the zero points is subtracted from the sums of an octet of P pixels, `places(p)` behind `pixel`. What
// taps outside of the image have of it is given back.
template <int P, class Sum, class Place>
__device__ __forceinline__ void subtract_zeros(const ConvProblem& problem, const Window& window,
                                               const Constants& constants, int octet, int pixel, int first, int count,
                                               const Sum& sum, const Place& place) {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
        const int32_t zeros = constants.zeros[j][octet];
#pragma unroll
        for (int p = 0; p < P; ++p) sum(j, p) -= zeros;
    }
    if (!window.borders) return;
    const int last_down = (window.rows - 1) * window.down_step, last_right = (window.columns - 1) * window.right_step;
#pragma unroll
    for (int p = 0; p < P; ++p) {
        const Pixel at(window, min(pixel + place(p), window.pixels - 1));
        if (at.row >= 0 && at.row + last_down < window.height_in && at.column >= 0 &&
            at.column + last_right < window.width_in)
            continue;
        const int32_t* zeros = problem.zero_sums + first;
        for (int row = at.row; row <= at.row + last_down; row += window.down_step)
            for (int column = at.column; column <= at.column + last_right; column += window.right_step) {
                if (!inside(row, window.height_in) || !inside(column, window.width_in)) {
#pragma unroll
                    for (int j = 0; j < kOctet; ++j)
                        if (j < count) sum(j, p) += zeros[j];
                }
                zeros += problem.shape.out_channels;
            }
    }
}

// Finishes the sums of an octet of P pixels, pixel + place(p) as far as they are before `pixels`. sum(channel, p) is
// a sum without the share of zero points. The octet is whole and nothing about it needs care.
template <int P, class Sum, class Place>
__device__ __forceinline__ void finish_octet(const ConvProblem& problem, const Output& output,
                                             const Constants& constants, int octet, int pixel, int pixels, int first,
                                             const Sum& sum, const Place& place) {
    const int channels = static_cast<int>(problem.shape.out_channels);
    const bool has_residual = problem.residual, has_codes = output.dtype == ScalarType::Byte, has_also = problem.also;
    // Calls f(p, the octet's part of pixel p) for all pixels, of rows of `row` elements, of pixel 0 at `part`. Pixels
    // that do not exist are the last one once more, with its sums: their bytes are stored again.
    const auto for_each_pixel = [&](auto* part, int row, const auto& f) {
#pragma unroll
        for (int p = 0; p < P; ++p) f(p, row_of(part, min(pixel + place(p), pixels - 1), row));
    };
    // Replaces what is in the register of each sum: step(channel) gives a function of p and of the register.
    const auto each = [&](const auto& step) {
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
            const auto f = step(j);
#pragma unroll
            for (int p = 0; p < P; ++p) sum(j, p) = std::bit_cast<int>(f(p, sum(j, p)));
        }
    };
    const auto scale = [&] {
        each([&](int j) {
            const Constants::Pair affine = constants.affine[j][octet];
            return [=](int, int total) { return scaled_sum(total, affine.at[0], affine.at[1]); };
        });
    };
    if (has_residual) {
        const uint32_t byte_bits = constants.byte_bits;
        OctetBytes residual[P];
        for_each_pixel(problem.residual + first, channels, [&](int p, const uint8_t* bytes) {
            residual[p] = load<2>(reinterpret_cast<const uint32_t*>(bytes), true);
        });
        scale();
        each([&](int j) {
            const Constants::Pair of_residual = constants.residual[j][octet];
            return [=, &residual](int p, int bits) {
                const uint32_t byte = __byte_perm(residual[p].at[j / 4], byte_bits, 0x7650 + j % 4);
                return std::bit_cast<float>(bits) +
                       (std::bit_cast<float>(byte) + of_residual.at[0]) * of_residual.at[1];
            };
        });
    } else {
        scale();
    }
    if (constants.activates[octet])
        each([&](int) {
            const Activation activation = problem.activation;
            return [=](int, int bits) {
                return activated(std::bit_cast<float>(bits), activation.negative_slope, activation.upper);
            };
        });

    const auto put_codes = [&](uint8_t* to, const Packing& packing, const CodeRange(&ranges)[kOctet][kOctets],
                               const OctetCodes& in_shared) {
        uint32_t words[P][2] = {};
        // word(j) is the one that takes the code of channel j, behind that of the channel before.
        const auto gather = [&](const auto& word) {
#pragma unroll
            for (int j = kOctet - 1; j >= 0; --j) {
                const CodeRange range = ranges[j][octet];
#pragma unroll
                for (int p = 0; p < P; ++p) {
                    uint32_t& codes = words[p][word(j)];
                    codes = codes * 256 + range(std::bit_cast<float>(sum(j, p)));
                }
            }
        };
        if (!packing.starts) {
            gather([](int j) { return j / 4; });
            for_each_pixel(to + first, packing.bytes, [&](int p, uint8_t* bytes) {
                store<2>(reinterpret_cast<uint32_t*>(bytes), OctetBytes{{words[p][0], words[p][1]}}, true);
            });
            return;
        }
        gather([](int j) { return j % 2; });
        const OctetCodes of_octet = in_shared;
        for_each_pixel(to + first / 2, packing.bytes,
                       [&](int p, uint8_t* low) { *reinterpret_cast<uint32_t*>(low) = low_nibbles(words[p]); });
        if (of_octet.bytes == 0) return;
        uint32_t high[P];
        uint8_t* high_to[P];
        for_each_pixel(to + of_octet.begin, packing.bytes, [&](int p, uint8_t* bytes) {
            high[p] = high_nibbles(of_octet, words[p]);
            high_to[p] = bytes;
        });
#pragma unroll
        for (int b = 0; b < kWordChannels; ++b)
            if (b < of_octet.bytes) {
#pragma unroll
                for (int p = 0; p < P; ++p) high_to[p][b] = static_cast<uint8_t>(high[p] >> 8 * b);
            }
#pragma unroll 1  // what fills up a pixel is the last octet's
        for (int b = kWordChannels; b < of_octet.bytes; ++b) {
#pragma unroll
            for (int p = 0; p < P; ++p) high_to[p][b] = 0;
        }
    };
    if (has_also) put_codes(problem.also, problem.also_packing, constants.also, constants.also_codes[octet]);
    if (has_codes)
        return put_codes(static_cast<uint8_t*>(output.y), problem.out_packing, constants.out,
                         constants.out_codes[octet]);
    const auto put = [&](auto* to) {
        for_each_pixel(to + first, channels, [&](int p, auto* octet_of_pixel) {
            float values[kOctet];
#pragma unroll
            for (int j = 0; j < kOctet; ++j) values[j] = std::bit_cast<float>(sum(j, p));
            put_values(octet_of_pixel, values);
        });
    };
    using torch::headeronly::BFloat16, torch::headeronly::Half;
    switch (output.dtype) {
        case ScalarType::Half: return put(static_cast<Half*>(output.y));
        case ScalarType::BFloat16: return put(static_cast<BFloat16*>(output.y));
        default: return put(static_cast<float*>(output.y));
    }
}

// The same for an octet of which the first `count` channels exist, with care where it is needed.
template <int P, class Sum, class Place>
__device__ __forceinline__ void finish(const ConvProblem& problem, const Output& output, const Constants& constants,
                                       int octet, int pixel, int pixels, int first, int count, const Sum& sum,
                                       const Place& place) {
    if (count <= 0) return;
    if (!constants.careful[octet])
        return finish_octet<P>(problem, output, constants, octet, pixel, pixels, first, sum, place);
#pragma unroll
    for (int p = 0; p < P; ++p) {
        if (pixel + place(p) >= pixels) continue;
        Vector<int32_t, kOctet> sums;
#pragma unroll
        for (int j = 0; j < kOctet; ++j) sums.at[j] = sum(j, p);
        finish_carefully(problem, output, pixel + place(p), first, min(count, kOctet), sums);
    }
}

}  // namespace
}  // namespace ptq4cuda
