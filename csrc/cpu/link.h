// A step that can be a link of a chain (chain_step.h).
#pragma once

#include <array>

#include "../conv.h"
#include "steps.h"

namespace ptq4cuda {

// Codes of images, [N, H, W, C]: the rows from one on, which are counted through all images.
struct Band {
    uint8_t* codes = nullptr;
    int64_t from = 0;
};

// What stands in for inputs and outputs of a step, two at most of each: where there is none, those are meant that the
// step was told of.
struct Bands {
    std::array<Band, 2> in, out;
};

// A step that computes images of images, any rows of them at a time. All that it reads through its windows are images
// of the same size, and so are all that it makes.
class Link : public Step {
public:
    virtual const Geometry& geometry() const = 0;
    // Computes rows `top` to `bottom` of the outputs of image n.
    virtual void rows(const Bands& bands, int64_t n, int64_t top, int64_t bottom, Scratch& scratch) const = 0;
};

}  // namespace ptq4cuda
