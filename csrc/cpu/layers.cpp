// prepare_layer and run_layers: the integer part of a network as one operator. Its steps are executed one after
// another without a word of Python, values lie in one block of memory that is planned before, and threads are entered
// once (steps.h). keep_layers and run_layers.kept: the same for one that is called again and again, whose steps are
// made once for inputs of some sizes.
//
// The steps come as numbers (ptq4cuda/ops/layers.py writes and explains them), which may be anything: whatever they
// say, nothing is read or written outside of the tensors.
#include <pthread.h>

#include <algorithm>
#include <array>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <span>

#include "chain_step.h"
#include "conv_step.h"
#include "planes.h"
#include "pool_step.h"
#include "rows.h"

namespace ptq4cuda {
namespace {

const char* const kOp = "run_layers";

enum Kind : int64_t { kQuantize, kConvolve, kMaxPool, kConcatenate, kFlatten };

// What a value is: images [N, C, H, W], sequences [N, C, L], or features [*, C].
enum class Form : uint8_t { none, images, sequences, features };

// What a step gives: codes, or values in floating point. In memory channels are innermost: [N, H, W, C]. Sequences
// are images of height one, features images of one pixel.
struct Value {
    Form form = Form::none;
    ScalarType dtype = ScalarType::Byte;
    std::array<int64_t, 4> images{};                // N, C, H, W
    const std::vector<int64_t>* leading = nullptr;  // of features: their sizes but for the last
    size_t made = 0, last = 0;                      // the step that makes it, the last that reads it
    size_t from = 0, until = 0;                     // the steps that it has its place from and until
    bool given = false;                             // is an input or a result: has its place
    bool between = false;                           // the links of a chain: has no place of its own
    uint8_t* data = nullptr;

    bool codes() const { return dtype == ScalarType::Byte; }
    int64_t channels() const { return images[1]; }
    int64_t rows() const { return images[0] * images[2] * images[3]; }
    int64_t numel() const { return rows() * channels(); }
    int64_t bytes() const {
        return numel() * (codes() ? 1 : dtype == ScalarType::Float ? sizeof(float) : sizeof(uint16_t));
    }
    std::vector<int64_t> sizes() const {
        if (form == Form::images) return {images.begin(), images.end()};
        if (form == Form::sequences) return {images[0], images[1], images[3]};
        std::vector<int64_t> sizes = *leading;
        sizes.push_back(channels());
        return sizes;
    }
    std::vector<int64_t> strides() const {
        std::vector<int64_t> ordered = sizes();
        if (form != Form::features) std::rotate(ordered.begin() + 1, ordered.begin() + 2, ordered.end());
        std::vector<int64_t> strides = contiguous_strides(ordered);
        if (form != Form::features) std::rotate(strides.begin() + 1, strides.end() - 1, strides.end());
        return strides;
    }
    // What a step makes of it: codes of other images.
    Value with(int64_t channels, const Extent& size) const {
        Value v = *this;
        v.images = {images[0], channels, size.height, size.width};
        v.dtype = ScalarType::Byte;
        v.given = false;
        v.data = nullptr;
        return v;
    }
    Extent size() const { return {images[2], images[3]}; }
};

// [C, pixels] to [pixels, C].
struct Interleave {
    static PTQ_INLINE void run(const uint8_t* from, int64_t pixels, int64_t channels, uint8_t* to) {
        if (channels == 3) {
            const uint8_t *a = from, *b = from + pixels, *c = b + pixels;
            for (int64_t p = 0; p < pixels; ++p) {
                to[3 * p] = a[p];
                to[3 * p + 1] = b[p];
                to[3 * p + 2] = c[p];
            }
            return;
        }
        for (int64_t first = 0; first < channels; first += kTogether)
            for (int64_t p = 0; p < pixels; ++p)
                for (int64_t c = first; c < std::min(channels, first + kTogether); ++c)
                    to[p * channels + c] = from[c * pixels + p];
    }
    static constexpr int64_t kTogether = 16;
};

// Values that come with channels apart from each other, or beside each other, become codes beside each other.
template <class T>
class QuantizeStep : public Step {
public:
    QuantizeStep(bool beside, const Value& y, const QuantizerTable& table)
        : channels_(y.channels()), pixels_(y.rows()) {
        if (beside || channels_ == 1) {
            whole_.emplace_back(ChannelLayout{pixels_, channels_, 1}, table);
        } else {
            plane_ = y.size().area();
            for (int64_t c = 0; c < channels_; ++c) {
                whole_.emplace_back(ChannelLayout{1, 1, plane_}, table.at(c));
                quantizers_.push_back(table[c]);
            }
        }
        pixels_per_task_ = std::max<int64_t>(kTaskCodes / channels_, 1);
        tasks_ = plane_ ? pixels_ / plane_ * ceil_div(plane_, pixels_per_task_) : ceil_div(pixels_, pixels_per_task_);
    }

    void place(const Value& x, const Value& y) {
        x_ = reinterpret_cast<const T*>(x.data);
        y_ = y.data;
    }

    int64_t tasks() const override { return tasks_; }

    void run(Tasks& tasks, Scratch& scratch) const override {
        for (int64_t task; (task = tasks.take()) >= 0;) {
            if (!plane_) {
                const int64_t begin = task * pixels_per_task_ * channels_;
                const int64_t end = std::min(pixels_, (task + 1) * pixels_per_task_) * channels_;
                whole_[0](x_ + begin, y_ + begin, begin, end);
                continue;
            }
            const int64_t pieces = ceil_div(plane_, pixels_per_task_), image = task / pieces;
            const int64_t begin = task % pieces * pixels_per_task_;
            const int64_t count = std::min(plane_ - begin, pixels_per_task_);
#if defined(__x86_64__)
            if constexpr (std::is_same_v<T, float>)
                if (channels_ == 3 && simd::level() >= simd::Level::avx2) {
                    quantize_planes(x_ + image * channels_ * plane_ + begin, plane_, count, quantizers_.data(),
                                    y_ + (image * plane_ + begin) * channels_);
                    continue;
                }
#endif
            uint8_t* codes = scratch.at_least(count * channels_);
            for (int64_t c = 0; c < channels_; ++c)
                whole_[c](x_ + (image * channels_ + c) * plane_ + begin, codes + c * count, begin, begin + count);
            simd::run<Interleave>(static_cast<const uint8_t*>(codes), count, channels_,
                                  y_ + (image * plane_ + begin) * channels_);
        }
    }

private:
    static constexpr int64_t kTaskCodes = 1 << 14;

