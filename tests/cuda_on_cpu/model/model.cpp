// The scheduler behind cuda_runtime.h: the threads of a block as fibers.
//
// A fiber that finishes a thread starts the next one on the same stack, so a kernel that never waits runs in a single
// fiber, without a switch. A thread that waits keeps its fiber, and hands over to the next: first to threads that
// have not started, then to those that may go on. If there are neither, everybody waits: now it shows who waits for
// whom.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <elf.h>
#include <ucontext.h>

#include <algorithm>
#include <cctype>
#include <deque>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// What tests ask for.
#define PTQ_EXPORT extern "C" __attribute__((visibility("default")))
PTQ_EXPORT void cuda_on_cpu_use_device(int device) { cuda_on_cpu::current_device = device; }
PTQ_EXPORT int cuda_on_cpu_launches() { return cuda_on_cpu::launches; }

namespace cuda_on_cpu {

int current_device = 0, launches = 0;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int64_t kMaximumThreads = 1024, kMaximumGrid = (int64_t{1} << 31) - 1, kMaximumOtherGrid = 65535;
constexpr int64_t kSharedForAll = 48 << 10, kMaximumShared = 227 << 10;  // bytes, without asking and at most
constexpr unsigned char kSpoilt = 0x7f;                                  // nothing that a kernel may count on

// An asynchronous copy under way: what it read and will write.
struct Copy {
    void* to;
    unsigned char bytes[16];
    size_t count;
};

enum class State { waiting_for_block, waiting_for_warp, running };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    int thread = -1;
    State state = State::running;
    Place place;                                 // where it waits
    unsigned mask = 0;                           // for which lanes
    uint64_t values[kWarpWords] = {};            // what it brings to a warp function
    uint64_t lane_values[kWarpWords][warpSize];  // and gets
    std::vector<Copy> copies;                    // under way
    std::vector<size_t> groups;                  // how many of them are in the first group, the first two...
    void* asan_stack = nullptr;
};

// The block that runs now.
struct Block {
    const std::function<void()>* thread_function = nullptr;
    int threads = 0, started = 0, finished = 0;
    bool descending = false;
    std::vector<Fiber*> of_thread;  // the fiber of a thread that has started and not finished
    std::deque<Fiber*> ready;
    std::unique_ptr<char[]> shared;
    std::vector<const void*> functions;            // that have static shared memory
    int64_t shared_bytes = 0, shared_at_most = 0;  // static and dynamic
    bool refused = false;                          // a device would not have launched this kernel
    std::string error;
};

Block block;
Fiber scheduler;  // the host's own stack
Fiber* current = &scheduler;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> idle;
std::mutex one_launch_at_a_time;

void set_place_of_thread(int thread) {
    threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
}

// AddressSanitizer wants to know on which stack the program is.
void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(current->asan_stack, nullptr, nullptr);
#endif
    if (current != &scheduler && current->thread >= 0) set_place_of_thread(current->thread);
}

void switch_to(Fiber* next) {
    if (next == current) return;
    Fiber* self = current;
    current = next;
#if defined(__SANITIZE_ADDRESS__)
    static const char* host_stack = nullptr;
    static size_t host_bytes = 0;
    if (self == &scheduler) {
        // The host's stack, somewhere around this variable.
        pthread_attr_t attributes;
        void* bottom = nullptr;
        pthread_getattr_np(pthread_self(), &attributes);
        pthread_attr_getstack(&attributes, &bottom, &host_bytes);
        pthread_attr_destroy(&attributes);
        host_stack = static_cast<const char*>(bottom);
    }
    __sanitizer_start_switch_fiber(&self->asan_stack, next == &scheduler ? host_stack : next->stack.get(),
                                   next == &scheduler ? host_bytes : kStackBytes);
#endif
    swapcontext(&self->context, &next->context);
    arrived();
}

std::string position(int thread) {
    return "thread " + std::to_string(thread) + " of block " + std::to_string(blockIdx.x);
}
std::string position(const Place& place) {
    const std::string file = place.file_name();
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line());
}

}  // namespace

