// Compares FastDivisor with division: every small divisor, those around powers of two and random ones, each with the
// dividends where a wrong multiplier shows first, around its multiples, and with random ones.
#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

#include "division.h"

int main() {
    constexpr int64_t kEnd = int64_t{1} << 31;
    std::mt19937_64 random(0);
    std::vector<int64_t> divisors;
    for (int64_t d = 1; d <= 4096; ++d) divisors.push_back(d);
    for (int64_t power = 1; power < kEnd; power *= 2)
        for (int64_t d = power - 3; d <= power + 3; ++d) divisors.push_back(d);
    for (int i = 0; i < 4096; ++i) divisors.push_back(static_cast<int64_t>(random() % kEnd >> random() % 31));
    for (int64_t d = kEnd - 5; d < kEnd; ++d) divisors.push_back(d);

    int64_t compared = 0, wrong = 0;
    for (const int64_t d : divisors) {
        if (d < 1) continue;
        const ptq4cuda::FastDivisor fast(d);
        const auto compare = [&](int64_t n) {
            if (n < 0 || n >= kEnd) return;
            const int32_t quotient = fast.quotient(static_cast<int32_t>(n));
            ++compared;
            wrong += quotient != n / d || fast.remainder(static_cast<int32_t>(n), quotient) != n % d;
        };
        const int64_t last = (kEnd - 1) / d;
        for (int64_t k : {int64_t{0}, int64_t{1}, int64_t{2}, last / 2, last - 1, last})
            for (int64_t n = k * d - 1; n <= k * d + 1; ++n) compare(n);
        for (int i = 0; i < 32; ++i) {
            const int64_t multiple = static_cast<int64_t>(random() % (last + 1)) * d;
            compare(multiple - 1);
            compare(multiple);
            compare(static_cast<int64_t>(random() % kEnd));
        }
        compare(kEnd - 1);
    }
    std::printf("%lld compared, %lld wrong\n", static_cast<long long>(compared), static_cast<long long>(wrong));
}