    const T* x_ = nullptr;
    uint8_t* y_ = nullptr;
    int64_t channels_, pixels_;
    int64_t plane_ = 0;  // pixels of an image, where channels come apart
    int64_t pixels_per_task_, tasks_;
    std::vector<Rows<Quantize, T, uint8_t>> whole_;  // or one for each channel
    std::vector<Quantizer> quantizers_;              // of each channel, where they come apart
};

// Copies rows of bytes: what each source has of a pixel to its place in the pixel.
class ConcatenateStep : public Step {
public:
    explicit ConcatenateStep(const Value& y) : channels_(y.channels()), pixels_(y.rows()) {
        pixels_per_task_ = kTaskCodes / channels_ + 1;
    }

    void place(std::vector<const Value*> sources, const Value& y) {
        sources_ = std::move(sources);
        y_ = y.data;
    }

    int64_t tasks() const override { return ceil_div(pixels_, pixels_per_task_); }

    void run(Tasks& tasks, Scratch&) const override {
        for (int64_t task; (task = tasks.take()) >= 0;) {
            const int64_t begin = task * pixels_per_task_, end = std::min(pixels_, begin + pixels_per_task_);
            int64_t at = 0;
            for (const Value* source : sources_) {
                const int64_t channels = source->channels();
                for (int64_t p = begin; p < end; ++p)
                    std::memcpy(y_ + p * channels_ + at, source->data + p * channels, channels);
                at += channels;
            }
        }
    }

private:
    static constexpr int64_t kTaskCodes = 1 << 16;

    std::vector<const Value*> sources_;
    uint8_t* y_ = nullptr;
    int64_t channels_, pixels_, pixels_per_task_;
};

// [N, pixels, C] to [N, C, pixels].
class FlattenStep : public Step {
public:
    explicit FlattenStep(const Value& x) : images_(x.images[0]), channels_(x.channels()), pixels_(x.size().area()) {}

    void place(const Value& x, const Value& y) {
        x_ = x.data;
        y_ = y.data;
    }

    int64_t tasks() const override { return images_; }

    void run(Tasks& tasks, Scratch&) const override {
        for (int64_t n; (n = tasks.take()) >= 0;) {
            const uint8_t* from = x_ + n * channels_ * pixels_;
            uint8_t* to = y_ + n * channels_ * pixels_;
            if (pixels_ == 1) std::memcpy(to, from, channels_);
            for (int64_t c = 0; pixels_ > 1 && c < channels_; ++c)
                for (int64_t p = 0; p < pixels_; ++p) *to++ = from[p * channels_ + c];
        }
    }

private:
    const uint8_t* x_ = nullptr;
    uint8_t* y_ = nullptr;
    int64_t images_, channels_, pixels_;
};

// Places in one block of memory for values that live for some steps.
class Arena {
public:
    // A place of so many bytes that is free from step `made` to step `last`. To be asked in the order of `made`.
    int64_t place(int64_t bytes, size_t made, size_t last) {
        std::erase_if(taken_, [&](const auto& item) { return item.second.second < made; });
        if (bytes == 0) return 0;
        bytes = ceil_div(bytes, simd::kLine) * simd::kLine;
        int64_t begin = 0;  // the first gap that is wide enough
        for (const auto& [at, place] : taken_) {
            if (at - begin >= bytes) break;
            begin = std::max(begin, at + place.first);
        }
        taken_.emplace(begin, std::pair{bytes, last});
        size_ = std::max(size_, begin + bytes);
        return begin;
    }
    int64_t size() const { return size_; }

private:
    std::map<int64_t, std::pair<int64_t, size_t>> taken_;  // bytes and the last step, by the beginning
    int64_t size_ = 0;
};

struct Program {
    std::vector<Tensor> constants;
    std::vector<int64_t> code;
    ScalarType dtype;  // of values
};

// What a program does with inputs of some sizes.
class Execution {
public:
    Execution(std::shared_ptr<const Program> program, const std::vector<Tensor>& inputs)
        : program_(std::move(program)), threads_(torch::stable::get_num_threads()) {
        values_.resize(bounded(next(), kMostValues));
        results_ = list();
        for (size_t i = 0; i < inputs.size(); ++i) describe_input(i, inputs[i]);
        steps_.reserve((code().size() - at_) / kLeastNumbers + 1);
        while (at_ < code().size()) plan_step();
        for (int64_t r : results_) {
            Value& v = value(r);
            STD_TORCH_CHECK(!v.given, kOp, ": value ", r, " is an input, or returned twice");
            v.given = true;
            v.last = steps_.size();
        }
        images_ = images_of_all();
        plan();
        find_front();
        whole_ = arena_.size() <= kArenaBytes || images_ < 2;
        if (!whole_ && front_ > 0) {
            set_front(0, images_);
            plan();
        }
    }

    // Whether it is one for these inputs, too, and its steps can be kept for them.
    bool suits(const std::vector<Tensor>& inputs) const {
        if (!whole_ || inputs.size() != inputs_.size() || threads_ != torch::stable::get_num_threads()) return false;
        for (size_t i = 0; i < inputs.size(); ++i)
            if (!(inputs[i].is_cpu() && inputs[i].scalar_type() == values_[i].dtype &&
                  std::ranges::equal(inputs[i].sizes(), inputs_[i].sizes)))
                return false;
        return true;
    }
    bool whole() const { return whole_; }