// Leaves the kernel for good; run_grid raises the error.
void fail(const std::string& error) {
    block.error = error;
    switch_to(&scheduler);
    __builtin_unreachable();
}

namespace {

// What keeps `fiber` waiting: the first thread that has not come to where it is. Empty if it may go on.
std::string missing(const Fiber& fiber) {
    const bool warp = fiber.state == State::waiting_for_warp;
    const int first = warp ? fiber.thread / warpSize * warpSize : 0;
    const int last = warp ? first + warpSize : block.threads;
    for (int t = first; t < last; ++t) {
        if (warp && !(fiber.mask >> (t - first) & 1)) continue;
        const Fiber* other = t < block.threads ? block.of_thread[t] : nullptr;
        if (other == nullptr)
            return "thread " + std::to_string(t) + (t < block.threads ? " has returned" : " does not exist");
        if (other->state != fiber.state || other->place.line() != fiber.place.line() ||
            std::strcmp(other->place.file_name(), fiber.place.file_name()) || (warp && other->mask != fiber.mask))
            return "thread " + std::to_string(t) + " waits at " + position(other->place);
    }
    return "";
}

// Lets a group of threads go on that has met at the same place; false if there is none.
bool release() {
    for (int t = 0; t < block.threads; ++t) {
        Fiber* fiber = block.of_thread[t];
        if (fiber == nullptr || !missing(*fiber).empty()) continue;
        const bool warp = fiber->state == State::waiting_for_warp;
        const int first = warp ? t / warpSize * warpSize : 0, last = warp ? first + warpSize : block.threads;
        const unsigned mask = fiber->mask;
        uint64_t values[kWarpWords][warpSize] = {};
        for (int i = first; warp && i < last; ++i)
            for (int word = 0; word < kWarpWords; ++word)
                if (mask >> (i - first) & 1) values[word][i - first] = block.of_thread[i]->values[word];
        for (int i = first; i < last; ++i) {
            if (warp && !(mask >> (i - first) & 1)) continue;
            std::memcpy(block.of_thread[i]->lane_values, values, sizeof(values));
            block.of_thread[i]->state = State::running;
            block.ready.push_back(block.of_thread[i]);
        }
        return true;
    }
    return false;
}

void fiber_main() {
    arrived();
    for (;;) {
        while (block.started < block.threads) {
            const int n = block.started++;
            current->thread = block.descending ? block.threads - 1 - n : n;
            current->state = State::running;
            current->copies.clear();  // what the thread before it did not wait for has never been delivered
            current->groups.clear();
            block.of_thread[current->thread] = current;
            set_place_of_thread(current->thread);
            (*block.thread_function)();
            block.of_thread[current->thread] = nullptr;
            ++block.finished;
        }
        current->thread = -1;
        idle.push_back(current);
        Fiber* next = &scheduler;
        if (block.finished < block.threads) {
            if (block.ready.empty() && !release()) {
                for (const Fiber* fiber : block.of_thread)
                    if (fiber)
                        fail(position(fiber->thread) + " waits at " + position(fiber->place) + ", " +
                             missing(*fiber));
            }
            next = block.ready.front();
            block.ready.pop_front();
        }
        switch_to(next);
    }
}

Fiber* idle_fiber() {
    if (idle.empty()) {
        auto fiber = std::make_unique<Fiber>();
        fiber->stack.reset(new char[kStackBytes]);
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack.get();
        fiber->context.uc_stack.ss_size = kStackBytes;
        makecontext(&fiber->context, fiber_main, 0);
        idle.push_back(fiber.get());
        fibers.push_back(std::move(fiber));
    }
    Fiber* fiber = idle.back();
    idle.pop_back();
    return fiber;
}

void wait(State state, const Place& place) {
    current->state = state;
    current->place = place;
    Fiber* next = nullptr;
    if (block.started < block.threads) {
        next = idle_fiber();
    } else {
        if (block.ready.empty() && !release())
            fail(position(current->thread) + " waits at " + position(place) + ", " + missing(*current));
        next = block.ready.front();
        block.ready.pop_front();
    }
    switch_to(next);
}

}  // namespace

void wait_for_block(const Place& place) { wait(State::waiting_for_block, place); }

