// What becomes of the sums of a convolution: values or codes, packed or not, after a residual and an activation.
//
// A thread finishes an octet of channels for some pixels. It takes the octet channel by channel: what the channel
// needs is read from shared memory once and serves all of the pixels. Branches on what a layer has, which are the
// same for all threads, are taken once for them too. Codes gather in two words a pixel, as bytes, those of the even
// channels and those of the odd ones: a shift and a mask make of them the nibbles of a packed octet.
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

// How the codes of an octet are put together and where they go.
struct alignas(16) OctetCodes {
    uint32_t even, odd;      // what the words of the codes begin with: minus what shifted_code adds to them
    uint32_t first, second;  // which bytes of the two words have the high nibbles at even places, at odd places
    uint32_t first_mask, second_mask;  // which of these places there are
    int32_t begin, bytes;              // of a pixel: where they are
};

// A strip's constants by [channel of the octet][octet], so that the lanes of a warp read them from different banks.
struct Constants {
    using Four = Vector<float, 4>;
    Four affine[kOctet][kOctets];  // scale, bias, minus shifted zero point and scale of the residual
    Four out[kOctet][kOctets], also[kOctet][kOctets];  // CodeRange
    OctetCodes out_codes[kOctets], also_codes[kOctets];
    int32_t zeros[kOctet][kOctets];  // zero_sums of all taps
    int32_t careful[kOctets];        // whether the octet is finished value by value
    uint32_t
        byte_bits;  // kByteBits, where the compiler cannot know it: it would bring it to a register for each byte
};

__device__ __forceinline__ CodeRange range_of(const Constants::Four& four) {
    return {four.at[0], four.at[1], four.at[2]};
}

// A code as the last bits of a float: exact, and an instruction.
constexpr float kByteShift = 1 << 23;
constexpr uint32_t kByteBits = 0x4b000000;

// --- places --------------------------------------------------------------------------------------------------------

// Where the windows of output pixels lie in the input. Pixels of a launch are counted in 31 bits.
struct Window {
    FastDivisor area, width;    // of an output image
    int pixels;                 // of the output
    int height_in, width_in;    // of an input image
    int rows, columns;          // of the kernel
    int down_step, right_step;  // dilation
    int down_stride, right_stride, down_padding, right_padding;
    int64_t image_bytes;  // of an input image
    int pixel_bytes;
    bool borders;  // some taps are outside of the image