    std::vector<Tensor> run(const std::vector<Tensor>& inputs) {
        std::vector<Tensor> held, outputs;
        bool remake = !ready_;
        for (size_t i = 0; i < inputs.size(); ++i) {
            auto [x, beside] = laid_out(inputs[i], i);
            remake |= std::exchange(inputs_[i].beside, beside) != beside;
            held.push_back(std::move(x));
            values_[i].data = static_cast<uint8_t*>(held.back().data_ptr());
        }
        for (int64_t r : results_) {
            Value& v = values_[r];
            outputs.push_back(empty_strided(v.sizes(), v.strides(), v.dtype, held.at(0)));
            v.data = static_cast<uint8_t*>(outputs.back().data_ptr());
        }
        if (whole_) {
            execute(held.at(0), remake);
        } else {
            for_images([&] { execute(held.at(0), true); });
        }
        return outputs;
    }

    // Bytes of the memory that values lie in meanwhile.
    int64_t memory() {
        int64_t most = arena_.size();
        if (!whole_) {
            most = 0;
            for_images([&] { most = std::max(most, arena_.size()); });
        }
        return most;
    }

private:
    static constexpr int64_t kMostValues = 1 << 20;
    static constexpr size_t kLeastNumbers = 3;  // of a step
    // Images whose values take more are executed some at a time. From 32 MiB on, memory is handed out anew by the
    // system in each call, page by page, which takes as long as a fifth of a network.
    static constexpr int64_t kArenaBytes = 28 << 20;
    static constexpr int64_t kCacheBytes = 1 << 20;  // that a thread has to itself
    static constexpr int64_t kRunBytes = 256 << 10;  // that could be read while threads are entered once more

    // A step as it was read.
    struct Planned {
        int64_t kind;
        const int64_t* fields;
        const int64_t* joined = nullptr;  // of a pooling: the fields of a second one, or nullptr
        union {
            ConvShape shape;
            PoolProblem pool;
        };
        const Geometry& geometry() const { return kind == kConvolve ? static_cast<const Geometry&>(shape) : pool; }
        void set_images(int64_t images) {
            if (kind == kConvolve) shape.batch = images;
            if (kind == kMaxPool) pool.batch = images;
        }
    };

    // --- reading numbers

    const std::vector<int64_t>& code() const { return program_->code; }
    int64_t next() {
        STD_TORCH_CHECK(at_ < code().size(), kOp, ": the code ends within a step");
        return code()[at_++];
    }
    static int64_t bounded(int64_t number, int64_t limit) {
        STD_TORCH_CHECK(0 <= number && number < limit, kOp, ": ", number, " in the code must be less than ", limit);
        return number;
    }
    Numbers list() {
        const int64_t count = next();
        at_ += bounded(count, static_cast<int64_t>(code().size() - at_) + 1);
        return {code().data() + at_ - count, static_cast<size_t>(count)};
    }
    // So many numbers that follow.
    const int64_t* fields(size_t count) {
        STD_TORCH_CHECK(count <= code().size() - at_, kOp, ": the code ends within a step");
        at_ += count;
        return code().data() + at_ - count;
    }
    Value& value(int64_t number) {
        Value& v = values_[bounded(number, static_cast<int64_t>(values_.size()))];
        STD_TORCH_CHECK(v.form != Form::none, kOp, ": value ", number, " is read before it is made");
        return v;
    }
    Value& codes(int64_t number) {
        Value& v = value(number);
        STD_TORCH_CHECK(v.codes(), kOp, ": value ", number, " has no codes");
        return v;
    }
    const Tensor& constant(int64_t number, ScalarType type) {
        const std::vector<Tensor>& constants = program_->constants;
        const Tensor& t = constants[bounded(number, static_cast<int64_t>(constants.size()))];
        STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == type && t.is_contiguous(), kOp, ": constant ", number,
                        " must be ", name_of(type), " and contiguous on the CPU, got ", described(t));
        return t;
    }

    // --- what values there will be

    void describe_input(size_t i, const Tensor& x) {
        STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1, kOp, ": input ", i, " must be on the CPU, got ", described(x));
        Value& v = values_[bounded(i, static_cast<int64_t>(values_.size()))];
        const bool features = next() != 0;
        STD_TORCH_CHECK(features || x.dim() == 3 || x.dim() == 4, kOp, ": input ", i, " has the shape ", shape_of(x));
        v.form = features ? Form::features : x.dim() == 3 ? Form::sequences : Form::images;
        v.dtype = x.scalar_type();
        v.given = true;
        STD_TORCH_CHECK(v.codes() || is_floating(v.dtype), kOp, ": input ", i, " is ", described(x));
        if (features) {
            leading_.push_back({x.sizes().begin(), x.sizes().end() - 1});
            v.leading = &leading_.back();
            int64_t rows = 1;
            for (int64_t size : *v.leading) rows *= size;
            v.images = {rows, x.size(x.dim() - 1), 1, 1};
        } else {
            v.images = {x.size(0), x.size(1), x.dim() == 3 ? 1 : x.size(2), x.size(x.dim() - 1)};
        }
        inputs_.push_back({{x.sizes().begin(), x.sizes().end()}, true});
    }

    // An input as steps read it, and whether its channels lie beside each other. Codes must; values may, or else lie
    // as they usually do.
    std::pair<Tensor, bool> laid_out(Tensor x, size_t i) const {
        const Value& v = values_[i];
        const bool features = v.form == Form::features;
        bool beside = features ? x.is_contiguous() : is_channels_last(x);
        if (!beside && (v.codes() || !x.is_contiguous())) {
            x = torch::stable::contiguous(x);
            beside = features || v.codes();
            if (!features && v.codes()) x = beside_each_other(x, v);
        }
        return {x, beside};
    }

    static Tensor beside_each_other(const Tensor& x, const Value& v) {
        const Tensor y = empty_strided(v.sizes(), v.strides(), v.dtype, x);
        const int64_t plane = v.size().area();
        const uint8_t* from = x.const_data_ptr<uint8_t>();
        uint8_t* to = y.mutable_data_ptr<uint8_t>();
        for (int64_t n = 0; n < v.images[0]; ++n, from += plane * v.channels(), to += plane * v.channels())
            simd::run<Interleave>(from, plane, v.channels(), to);
        return y;
    }