WarpValues wait_for_warp(unsigned mask, std::initializer_list<uint64_t> values, const Place& place) {
    if (!(mask >> this_lane() & 1))
        fail(position(current->thread) + " is not in the mask of the warp function at " + position(place));
    current->mask = mask;
    std::copy(values.begin(), values.end(), current->values);
    wait(State::waiting_for_warp, place);
    return current->lane_values;
}

uint64_t lane_value(const uint64_t* values, unsigned mask, int lane, const Place& place) {
    if (!(mask >> lane & 1))
        fail(position(current->thread) + " reads lane " + std::to_string(lane) + ", outside the mask at " +
             position(place));
    return values[lane];
}

int this_lane() { return current->thread % warpSize; }

void* dynamic_shared_memory() { return block.shared.get(); }

namespace {

cudaError_t last_error = cudaSuccess;
std::map<const void*, int64_t> shared_of_kernel;  // bytes of dynamic shared memory that were asked for
int64_t shared_at_most = 0;                       // of the launch that follows

cudaError_t noted(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

// The static shared memory of functions, by their mangled names, and by the marks in them. What is static in a
// function is a symbol _ZZ<function>E<length><name>; the symbols are those of the program or library that the model
// is in.
using Function = std::pair<const std::string, int64_t>;

std::map<const char*, const Function*> functions_of_marks() {
    static std::map<std::string, int64_t> bytes_of_function;
    std::map<const char*, const Function*> found;
    Dl_info self{};
    dladdr(reinterpret_cast<void*>(&functions_of_marks), &self);
    std::ifstream stream(self.dli_fname, std::ios::binary);
    const std::string file((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
    const auto at = [&](size_t offset) { return file.data() + offset; };
    const auto* header = reinterpret_cast<const Elf64_Ehdr*>(at(0));
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(at(header->e_shoff));
    const auto for_each_static = [&](const auto& f) {
        for (const Elf64_Shdr* section = sections; section < sections + header->e_shnum; ++section) {
            if (section->sh_type != SHT_SYMTAB) continue;
            const auto* symbols = reinterpret_cast<const Elf64_Sym*>(at(section->sh_offset));
            const char* names = at(sections[section->sh_link].sh_offset);
            for (size_t i = 0; i < section->sh_size / sizeof(Elf64_Sym); ++i) {
                const std::string name = names + symbols[i].st_name;
                if (name.rfind("_ZZ", 0) == 0) f(name, symbols[i]);
            }
        }
    };
    const std::string mark = "shared_mark_";
    for_each_static([&](const std::string& name, const Elf64_Sym& symbol) {
        size_t end = name.find(mark);
        if (end == std::string::npos) return;
        while (std::isdigit(static_cast<unsigned char>(name[end - 1]))) --end;
        const auto function = bytes_of_function.try_emplace(name.substr(0, end), 0).first;
        found[static_cast<const char*>(self.dli_fbase) + symbol.st_value] = &*function;
    });
    for_each_static([&](const std::string& name, const Elf64_Sym& symbol) {
        if (name.find(mark) != std::string::npos) return;
        for (size_t end = name.find('E'); end != std::string::npos; end = name.find('E', end + 1)) {
            const auto function = bytes_of_function.find(name.substr(0, end + 1));
            if (function != bytes_of_function.end() && std::isdigit(static_cast<unsigned char>(name[end + 1])))
                function->second += static_cast<int64_t>(symbol.st_size);
        }
    });
    return found;
}

}  // namespace

void has_shared_memory(const char& mark) {
    static const std::map<const char*, const Function*> functions = functions_of_marks();
    const Function* function = functions.at(&mark);
    if (std::find(block.functions.begin(), block.functions.end(), function) != block.functions.end()) return;
    block.functions.push_back(function);
    block.shared_bytes += function->second;
    if (block.shared_bytes <= block.shared_at_most) return;
    block.refused = true;
    fail("more shared memory than a device gives");
}

cudaError_t run_grid(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
    const std::lock_guard lock(one_launch_at_a_time);
    const dim3 &grid = config.gridDim, &threads = config.blockDim;
    const size_t shared_bytes = config.dynamicSmemBytes;
    const int64_t count = int64_t{threads.x} * threads.y * threads.z;
    block.functions.clear();
    block.shared_bytes = static_cast<int64_t>(shared_bytes);
    block.shared_at_most = shared_at_most;
    if (grid.y != 1 || grid.z != 1) throw std::runtime_error("cuda_on_cpu: a grid of more than one dimension");
    ++launches;
    gridDim = grid;
    blockDim = threads;
    for (blockIdx = {0, 0, 0}; blockIdx.x < grid.x; ++blockIdx.x) {
        block.thread_function = &thread;
        block.threads = static_cast<int>(count);
        block.started = block.finished = 0;
        block.descending = blockIdx.x % 2 == 1;
        block.of_thread.assign(count, nullptr);
        block.shared.reset(new char[shared_bytes]);
        std::memset(block.shared.get(), kSpoilt, shared_bytes);
        switch_to(idle_fiber());
        if (block.error.empty()) continue;
        const std::string error = "cuda_on_cpu: " + std::move(block.error);
        const bool refused = block.refused;
        block = Block();
        idle.clear();  // fibers that wait for ever are given up, with what is on their stacks
        fibers.clear();
        if (refused) return noted(cudaErrorInvalidValue);
        throw std::runtime_error(error);
    }
    return cudaSuccess;
}

cudaError_t verdict(const void* kernel, const cudaLaunchConfig_t& config) {
    const dim3 &grid = config.gridDim, &block = config.blockDim;
    const int64_t threads = int64_t{block.x} * block.y * block.z;
    if (threads < 1 || threads > kMaximumThreads || block.z > 64 || int64_t{grid.x} * grid.y * grid.z < 1 ||
        grid.x > kMaximumGrid || std::max(grid.y, grid.z) > kMaximumOtherGrid)
        return noted(cudaErrorInvalidConfiguration);
    const auto asked = shared_of_kernel.find(kernel);
    const int64_t allowed = asked == shared_of_kernel.end() ? kSharedForAll : std::max(kSharedForAll, asked->second);
    shared_at_most = allowed > kSharedForAll ? kMaximumShared : kSharedForAll;
    return noted(static_cast<int64_t>(config.dynamicSmemBytes) > allowed ? cudaErrorInvalidValue : cudaSuccess);
}

}  // namespace cuda_on_cpu

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
    using namespace cuda_on_cpu;
    if (value < 0 || value > kMaximumShared) return noted(cudaErrorInvalidValue);
    shared_of_kernel[kernel] = value;
    return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess             ? "no error"
           : error == cudaErrorInvalidValue ? "invalid argument"
                                            : "invalid configuration argument";
}

void __pipeline_memcpy_async(void* shared, const void* global, size_t bytes, size_t zeros) {
    const auto aligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
    if ((bytes != 4 && bytes != 8 && bytes != 16) || zeros > bytes || !aligned(shared) || !aligned(global))
        cuda_on_cpu::fail("an asynchronous copy of " + std::to_string(bytes) + " bytes that are not aligned");
    cuda_on_cpu::Copy copy{shared, {}, bytes};
    if (zeros < bytes) std::memcpy(copy.bytes, global, bytes - zeros);
    std::memset(shared, cuda_on_cpu::kSpoilt, bytes);
    cuda_on_cpu::current->copies.push_back(copy);
}

void __pipeline_commit() { cuda_on_cpu::current->groups.push_back(cuda_on_cpu::current->copies.size()); }

void __pipeline_wait_prior(size_t groups) {
    std::vector<cuda_on_cpu::Copy>& copies = cuda_on_cpu::current->copies;
    std::vector<size_t>& ends = cuda_on_cpu::current->groups;
    if (ends.size() <= groups) return;
    const size_t done_groups = ends.size() - groups, done = ends[done_groups - 1];
    for (size_t i = 0; i < done; ++i) std::memcpy(copies[i].to, copies[i].bytes, copies[i].count);
    copies.erase(copies.begin(), copies.begin() + done);
    ends.erase(ends.begin(), ends.begin() + done_groups);
    for (size_t& end : ends) end -= done;
}