    explicit Window(const ConvShape& s)
        : area(s.out.area()),
          width(s.out.width),
          pixels(static_cast<int>(s.pixels())),
          height_in(static_cast<int>(s.in.height)),
          width_in(static_cast<int>(s.in.width)),
          rows(static_cast<int>(s.kernel.height)),
          columns(static_cast<int>(s.kernel.width)),
          down_step(static_cast<int>(s.dilation.height)),
          right_step(static_cast<int>(s.dilation.width)),
          down_stride(static_cast<int>(s.stride.height)),
          right_stride(static_cast<int>(s.stride.width)),
          down_padding(static_cast<int>(s.padding.height)),
          right_padding(static_cast<int>(s.padding.width)),
          image_bytes(s.in.area() * s.pixel_bytes()),
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
        return x + image * w.image_bytes + (int64_t{row} * w.width_in + column) * w.pixel_bytes;
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
        Constants::Four affine{};
        if (exists) {
            affine.at[0] = problem.scale[channel];
            affine.at[1] = problem.bias[channel];
            plain = plain && fabsf(affine.at[0]) < 0x1p60f && fabsf(affine.at[1]) < 0x1p60f;
            if (problem.residual) {
                const Quantizer q = problem.residual_quantizer[channel];
                affine.at[2] = 0.0f - (kByteShift + q.zero_point);
                affine.at[3] = q.scale;
                plain = plain && fabsf(q.zero_point) <= kSmallZeroPoint && fabsf(q.scale) < 0x1p60f;
            }
        }
        to.affine[j][octet] = affine;
        if (has_zeros) {
            int32_t sum = 0;
            for (int tap = 0; exists && tap < static_cast<int>(problem.shape.kernel.area()); ++tap)
                sum += problem.zero_sums[tap * problem.shape.out_channels + channel];
            to.zeros[j][octet] = sum;
        }
        const auto prepare_codes = [&](const QuantizerTable& table, const Packing& packing,
                                       Constants::Four(&ranges)[kOctet][kOctets], OctetCodes(&octets)[kOctets]) {
            const Quantizer q = exists ? table[channel] : Quantizer{1.0f, 1.0f, 0.0f, 0.0f};
            plain = plain && fabsf(q.zero_point) <= kSmallZeroPoint && q.inv_scale > 0.0f && q.inv_scale < INFINITY;
            const bool folds = output.clamps;
            const CodeRange range =
                code_range(q, folds && problem.activation.negative_slope == 0.0f ? 0.0f : -INFINITY,
                           folds ? problem.activation.upper * q.inv_scale : INFINITY);
            ranges[j][octet] = {{range.inv_scale, range.least, range.largest, 0.0f}};

            const int lane = c % 32;
            const int32_t zero_point =
                fabsf(q.zero_point) <= kSmallZeroPoint ? static_cast<int32_t>(q.zero_point) : 0;
            uint32_t begins = (static_cast<uint32_t>(zero_point) - kRoundingBits) << j / 2 * 8;
            begins += __shfl_xor_sync(kAll, begins, 2);
            begins += __shfl_xor_sync(kAll, begins, 4);
            const unsigned high = __ballot_sync(kAll, q.qmax > 15.0f) >> (lane & 24) & 0xff;
            const int place = __popc(high & ((1u << j) - 1)), count = __popc(high);
            uint32_t selector = high >> j & 1 ? (j / 2 + j % 2 * 4u) << (place / 2 * 4 + place % 2 * 16) : 0;
            for (int lanes = 1; lanes < kOctet; lanes *= 2) selector |= __shfl_xor_sync(kAll, selector, lanes);
            OctetCodes& codes = octets[octet];
            if (j == 1) codes.odd = begins;
            if (j != 0) return;
            codes.even = begins;
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
        if (j == 0) to.careful[octet] = all_plain != 0xff;
        if (c % kStrip == 0) to.byte_bits = kByteBits;
    }
}

// --- an octet, value by value --------------------------------------------------------------------------------------