    void put(int64_t number, const Value& v) {
        Value& to = values_[bounded(number, static_cast<int64_t>(values_.size()))];
        STD_TORCH_CHECK(to.form == Form::none, kOp, ": value ", number, " is made twice");
        const auto& [n, channels, height, width] = v.images;
        STD_TORCH_CHECK(product_below(kOutputs, {n, channels, height, width}), kOp, ": value ", number,
                        " is too large: ", list_of(v.images));
        to = v;
        to.made = to.last = steps_.size() - 1;
        order_.push_back(number);
    }
    const Value& read(int64_t number) {
        Value& v = value(number);
        STD_TORCH_CHECK(v.codes(), kOp, ": value ", number, " has no codes");
        v.last = steps_.size() - 1;
        return v;
    }

    void plan_step() {
        const int64_t kind = next();
        Planned& step = steps_.emplace_back();
        step.kind = kind;
        switch (kind) {
            case kQuantize: {
                step.fields = fields(sizeof(Quantizing) / sizeof(int64_t));
                const Quantizing& q = quantizing(step);
                Value& v = value(q.source);
                STD_TORCH_CHECK(!v.codes(), kOp, ": value ", q.source, " has codes already");
                v.last = steps_.size() - 1;
                return put(q.out, v.with(v.channels(), v.size()));
            }
            case kConvolve: {
                step.fields = fields(sizeof(Convolving) / sizeof(int64_t));
                const Convolving& c = convolving(step);
                const Value& v = read(c.source);
                step.shape = conv_shape(kOp, v.images, bounded(c.outputs, kLimit), c.kernel, c.stride, c.padding,
                                        c.dilation, c.groups, 0);
                STD_TORCH_CHECK(v.form != Form::features || step.shape.out.area() == 1, kOp,
                                ": features have no images");
                STD_TORCH_CHECK(v.form != Form::sequences || step.shape.out.height == 1, kOp,
                                ": sequences have no rows");
                Value y = v.with(c.outputs, step.shape.out);
                if (c.residual >= 0)
                    STD_TORCH_CHECK(read(c.residual).images == y.images, kOp, ": value ", c.residual,
                                    " has another shape than what it is added to");
                if (c.also >= 0) put(c.also, y);
                if (c.values) y.dtype = program_->dtype;
                return put(c.out, y);
            }
            case kMaxPool: {
                step.fields = fields(sizeof(Pooling) / sizeof(int64_t));
                const Pooling& p = pooling(step);
                const Value& v = read(p.source);
                STD_TORCH_CHECK(v.form != Form::features, kOp, ": features have no images");
                step.pool = pool_problem(kOp, v.images, p.kernel, p.stride, p.padding, p.dilation, p.ceil_mode != 0);
                STD_TORCH_CHECK(v.form != Form::sequences || step.pool.out.height == 1, kOp,
                                ": sequences have no rows");
                if (join_pools()) read(p.source);
                return put(p.out, v.with(v.channels(), steps_.back().pool.out));
            }
            case kConcatenate: {
                step.fields = fields(1);
                const Numbers sources = list();
                STD_TORCH_CHECK(!sources.empty(), kOp, ": nothing is put side by side");
                const Value& first = value(sources[0]);
                int64_t channels = 0;
                for (int64_t s : sources) {
                    const Value& v = read(s);
                    channels += v.channels();
                    std::array<int64_t, 4> images = v.images;
                    images[1] = first.channels();
                    STD_TORCH_CHECK(images == first.images && v.form == first.form, kOp, ": value ", s,
                                    " has another shape than what it is put beside");
                }
                return put(step.fields[0], first.with(channels, first.size()));
            }
            case kFlatten: {
                step.fields = fields(2);
                const Value& v = read(step.fields[0]);
                STD_TORCH_CHECK(v.form != Form::features, kOp, ": features are flat already");
                Value y = v.with(v.channels() * v.size().area(), {1, 1});
                leading_.push_back({v.images[0]});
                y.leading = &leading_.back();
                y.form = Form::features;
                return put(step.fields[1], y);
            }
            default: STD_TORCH_CHECK(false, kOp, ": the code has a step of no kind");
        }
    }

    // Makes one step of the last two if these pool both outputs of a convolution in the same way.
    bool join_pools() {
        if (steps_.size() < 3) return false;
        const Planned &step = steps_.end()[-1], &made = steps_.end()[-3];
        Planned& before = steps_.end()[-2];
        if (before.kind != kMaxPool || before.joined || made.kind != kConvolve) return false;
        const Convolving& c = convolving(made);
        const Pooling &p = pooling(before), &other = pooling(step);
        const bool both =
            (p.source == c.out && other.source == c.also) || (p.source == c.also && other.source == c.out);
        if (!both || !std::equal(p.kernel, &p.ceil_mode + 1, other.kernel)) return false;
        before.joined = step.fields;
        steps_.pop_back();
        return true;
    }

    // --- chains (chain_step.h)

    // Steps that follow each other and are executed as one: in most cases a single one.
    struct Chained {
        size_t first, last;
        int64_t rows = 0;
        uint8_t* memory = nullptr;
    };

    // What a step reads, but for a residual, and what it makes.
    static std::vector<int64_t> inputs_of(const Planned& step) {
        if (step.kind == kConcatenate) return {step.fields + 2, step.fields + 2 + step.fields[1]};
        std::vector<int64_t> inputs = {step.fields[0]};
        if (step.joined) inputs.push_back(pooling(step.joined).source);
        return inputs;
    }
    static std::vector<int64_t> outputs_of(const Planned& step) {
        if (step.kind == kConcatenate) return {step.fields[0]};
        if (step.kind != kConvolve && !step.joined) return {step.fields[1]};
        if (step.joined) return {pooling(step).out, pooling(step.joined).out};
        const Convolving& c = convolving(step);
        return c.also >= 0 ? std::vector{c.out, c.also} : std::vector{c.out};
    }
    static int64_t weights_of(const Planned& step) {
        if (step.kind != kConvolve) return 0;
        return step.shape.out_channels * step.shape.kernel.area() * step.shape.group_channels();
    }
    static int64_t residual_of(const Planned& step) {
        return step.kind == kConvolve ? convolving(step).residual : -1;
    }

