// From the integer sums of conv2d_integer to its outputs: a few pixels and panels of 16 outputs at a time.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "conv_tiles.h"

namespace ptq4cuda {

// The parameters of a panel's outputs: field f of output o is parameters[16 f + o]; panels follow each other. Behind
// the fields are the lowest and the highest codes of 64 outputs from the panel's first one on, a byte each, and
// facts of all outputs of the panel, 1, or not, 0: that they are on a Line; that their zero points, what these have
// in the sum, and their lowest codes are 0.
enum Field {
    kZeroSum,  // an integer: what the zero points have in the sum, all taps together
    kScale,
    kBias,
    kResidualScale,
    kResidualZeroPoint,
    kInvScale,
    kZeroPoint,
    kQmax,
    // For AVX2 and AVX-512: the zero point as an integer, the codes that are left by the activation.
    kZeroPointBits,
    kLowest,
    kHighest,
    // Where one multiplication does: see Line; else the offset is NaN.
    kFactor,
    kOffset,
    kFields
};
constexpr int64_t kStripOutputs = 64;  // that are finished together, at most
constexpr int64_t kLowestCodes = kFields * kPanelOutputs;
constexpr int64_t kHighestCodes = kLowestCodes + kStripOutputs / sizeof(float);
constexpr int64_t kOnLine = kHighestCodes + kStripOutputs / sizeof(float);
constexpr int64_t kFromZero = kOnLine + 1;
constexpr int64_t kPanelParameters = kOnLine + kPanelOutputs;

// What a tile needs beside its sums and what comes of it. Outputs, and the residual's codes, lie `stride` apart from
// pixel to pixel.
template <class T>
struct Finishing {
    int64_t pixels, outputs, stride;
    int64_t panel_sums;  // from those of a panel to those of the next
    bool block_order;    // of the sums and the parameters: see place_in_block
    const uint8_t* residual;
    T* y;
    const float* parameters;  // of the first panel
    uint8_t* also;            // a second output, or nullptr
    const float* also_parameters;
    Activation activation;
};
template <class T>
using Finisher = void (*)(const int32_t* sums, const Finishing<T>&);

// The parameters of output channel o of a problem, one for each field, for an output with a quantizer or without.
std::array<float, kFields> parameters_of(const ConvProblem& problem, const QuantizerTable& quantizer, int64_t o);

// What the size of each output's sum is less than, and of all that is subtracted from it: of any codes and weights,
// or of those of the problem, whose x has the largest codes of the channels in its first pixel.
std::vector<float> largest_sums(const ConvProblem& problem, bool of_these);

// Whether all values are finite, and all codes before their limits integers of 32 bits, whatever the sums are.
bool stays_in_range(const ConvProblem& problem, const std::vector<float>& largest_sums);

// The codes of an output as rint(factor * sum + offset), rounded once before rint, between their limits.
struct Line {
    float factor, offset;
};

// The line of each output of a problem that stays in range, where its codes are on one.
std::vector<std::optional<Line>> lines_of(const ConvProblem& problem, const std::vector<float>& largest_sums);

// The fastest on this processor, for codes (uint8_t) or values. `in_range`: see stays_in_range.
template <class T>
Finisher<T> finisher_of(bool residual, const Activation& act, bool in_range);

}  // namespace ptq4cuda