// Finishes the first `count` channels of an octet of one pixel, from output `first` on, by the functions of
// numerics.h and with accesses of single elements.
PTQ_NOINLINE __device__ void finish_carefully(const ConvProblem& problem, const Output& output, int64_t pixel,
                                              int first, int count, const int32_t (&sums)[kOctet]) {
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
    for (int j = 0; j < count; ++j) {
        float x = scaled_sum(sums[j], problem.scale[first + j], problem.bias[first + j]);
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

// Stores the codes of an octet of a pixel, bytes of even and of odd channels.
__device__ __forceinline__ void put_bytes(uint8_t* to, const uint32_t (&words)[2]) {
    const Vector<uint32_t, 2> bytes{
        {__byte_perm(words[0], words[1], 0x5140), __byte_perm(words[0], words[1], 0x7362)}};
    store<2>(reinterpret_cast<uint32_t*>(to), bytes, true);
}

// The codes of an octet of a pixel packed: the low nibbles; the high ones as far as there are any, one behind the
// other.
__device__ __forceinline__ uint32_t low_nibbles(const uint32_t (&words)[2]) {
    return (words[0] & 0x0f0f0f0f) | (words[1] << 4 & 0xf0f0f0f0);
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
        if (pixel + place(p) >= window.pixels) continue;
        const Pixel at(window, pixel + place(p));
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
    const bool activates =
        !output.clamps && (problem.activation.negative_slope != 1.0f || problem.activation.upper != INFINITY);
    // Calls f(p, pixels behind `pixel`) for the pixels that exist. Addresses are those of `pixel`, 64 bits, and a
    // product of 32 bits from there on.
    const auto for_each_pixel = [&](const auto& f) {
#pragma unroll
        for (int p = 0; p < P; ++p)
            if (place(p) < pixels - pixel) f(p, int64_t{place(p)});
    };
    const uint32_t byte_bits = constants.byte_bits;
    Vector<uint32_t, 2> residual[P] = {};
    if (has_residual) {
        const uint8_t* from = problem.residual + int64_t{pixel} * channels + first;
        for_each_pixel([&](int p, int64_t behind) {
            residual[p] = load<2>(reinterpret_cast<const uint32_t*>(from + behind * channels), true);
        });
    }
    uint32_t codes[P][2] = {}, also[P][2] = {};  // of even and of odd channels
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
        const Constants::Four affine = constants.affine[j][octet];
        float x[P];
#pragma unroll
        for (int p = 0; p < P; ++p) x[p] = scaled_sum(sum(j, p), affine.at[0], affine.at[1]);
        if (has_residual) {
#pragma unroll
            for (int p = 0; p < P; ++p) {
                const uint32_t byte = __byte_perm(residual[p].at[j / 4], byte_bits, 0x7650 + j % 4);
                x[p] += (std::bit_cast<float>(byte) + affine.at[2]) * affine.at[3];
            }
        }
        if (activates) {
#pragma unroll
            for (int p = 0; p < P; ++p)
                x[p] = activated(x[p], problem.activation.negative_slope, problem.activation.upper);
        }
        const auto gather = [&](const Constants::Four& four, const OctetCodes& begins, uint32_t (&words)[P][2]) {
            const CodeRange range = range_of(four);
            if (j < 2) {
                const uint32_t begin = j == 0 ? begins.even : begins.odd;
#pragma unroll
                for (int p = 0; p < P; ++p) words[p][j] = begin;
            }
#pragma unroll
            for (int p = 0; p < P; ++p) words[p][j % 2] += shifted_code(x[p], range) << j / 2 * 8;
        };
        if (has_codes) {
            gather(constants.out[j][octet], constants.out_codes[octet], codes);
        } else {
#pragma unroll
            for (int p = 0; p < P; ++p) sum(j, p) = std::bit_cast<int32_t>(x[p]);
        }
        if (has_also) gather(constants.also[j][octet], constants.also_codes[octet], also);
    }

    const auto put_codes = [&](uint8_t* to, const Packing& packing, const OctetCodes& in_shared,
                               const uint32_t (&words)[P][2]) {
        if (!packing.starts) {
            to += int64_t{pixel} * channels + first;
            for_each_pixel([&](int p, int64_t behind) { put_bytes(to + behind * channels, words[p]); });
        } else {
            const OctetCodes of_octet = in_shared;
            const int row = packing.bytes;
            to += int64_t{pixel} * row;
            for_each_pixel([&](int p, int64_t behind) {
                *reinterpret_cast<uint32_t*>(to + first / 2 + behind * row) = low_nibbles(words[p]);
            });
            if (of_octet.bytes == 0) return;
            to += of_octet.begin;
            uint32_t high[P];
#pragma unroll
            for (int p = 0; p < P; ++p) high[p] = high_nibbles(of_octet, words[p]);
#pragma unroll
            for (int b = 0; b < kWordChannels; ++b)
                if (b < of_octet.bytes)
                    for_each_pixel([&](int p, int64_t behind) {
                        to[behind * row + b] = static_cast<uint8_t>(high[p] >> 8 * b);
                    });
#pragma unroll 1  // what fills up a pixel is the last octet's
            for (int b = kWordChannels; b < of_octet.bytes; ++b)
                for_each_pixel([&](int, int64_t behind) { to[behind * row + b] = 0; });
        }
    };
    if (has_also) put_codes(problem.also, problem.also_packing, constants.also_codes[octet], also);
    if (has_codes)
        return put_codes(static_cast<uint8_t*>(output.y), problem.out_packing, constants.out_codes[octet], codes);
    const auto put = [&](auto* to) {
        to += int64_t{pixel} * channels + first;
        for_each_pixel([&](int p, int64_t behind) {
            float values[kOctet];
#pragma unroll
            for (int j = 0; j < kOctet; ++j) values[j] = std::bit_cast<float>(sum(j, p));
            put_values(to + behind * channels, values);
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
        int32_t sums[kOctet];
#pragma unroll
        for (int j = 0; j < kOctet; ++j) sums[j] = sum(j, p);
        finish_carefully(problem, output, pixel + place(p), first, min(count, kOctet), sums);
    }
}

}  // namespace
}  // namespace ptq4cuda