    // Which outputs of step i are the inputs of the next one.
    std::vector<int64_t> passed(size_t i) const {
        const std::vector<int64_t> outputs = outputs_of(steps_[i]);
        std::vector<int64_t> passed;
        for (int64_t input : inputs_of(steps_[i + 1]))
            passed.push_back(std::find(outputs.begin(), outputs.end(), input) - outputs.begin());
        return passed;
    }

    // Step i + 1 reads what step i makes, and nobody else does.
    bool linked(size_t i) const {
        if (i + 1 == front_) return false;  // which is of fewer images
        const Planned &step = steps_[i], &next = steps_[i + 1];
        if (step.kind != kConvolve || (next.kind != kConvolve && next.kind != kMaxPool)) return false;
        const std::vector<int64_t> made = outputs_of(step);
        const auto has_codes = [&](int64_t v) { return values_[v].codes() && values_[v].numel() > 0; };
        const auto is_passed = [&](int64_t v) {
            return std::ranges::count(made, v) && v != residual_of(next) && values_[v].last == i + 1;
        };
        return std::ranges::all_of(made, has_codes) && std::ranges::all_of(outputs_of(next), has_codes) &&
               std::ranges::all_of(inputs_of(next), is_passed);
    }

    bool makes_chain(size_t first, size_t last) const {
        const Geometry& outputs = steps_[last].geometry();
        int64_t weights = 0, tall = 0;
        bool read_by_others = false;  // what a step before makes
        for (size_t i = first; i <= last; ++i) {
            const Planned& step = steps_[i];
            const Geometry& geometry = step.geometry();
            weights += weights_of(step);
            tall += step.kind == kConvolve && geometry.kernel.height > 1;
            // Rows that others read must be made once each: those that a task of the chain is for.
            const bool exact =
                geometry.kernel.height == 1 && geometry.stride.height == 1 && geometry.padding.height == 0;
            if (read_by_others && !exact) return false;
            read_by_others |= i < last && outputs_of(step).size() > inputs_of(steps_[i + 1]).size();
            // The rows of a residual must be there.
            const int64_t residual = residual_of(step);
            if (i > first && residual >= static_cast<int64_t>(inputs_.size()) && values_[residual].made >= first)
                return false;
        }
        // Rows that overlap are computed twice where threads meet, which those before a pooling are worth; every task
        // reads all weights.
        return tall <= 1 && weights <= kChainWeights && outputs.batch * outputs.out.height >= Chain::tasks_wanted();
    }

    // Joins what has most between first.
    void find_chains() {
        for (size_t i = 0; i < steps_.size(); ++i) chains_.push_back({i, i});
        for (Value& v : values_) v.from = v.made, v.until = v.last, v.between = false;
        std::vector<std::pair<int64_t, size_t>> links;
        for (size_t i = 0; i + 1 < steps_.size(); ++i) {
            if (!linked(i)) continue;
            int64_t bytes = 0;
            for (int64_t v : inputs_of(steps_[i + 1])) bytes += values_[v].bytes();
            links.emplace_back(-bytes, i);
        }
        std::sort(links.begin(), links.end());
        for (const auto& [bytes, i] : links) {
            const size_t first = chains_[i].first, last = chains_[i + 1].last;
            if (!makes_chain(first, last)) continue;
            for (size_t j = first; j <= last; ++j) chains_[j] = {first, last};
        }
        for (size_t i = 0; i < steps_.size(); i = chains_[i].last + 1) {
            const size_t first = chains_[i].first, last = chains_[i].last;
            if (first == last) continue;
            for (size_t j = first; j <= last; ++j) {
                const auto read = [&](int64_t v) { values_[v].until = std::max(values_[v].until, last); };
                for (int64_t v : inputs_of(steps_[j])) {
                    read(v);
                    values_[v].between = j > first;
                }
                if (residual_of(steps_[j]) >= 0) read(residual_of(steps_[j]));
                for (int64_t v : outputs_of(steps_[j])) values_[v].from = first;
            }
            chains_[i].rows = Chain::rows_of(readers_of(chains_[i]));
        }
    }

    std::vector<Chain::Reader> readers_of(const Chained& chain) const {
        std::vector<Chain::Reader> readers;
        for (size_t i = chain.first; i <= chain.last; ++i)
            readers.push_back({&steps_[i].geometry(), static_cast<int64_t>(inputs_of(steps_[i]).size())});
        return readers;
    }

    void make_chain(const Chained& chain) {
        const size_t begin = made_.size();
        std::vector<Chain::Part> parts;
        for (size_t i = chain.first; i <= chain.last; ++i) {
            make_step(steps_[i]);
            parts.push_back({nullptr, i < chain.last ? passed(i) : std::vector<int64_t>()});
            parts.back().link.reset(dynamic_cast<const Link*>(made_.back().release()));
        }
        made_.resize(begin);
        make(std::make_unique<Chain>(std::move(parts), chain.rows),
             [&chain](Chain& step) { step.place(chain.memory); });
    }

    // --- the front: steps that are executed for some images after the others

    // Whatever large images are made of is many times their size, but few weights: it stays in the second-level
    // caches if there are no more images at a time than threads. Later there are more weights than values, and these
    // had better meet all images at once. What both take of the memory behind the caches is compared, step by step.
    void find_front() {
        if (!best_tiles().matrices) return;  // products take longer than memory does
        int64_t group = std::min(images_, threads_);
        while (group > 0 && images_ % group) --group;
        if (2 * group < threads_ || group == images_) return;  // all threads are entered for each
        const double runs = static_cast<double>(images_ / group);
        double gain = 0.0, most = runs * kRunBytes;
        size_t end = 0;
        for (size_t i = 0; i < steps_.size(); i = chains_[i].last + 1) {
            double values = 0.0, weights = 0.0;
            const auto touch = [&](int64_t number) {
                if (number >= 0 && !values_[number].given && !values_[number].between)
                    values += static_cast<double>(values_[number].bytes());
            };
            for (size_t j = i; j <= chains_[i].last; ++j) {
                for (int64_t number : inputs_of(steps_[j])) touch(number);
                for (int64_t number : outputs_of(steps_[j])) touch(number);
                touch(residual_of(steps_[j]));
                weights += static_cast<double>(weights_of(steps_[j]));
            }
            gain += std::max(0.0, values - static_cast<double>(threads_ * kCacheBytes)) - (runs - 1.0) * weights;
            if (gain > most) {
                most = gain;
                end = chains_[i].last + 1;
            }
        }
        if (end == 0) return;
        set_front(end, group);
        plan();
    }

