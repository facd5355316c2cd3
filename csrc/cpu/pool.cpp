// max_pool_codes on the CPU: one step (pool_step.h).
#include "pool_step.h"

namespace ptq4cuda {
namespace {

struct Cpu {
    static void max_pool(const Tensor&, const PoolProblem& problem) { run_step(std::make_unique<MaxPool>(problem)); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ptq4cuda, CPU, m) { m.impl("max_pool_codes", TORCH_BOX(&PoolOps<Cpu>::max_pool_codes)); }

}  // namespace ptq4cuda
