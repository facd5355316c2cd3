// Division by a number that a whole launch shares: a multiplication and a shift, with a multiplier that the host
// works out. A division of integers takes a GPU some twenty instructions, of 64 bits over a hundred.
#pragma once

#include "numerics.h"

namespace ptq4cuda {

// Divides numbers from 0 to 2^31 - 1 by a divisor from 1 to 2^31 - 1, exactly.
//
// With l bits, 2^l the least power of two not below d, and m = ceil(2^(31 + l) / d), which fits 32 bits, the error of
// n m / 2^(31 + l) is below n / 2^31 / d: too small to reach the next integer. (Granlund, Montgomery: Division by
// Invariant Integers using Multiplication, 1994, theorem 4.2.)
struct FastDivisor {
    uint32_t divisor = 1, multiplier = uint32_t{1} << 31;
    int32_t shift = 0;

    FastDivisor() = default;
    explicit FastDivisor(int64_t d) : divisor(static_cast<uint32_t>(d)) {
        while (int64_t{1} << shift < d) ++shift;
        multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + d - 1) / d);
    }

    PTQ_INLINE int32_t quotient(int32_t n) const {
        const uint64_t product = uint64_t{static_cast<uint32_t>(n) * 2} * multiplier;
        return static_cast<int32_t>(static_cast<uint32_t>(product >> 32) >> shift);
    }
    PTQ_INLINE int32_t remainder(int32_t n, int32_t quotient) const {
        return n - quotient * static_cast<int32_t>(divisor);
    }
};

}  // namespace ptq4cuda