    void set_front(size_t end, int64_t group) {
        for (size_t i = 0; i < std::max(front_, end); ++i) steps_[i].set_images(i < end ? group : images_);
        front_ = end;
        group_ = group;
    }

    // Whether a value is made in the front and read behind it.
    bool crosses(const Value& v) const { return v.made < front_ && v.last >= front_; }

    // Executes the front, image group by image group.
    void execute_front() {
        for (int64_t i = 0; i < images_ / group_; ++i) {
            for (size_t n = 0; n < values_.size(); ++n)
                if (values_[n].given || crosses(values_[n]))
                    front_values_[n].data = values_[n].data + i * front_values_[n].bytes();
            values_.swap(front_values_);
            for (const auto& place : front_placing_) place();
            values_.swap(front_values_);
            front_ready_->run();
        }
    }

    // --- places

    void plan() {
        chains_.clear();
        find_chains();
        front_values_.clear();
        if (front_ > 0) front_values_ = values_;
        for (Value& v : front_values_)
            if (v.form != Form::none) v.images[0] = group_;
        arena_ = {};
        places_.clear();
        for (int64_t number : order_) {
            Value& v = values_[number];
            if (crosses(v) && !v.given) places_.emplace_back(&v.data, arena_.place(v.bytes(), 0, v.until));
        }
        size_t next = 0;  // step whose chain has no memory yet
        for (int64_t number : order_) {
            Value& v = values_[number].made < front_ ? front_values_[number] : values_[number];
            for (; next <= v.from; next = chains_[next].last + 1) {
                Chained& chain = chains_[next];
                if (chain.first == chain.last) continue;
                const int64_t bytes = threads_ * Chain::bytes_of(readers_of(chain), chain.rows);
                places_.emplace_back(&chain.memory, arena_.place(bytes, chain.first, chain.last));
            }
            if (!v.given && !v.between && !crosses(v))
                places_.emplace_back(&v.data, arena_.place(v.bytes(), v.from, v.until));
        }
    }

    void execute(const Tensor& like, bool remake) {
        if (remake) {
            values_.swap(front_values_);
            make_steps(0, front_);
            values_.swap(front_values_);
            front_placing_ = std::exchange(placing_, {});
            front_ready_.emplace(std::exchange(made_, {}));
            make_steps(front_, steps_.size());
            ready_.emplace(std::exchange(made_, {}));
        }
        const Tensor memory = empty_vector(arena_.size() + simd::kLine, ScalarType::Byte, like);
        uint8_t* begin = memory.mutable_data_ptr<uint8_t>();
        begin += -reinterpret_cast<uintptr_t>(begin) & (simd::kLine - 1);
        for (const auto& [data, at] : places_) *data = begin + at;
        if (front_ > 0) execute_front();
        for (const auto& place : placing_) place();
        ready_->run();
    }

    void make_steps(size_t begin, size_t end) {
        made_.clear();
        placing_.clear();
        for (size_t i = begin; i < end; i = chains_[i].last + 1)
            chains_[i].last > i ? make_chain(chains_[i]) : make_step(steps_[i]);
    }

    // Takes a step, and how it is told where values lie.
    template <class S, class F>
    void make(std::unique_ptr<S> step, const F& place) {
        placing_.push_back([place, to = step.get()] { place(*to); });
        made_.push_back(std::move(step));
    }

    // --- images some at a time

    // Plans some images after the others, and calls f for each plan.
    template <class F>
    void for_images(const F& f) {
        const std::vector<Value> values = values_;
        const std::vector<Planned> steps = steps_;
        const int64_t all = images_;
        int64_t together = std::max<int64_t>(1, all * kArenaBytes / arena_.size());
        if (together > threads_) together -= together % threads_;
        for (int64_t begin = 0, end; begin < all; begin = end) {
            end = std::min(begin + together, all);
            values_ = values;
            steps_ = steps;
            images_ = end - begin;
            take_images(begin, end);
            set_front(0, images_);
            plan();
            find_front();
            f();
        }
        images_ = all;
    }

    // How many images there are, if all values have as many, else 0.
    int64_t images_of_all() const {
        const int64_t images = values_[0].images[0];
        for (size_t i = 1; i < inputs_.size(); ++i)
            if (values_[i].images[0] != images) return 0;
        return images;
    }

    // Lets values and steps be those of some images.
    void take_images(int64_t begin, int64_t end) {
        for (Value& v : values_) {
            if (v.given && v.data) v.data += v.bytes() / v.images[0] * begin;
            v.images[0] = end - begin;
        }
        for (Planned& step : steps_) step.set_images(end - begin);
    }

    // --- the steps: their fields in the code, and what executes them

    struct Quantizing {
        int64_t source, out, constant;
    };
    struct Convolving {
        int64_t source, residual, out, also, weight, prepared, outputs, kernel[2], stride[2], padding[2], dilation[2],
            groups, span, values;
    };
    struct Pooling {
        int64_t source, out, kernel[2], stride[2], padding[2], dilation[2], ceil_mode;
    };
    static const Quantizing& quantizing(const Planned& p) { return *reinterpret_cast<const Quantizing*>(p.fields); }
    static const Convolving& convolving(const Planned& p) { return *reinterpret_cast<const Convolving*>(p.fields); }
    static const Pooling& pooling(const Planned& p) { return pooling(p.fields); }
    static const Pooling& pooling(const int64_t* fields) { return *reinterpret_cast<const Pooling*>(fields); }

    void make_step(const Planned& step) {
        switch (step.kind) {
            case kQuantize: return quantize(quantizing(step));
            case kConvolve: return convolve(convolving(step), step.shape);
            case kMaxPool: return pool(step);
            case kConcatenate: {
                const Value& y = value(step.fields[0]);
                if (y.numel() == 0) return;
                std::vector<const Value*> sources;
                for (int64_t s : inputs_of(step)) sources.push_back(&value(s));
                return make(std::make_unique<ConcatenateStep>(y),
                            [sources, &y](ConcatenateStep& made) { made.place(sources, y); });
            }
            default: {
                const Value &x = value(step.fields[0]), &y = value(step.fields[1]);
                if (y.numel() > 0)
                    make(std::make_unique<FlattenStep>(x), [&x, &y](FlattenStep& made) { made.place(x, y); });
            }
        }
    }

    void quantize(const Quantizing& q) {
        const Value &x = value(q.source), &y = value(q.out);
        const Tensor& scale = constant(q.constant, ScalarType::Float);
        const QuantizerArguments arguments(kOp, scale, scale, constant(q.constant + 1, ScalarType::Int),
                                           constant(q.constant + 2, ScalarType::Byte), y.channels());
        const bool beside = q.source < static_cast<int64_t>(inputs_.size()) ? inputs_[q.source].beside : true;
        if (y.numel() == 0) return;
        dispatch_floating(x.dtype, [&](auto type) {
            using Made = QuantizeStep<decltype(type)>;
            make(std::make_unique<Made>(beside, y, arguments.table()), [&x, &y](Made& made) { made.place(x, y); });
        });
    }

    template <class T>
    ConvCall<T> call(const Convolving& c) const {
        const auto data = [&](int64_t number) { return number >= 0 ? values_[number].data : nullptr; };
        return {data(c.source), data(c.residual), reinterpret_cast<T*>(data(c.out)), data(c.also)};
    }

    void convolve(const Convolving& c, const ConvShape& shape) {
        const Tensor &weight = constant(c.weight, ScalarType::Char), &bytes = constant(c.prepared, ScalarType::Byte);
        const std::array<int64_t, 4> panels = {shape.groups * shape.panels_per_group(), shape.panel_words(),
                                               kPanelOutputs, kWordChannels};
        const std::array<int64_t, 2> rows = {shape.kernel.area(), shape.channels};
        const Numbers weights = shape.depthwise() ? Numbers(rows) : Numbers(panels), found = weight.sizes();
        STD_TORCH_CHECK(std::equal(weights.begin(), weights.end(), found.begin(), found.end()), kOp,
                        ": a weight must have the shape ", list_of(weights), ", got ", shape_of(weight));
        STD_TORCH_CHECK(c.span != 0 && -kLimit <= c.span && c.span <= kLimit, kOp, ": a span is ", c.span);
        if (value(c.out).numel() == 0) return;
        auto layer = std::make_unique<ConvLayer>(
            shape, c.span, weight.const_data_ptr<int8_t>(),
            std::span(bytes.const_data_ptr<uint8_t>(), static_cast<size_t>(bytes.numel())));
        STD_TORCH_CHECK(layer->returns_codes() == (c.values == 0) && layer->has_also() == (c.also >= 0) &&
                            layer->has_residual() == (c.residual >= 0),
                        kOp, ": a layer was prepared for other outputs");
        dispatch_output(value(c.out).dtype, [&](auto type) {
            using Made = Convolution<decltype(type)>;
            make(std::make_unique<Made>(std::move(layer), shape),
                 [this, &c](Made& made) { made.place(call<decltype(type)>(c)); });
        });
    }
    template <class F>
    static void dispatch_output(ScalarType dtype, const F& f) {
        dtype == ScalarType::Byte ? f(uint8_t{}) : dispatch_floating(dtype, f);
    }

    void pool(const Planned& step) {
        if (value(pooling(step).out).numel() == 0) return;
        make(std::make_unique<MaxPool>(step.pool), [this, &step](MaxPool& made) {
            std::vector<PoolCall> calls;
            for (const int64_t* fields : {step.fields, step.joined})
                if (fields)
                    calls.push_back({values_[pooling(fields).source].data, values_[pooling(fields).out].data});
            made.place(std::move(calls));
        });
    }

    struct Input {
        std::vector<int64_t> sizes;
        bool beside;  // whether its channels lie beside each other
    };

    const std::shared_ptr<const Program> program_;
    const int64_t threads_;
    size_t at_ = 0;  // the next number of the code
    std::vector<Value> values_;
    Numbers results_;  // which values are
    std::vector<Input> inputs_;
    std::deque<std::vector<int64_t>> leading_;  // sizes that features share
    std::vector<int64_t> order_;                // in which values are made
    std::vector<Planned> steps_;
    std::vector<Chained> chains_;  // that each step belongs to
    Arena arena_;
    std::vector<std::pair<uint8_t**, int64_t>> places_;  // in it
    int64_t images_ = 0;                                 // that all values have
    bool whole_ = true;                                  // they are executed together
    size_t front_ = 0;                 // the first step that is not executed for some images after the others
    int64_t group_ = 0;                // how many at a time
    std::vector<Value> front_values_;  // as its steps see them
    std::vector<std::function<void()>> front_placing_;
    std::optional<Steps> front_ready_;
    std::vector<std::unique_ptr<const Step>> made_;
    std::vector<std::function<void()>> placing_;  // tells each where values lie
    std::optional<Steps> ready_;
};

// Programs that are called again and again. What one does with inputs of some sizes is kept, too, for a few of them.
class KeptPrograms {
public:
    // Never destroyed: at its end a process may have no Python left, which tensors belong to.
    static KeptPrograms& all() {
        static KeptPrograms& programs = *new KeptPrograms;
        return programs;
    }

    int64_t keep(std::shared_ptr<const Program> program) {
        const std::lock_guard lock(mutex_);
        kept_.emplace(++last_, Kept{std::move(program), {}});
        return last_;
    }
    void drop(int64_t number) {
        const Kept dropped = [&] {
            const std::lock_guard lock(mutex_);
            auto found = kept_.extract(number);
            return found ? std::move(found.mapped()) : Kept{};
        }();
    }

    // An execution is for one thread at a time: it is taken, and given back.
    std::unique_ptr<Execution> take(int64_t number, const std::vector<Tensor>& inputs) {
        std::shared_ptr<const Program> program;
        {
            const std::lock_guard lock(mutex_);
            const auto found = kept_.find(number);
            STD_TORCH_CHECK(found != kept_.end(), "run_layers: no layers are kept by the number ", number);
            auto& idle = found->second.idle;
            for (size_t i = idle.size(); i-- > 0;)
                if (idle[i]->suits(inputs)) {
                    auto execution = std::move(idle[i]);
                    idle.erase(idle.begin() + static_cast<std::ptrdiff_t>(i));
                    return execution;
                }
            program = found->second.program;
        }
        return std::make_unique<Execution>(std::move(program), inputs);
    }
    void give_back(int64_t number, std::unique_ptr<Execution> execution) {
        std::unique_ptr<Execution> oldest;
        const std::lock_guard lock(mutex_);
        const auto found = kept_.find(number);
        if (found == kept_.end()) return;
        auto& idle = found->second.idle;
        idle.push_back(std::move(execution));
        if (idle.size() <= kMostIdle) return;
        oldest = std::move(idle.front());
        idle.erase(idle.begin());
    }

private:
    struct Kept {
        std::shared_ptr<const Program> program;
        std::vector<std::unique_ptr<Execution>> idle;  // those that were used last at the end
    };
    static constexpr size_t kMostIdle = 8;

    // A process that is forked while another thread holds the lock would wait for it for ever.
    KeptPrograms() {
        pthread_atfork([] { all().mutex_.lock(); }, [] { all().mutex_.unlock(); }, [] { all().mutex_.unlock(); });
    }

    std::mutex mutex_;
    std::map<int64_t, Kept> kept_;
    int64_t last_ = 0;
};

std::shared_ptr<const Program> program_of(std::vector<Tensor> constants, std::vector<int64_t> code, int64_t dtype) {
    return std::make_shared<const Program>(std::move(constants), std::move(code), floating_type(kOp, dtype));
}

std::vector<Tensor> run_layers(std::vector<Tensor> inputs, std::vector<Tensor> constants, std::vector<int64_t> code,
                               int64_t dtype) {
    STD_TORCH_CHECK(!inputs.empty(), kOp, ": there is no input");
    return Execution(program_of(std::move(constants), std::move(code), dtype), inputs).run(inputs);
}

// The bytes that run_layers takes with these arguments beside them and its results.
int64_t memory_of_layers(std::vector<Tensor> inputs, std::vector<Tensor> constants, std::vector<int64_t> code,
                         int64_t dtype) {
    STD_TORCH_CHECK(!inputs.empty(), kOp, ": there is no input");
    return Execution(program_of(std::move(constants), std::move(code), dtype), inputs).memory();
}

// Keeps what run_layers takes beside its inputs, and returns the number it is kept by.
int64_t keep_layers(std::vector<Tensor> constants, std::vector<int64_t> code, int64_t dtype) {
    return KeptPrograms::all().keep(program_of(std::move(constants), std::move(code), dtype));
}

// run_layers of what is kept by a number.
std::vector<Tensor> run_kept_layers(std::vector<Tensor> inputs, int64_t number) {
    STD_TORCH_CHECK(!inputs.empty(), kOp, ": there is no input");
    auto execution = KeptPrograms::all().take(number, inputs);
    std::vector<Tensor> outputs = execution->run(inputs);
    if (execution->whole()) KeptPrograms::all().give_back(number, std::move(execution));
    return outputs;
}

// Lets go of what is kept by the number that a tensor holds.
void drop_layers(const Tensor& number) { KeptPrograms::all().drop(number.const_data_ptr<int64_t>()[0]); }

// What run_layers needs of a call of conv2d_integer but for its weight: as bytes. Of x the first pixel counts: the
// largest codes that the channels may have.
Tensor prepare_layer(const Tensor& x, const Tensor& weight, std::optional<Tensor> zero_sums, const Tensor& scale,
                     const Tensor& bias, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                     std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, int64_t low_bytes,
                     std::optional<int64_t> span, double negative_slope, std::optional<double> upper,
                     std::optional<Tensor> residual, std::optional<Tensor> residual_scale,
                     std::optional<Tensor> residual_zero_point, TensorsOrNone out_scale, TensorsOrNone out_zero_point,
                     TensorsOrNone out_bits, TensorsOrNone out_starts, NumbersOrNone out_bytes,
                     std::optional<int64_t> dtype) {
    const ConvArguments arguments(x, weight, zero_sums, scale, bias, kernel_size, stride, padding, dilation, groups,
                                  low_bytes, span, negative_slope, upper, residual, residual_scale,
                                  residual_zero_point, out_scale, out_zero_point, out_bits, out_starts, out_bytes,
                                  dtype);
    const ConvProblem& problem = arguments.problem;
    STD_TORCH_CHECK(!problem.shape.packed() && !problem.out_packing.starts && !problem.also_packing.starts,
                    "prepare_layer: codes are packed");
    const ConvLayer layer(problem, true);
    const Tensor bytes = empty_vector(static_cast<int64_t>(layer.bytes().size()), ScalarType::Byte, x);
    std::memcpy(bytes.mutable_data_ptr<uint8_t>(), layer.bytes().data(), layer.bytes().size());
    return bytes;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ptq4cuda, CPU, m) {
    m.impl("prepare_layer", TORCH_BOX(&prepare_layer));
    m.impl("run_layers", TORCH_BOX(&run_layers));
    m.impl("memory_of_layers", TORCH_BOX(&memory_of_layers));
    m.impl("keep_layers", TORCH_BOX(&keep_layers));
    m.impl("run_layers.kept", TORCH_BOX(&run_kept_layers));
    m.impl("drop_layers", TORCH_BOX(&drop_layers));
}

}  // namespace ptq4cuda
