// prepare_layer and run_layers: the integer part of a network as one operator. Its steps are executed one after
// another without a word of Python, values lie in one block of memory that is planned before, and threads are entered
// once (steps.h).
//
// The steps come as numbers (ptq4cuda/ops/layers.py writes and explains them), which may be anything: whatever they
// say, nothing is read or written outside of the tensors.
#include <array>
#include <deque>
#include <map>
#include <span>

#include "chain_step.h"
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
    bool between = false;                           // the convolutions of a chain: has no place of its own
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
    QuantizeStep(const T* x, bool beside, const Value& y, const QuantizerTable& table)
        : x_(x), y_(y.data), channels_(y.channels()), pixels_(y.rows()) {
        if (beside || channels_ == 1) {
            whole_.emplace_back(ChannelLayout{pixels_, channels_, 1}, table);
        } else {
            plane_ = y.size().area();
            for (int64_t c = 0; c < channels_; ++c) whole_.emplace_back(ChannelLayout{1, 1, plane_}, table.at(c));
        }
        pixels_per_task_ = std::max<int64_t>(kTaskCodes / channels_, 1);
        tasks_ = plane_ ? pixels_ / plane_ * ceil_div(plane_, pixels_per_task_) : ceil_div(pixels_, pixels_per_task_);
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
            uint8_t* codes = scratch.at_least(count * channels_);
            for (int64_t c = 0; c < channels_; ++c)
                whole_[c](x_ + (image * channels_ + c) * plane_ + begin, codes + c * count, begin, begin + count);
            simd::run<Interleave>(static_cast<const uint8_t*>(codes), count, channels_,
                                  y_ + (image * plane_ + begin) * channels_);
        }
    }

private:
    static constexpr int64_t kTaskCodes = 1 << 14;

    const T* x_;
    uint8_t* y_;
    int64_t channels_, pixels_;
    int64_t plane_ = 0;  // pixels of an image, where channels come apart
    int64_t pixels_per_task_, tasks_;
    std::vector<Rows<Quantize, T, uint8_t>> whole_;  // or one for each channel
};

// Copies rows of bytes: what each source has of a pixel to its place in the pixel.
class ConcatenateStep : public Step {
public:
    struct Source {
        const uint8_t* data;
        int64_t channels;
    };
    ConcatenateStep(std::vector<Source> sources, const Value& y)
        : sources_(std::move(sources)), y_(y.data), channels_(y.channels()), pixels_(y.rows()) {
        pixels_per_task_ = kTaskCodes / channels_ + 1;
    }

    int64_t tasks() const override { return ceil_div(pixels_, pixels_per_task_); }

    void run(Tasks& tasks, Scratch&) const override {
        for (int64_t task; (task = tasks.take()) >= 0;) {
            const int64_t begin = task * pixels_per_task_, end = std::min(pixels_, begin + pixels_per_task_);
            int64_t at = 0;
            for (const Source& source : sources_) {
                for (int64_t p = begin; p < end; ++p)
                    std::memcpy(y_ + p * channels_ + at, source.data + p * source.channels, source.channels);
                at += source.channels;
            }
        }
    }

private:
    static constexpr int64_t kTaskCodes = 1 << 16;

    std::vector<Source> sources_;
    uint8_t* y_;
    int64_t channels_, pixels_, pixels_per_task_;
};

// [N, pixels, C] to [N, C, pixels].
class FlattenStep : public Step {
public:
    FlattenStep(const Value& x, const Value& y)
        : x_(x.data), y_(y.data), images_(x.images[0]), channels_(x.channels()), pixels_(x.size().area()) {}

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
    const uint8_t* x_;
    uint8_t* y_;
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

class Execution {
public:
    Execution(const std::vector<Tensor>& inputs, const std::vector<Tensor>& constants,
              const std::vector<int64_t>& code, ScalarType dtype)
        : inputs_(inputs), constants_(constants), code_(code), dtype_(dtype) {}

    std::vector<Tensor> run() {
        const std::vector<Tensor> outputs = begin();
        for_images([&] { execute(); });
        return outputs;
    }

    // Bytes of the memory that values lie in meanwhile.
    int64_t memory() {
        const std::vector<Tensor> outputs = begin();
        int64_t most = 0;
        for_images([&] { most = std::max(most, arena_.size()); });
        return most;
    }

private:
    static constexpr int64_t kMostValues = 1 << 20;
    static constexpr size_t kLeastNumbers = 3;  // of a step
    // Images whose values take more are executed some at a time. From 32 MiB on, memory is handed out anew by the
    // system in each call, page by page, which takes as long as a fifth of a network.
    static constexpr int64_t kArenaBytes = 28 << 20;

    // A step as it was read.
    struct Planned {
        int64_t kind;
        const int64_t* fields;
        union {
            ConvShape shape;
            PoolProblem pool;
        };
    };

    // Reads the code, and returns what there will be results in.
    std::vector<Tensor> begin() {
        values_.resize(bounded(next(), kMostValues));
        const Numbers results = list();
        for (size_t i = 0; i < inputs_.size(); ++i) take_input(i);
        steps_.reserve((code_.size() - at_) / kLeastNumbers + 1);
        while (at_ < code_.size()) plan_step();
        std::vector<Tensor> outputs;
        for (int64_t r : results) {
            Value& v = value(r);
            STD_TORCH_CHECK(r >= static_cast<int64_t>(inputs_.size()) && v.last < steps_.size(), kOp, ": value ", r,
                            " is an input, or returned twice");
            v.last = steps_.size();
        }
        for (int64_t r : results) {
            Value& v = value(r);
            outputs.push_back(empty_strided(v.sizes(), v.strides(), v.dtype, inputs_.at(0)));
            v.data = static_cast<uint8_t*>(outputs.back().data_ptr());
        }
        return outputs;
    }

    // --- reading numbers

    int64_t next() {
        STD_TORCH_CHECK(at_ < code_.size(), kOp, ": the code ends within a step");
        return code_[at_++];
    }
    static int64_t bounded(int64_t number, int64_t limit) {
        STD_TORCH_CHECK(0 <= number && number < limit, kOp, ": ", number, " in the code must be less than ", limit);
        return number;
    }
    Numbers list() {
        const int64_t count = next();
        at_ += bounded(count, static_cast<int64_t>(code_.size() - at_) + 1);
        return {code_.data() + at_ - count, static_cast<size_t>(count)};
    }
    // So many numbers that follow.
    const int64_t* fields(size_t count) {
        STD_TORCH_CHECK(count <= code_.size() - at_, kOp, ": the code ends within a step");
        at_ += count;
        return code_.data() + at_ - count;
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
        const Tensor& t = constants_[bounded(number, static_cast<int64_t>(constants_.size()))];
        STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == type && t.is_contiguous(), kOp, ": constant ", number,
                        " must be ", name_of(type), " and contiguous on the CPU, got ", described(t));
        return t;
    }

    // --- what values there will be

    void take_input(size_t i) {
        Tensor x = inputs_[i];
        STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1, kOp, ": input ", i, " must be on the CPU, got ", described(x));
        Value& v = values_[bounded(i, static_cast<int64_t>(values_.size()))];
        const bool features = next() != 0;
        STD_TORCH_CHECK(features || x.dim() == 3 || x.dim() == 4, kOp, ": input ", i, " has the shape ", shape_of(x));
        v.form = features ? Form::features : x.dim() == 3 ? Form::sequences : Form::images;
        v.dtype = x.scalar_type();
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
        // Codes must have their channels beside each other; so may values, or else lie as they usually do.
        bool beside = features ? x.is_contiguous() : is_channels_last(x);
        if (!beside && (v.codes() || !x.is_contiguous())) {
            x = torch::stable::contiguous(x);
            beside = features || v.codes();
            if (!features && v.codes()) x = beside_each_other(x, v);
        }
        beside_.push_back(beside);
        held_.push_back(x);
        v.data = static_cast<uint8_t*>(x.data_ptr());
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
                if (c.values) y.dtype = dtype_;
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
                return put(p.out, v.with(v.channels(), step.pool.out));
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

    // --- chains of convolutions (chain_step.h)

    // Steps that follow each other and are executed as one: in most cases a single one.
    struct Chained {
        size_t first, last;
        int64_t rows = 0;
        uint8_t* memory = nullptr;
    };

    // Step i + 1 reads what step i makes, and nobody else does.
    bool linked(size_t i) const {
        if (steps_[i].kind != kConvolve || steps_[i + 1].kind != kConvolve) return false;
        const Convolving &c = convolving(steps_[i]), &next = convolving(steps_[i + 1]);
        const Value& v = values_[next.source];
        return (next.source == c.out || next.source == c.also) && next.residual != next.source && v.last == i + 1 &&
               !c.values && !next.values && v.numel() > 0 && values_[next.out].numel() > 0;
    }

    bool makes_chain(size_t first, size_t last) const {
        const ConvShape& outputs = steps_[last].shape;
        int64_t weights = 0, tall = 0;
        bool read_by_others = false;  // what a step before makes
        for (size_t i = first; i <= last; ++i) {
            const Convolving& c = convolving(steps_[i]);
            const ConvShape& shape = steps_[i].shape;
            weights += shape.out_channels * shape.kernel.area() * shape.group_channels();
            tall += shape.kernel.height > 1;
            // Rows that others read must be made once each: those that a task of the chain is for.
            const bool exact = shape.kernel.height == 1 && shape.stride.height == 1 && shape.padding.height == 0;
            if (read_by_others && !exact) return false;
            read_by_others |= c.also >= 0;
            // The rows of a residual must be there.
            if (i > first && c.residual >= static_cast<int64_t>(inputs_.size()) && values_[c.residual].made >= first)
                return false;
        }
        // Rows that overlap are computed twice where threads meet; every task reads all weights.
        return tall <= 1 && weights <= kChainWeights && outputs.batch * outputs.out.height >= Chain::tasks_wanted();
    }

    // Joins what has most between first.
    void find_chains() {
        for (size_t i = 0; i < steps_.size(); ++i) chains_.push_back({i, i});
        std::vector<std::pair<int64_t, size_t>> links;
        for (size_t i = 0; i + 1 < steps_.size(); ++i)
            if (linked(i)) links.emplace_back(-values_[convolving(steps_[i + 1]).source].bytes(), i);
        std::sort(links.begin(), links.end());
        for (const auto& [bytes, i] : links) {
            const size_t first = chains_[i].first, last = chains_[i + 1].last;
            if (!makes_chain(first, last)) continue;
            for (size_t j = first; j <= last; ++j) chains_[j] = {first, last};
        }
        for (size_t i = 0; i < steps_.size(); i = chains_[i].last + 1) {
            const size_t first = chains_[i].first, last = chains_[i].last;
            for (size_t j = first; j <= last && first < last; ++j) {
                const Convolving& c = convolving(steps_[j]);
                values_[c.source].between = j > first;
                for (int64_t read : {c.source, c.residual})
                    if (read >= 0) values_[read].last = std::max(values_[read].last, last);
                for (int64_t made : {c.out, c.also})
                    if (made >= 0) values_[made].made = first;
            }
            if (first < last) chains_[i].rows = Chain::rows_of(shapes_of(chains_[i]));
        }
    }

    std::vector<const ConvShape*> shapes_of(const Chained& chain) const {
        std::vector<const ConvShape*> shapes;
        for (size_t i = chain.first; i <= chain.last; ++i) shapes.push_back(&steps_[i].shape);
        return shapes;
    }

    void make_chain(const Chained& chain) {
        std::vector<Chain::Link> links;
        for (size_t i = chain.first; i <= chain.last; ++i) {
            const Convolving& c = convolving(steps_[i]);
            const bool also = i < chain.last && convolving(steps_[i + 1]).source == c.also;
            links.push_back({convolution(c, steps_[i].shape, value(c.out).data), also});
        }
        made_.push_back(std::make_unique<Chain>(std::move(links), chain.rows, chain.memory));
    }

    // --- places

    void plan() {
        chains_.clear();
        find_chains();
        arena_ = {};
        places_.clear();
        size_t next = 0;  // step whose chain has no memory yet
        for (int64_t number : order_) {
            Value& v = values_[number];
            for (; next <= v.made; next = chains_[next].last + 1) {
                Chained& chain = chains_[next];
                if (chain.first == chain.last) continue;
                const int64_t bytes =
                    torch::stable::get_num_threads() * Chain::bytes_of(shapes_of(chain), chain.rows);
                places_.emplace_back(&chain.memory, arena_.place(bytes, chain.first, chain.last));
            }
            if (!v.data && !v.between) places_.emplace_back(&v.data, arena_.place(v.bytes(), v.made, v.last));
        }
    }

    void execute() {
        const int64_t bytes = arena_.size() + simd::kLine;
        if (!memory_ || memory_->numel() < bytes) memory_ = empty_vector(bytes, ScalarType::Byte, inputs_.at(0));
        uint8_t* begin = memory_->mutable_data_ptr<uint8_t>();
        begin += -reinterpret_cast<uintptr_t>(begin) & (simd::kLine - 1);
        for (const auto& [data, at] : places_) *data = begin + at;
        made_.reserve(steps_.size());
        for (size_t i = 0; i < steps_.size(); i = chains_[i].last + 1)
            chains_[i].last > i ? make_chain(chains_[i]) : make_step(steps_[i]);
        Steps(std::exchange(made_, {})).run();
    }

    // --- images some at a time

    // Plans all images, or some after the others, and calls f for each plan.
    template <class F>
    void for_images(const F& f) {
        const std::vector<Value> values = values_;
        const std::vector<Planned> steps = steps_;
        plan();
        const int64_t images = images_of_all();
        if (arena_.size() <= kArenaBytes || images < 2) return f();
        const int64_t times = ceil_div(images, std::max<int64_t>(1, images * kArenaBytes / arena_.size()));
        for (int64_t i = 0; i < times; ++i) {
            values_ = values;
            steps_ = steps;
            take_images(images * i / times, images * (i + 1) / times);
            plan();
            f();
        }
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
            if (v.data) v.data += v.bytes() / v.images[0] * begin;
            v.images[0] = end - begin;
        }
        for (Planned& step : steps_) {
            if (step.kind == kConvolve) step.shape.batch = end - begin;
            if (step.kind == kMaxPool) step.pool.batch = end - begin;
        }
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
    static const Pooling& pooling(const Planned& p) { return *reinterpret_cast<const Pooling*>(p.fields); }

    void make_step(const Planned& step) {
        switch (step.kind) {
            case kQuantize: return quantize(quantizing(step));
            case kConvolve: return convolve(convolving(step), step.shape);
            case kMaxPool: return pool(pooling(step), step.pool);
            case kConcatenate: {
                const Value& y = value(step.fields[0]);
                std::vector<ConcatenateStep::Source> sources;
                for (const int64_t* s = step.fields + 2; s < step.fields + 2 + step.fields[1]; ++s)
                    sources.push_back({value(*s).data, value(*s).channels()});
                if (y.numel() > 0) made_.push_back(std::make_unique<ConcatenateStep>(std::move(sources), y));
                return;
            }
            default: {
                const Value &x = value(step.fields[0]), &y = value(step.fields[1]);
                if (y.numel() > 0) made_.push_back(std::make_unique<FlattenStep>(x, y));
            }
        }
    }

    void quantize(const Quantizing& q) {
        const Value &x = value(q.source), &y = value(q.out);
        const QuantizerArguments arguments(kOp, inputs_.at(0), constant(q.constant, ScalarType::Float),
                                           constant(q.constant + 1, ScalarType::Int),
                                           constant(q.constant + 2, ScalarType::Byte), y.channels());
        const bool beside = q.source < static_cast<int64_t>(beside_.size()) ? beside_[q.source] : true;
        if (y.numel() == 0) return;
        dispatch_floating(x.dtype, [&](auto type) {
            using T = decltype(type);
            made_.push_back(
                std::make_unique<QuantizeStep<T>>(reinterpret_cast<const T*>(x.data), beside, y, arguments.table()));
        });
    }

    template <class T>
    std::unique_ptr<const Convolution<T>> convolution(const Convolving& c, const ConvShape& shape, T* y) {
        const Tensor &weight = constant(c.weight, ScalarType::Char), &bytes = constant(c.prepared, ScalarType::Byte);
        const std::array<int64_t, 4> panels = {shape.groups * shape.panels_per_group(), shape.panel_words(),
                                               kPanelOutputs, kWordChannels};
        const std::array<int64_t, 2> rows = {shape.kernel.area(), shape.channels};
        const Numbers weights = shape.depthwise() ? Numbers(rows) : Numbers(panels), found = weight.sizes();
        STD_TORCH_CHECK(std::equal(weights.begin(), weights.end(), found.begin(), found.end()), kOp,
                        ": a weight must have the shape ", list_of(weights), ", got ", shape_of(weight));
        STD_TORCH_CHECK(c.span != 0 && -kLimit <= c.span && c.span <= kLimit, kOp, ": a span is ", c.span);
        if (value(c.out).numel() == 0) return nullptr;
        auto layer = std::make_unique<ConvLayer>(
            shape, c.span, weight.const_data_ptr<int8_t>(),
            std::span(bytes.const_data_ptr<uint8_t>(), static_cast<size_t>(bytes.numel())));
        STD_TORCH_CHECK(layer->returns_codes() == (c.values == 0) && layer->has_also() == (c.also >= 0) &&
                            layer->has_residual() == (c.residual >= 0),
                        kOp, ": a layer was prepared for other outputs");
        return std::make_unique<Convolution<T>>(
            std::move(layer), shape,
            ConvCall<T>{value(c.source).data, c.residual >= 0 ? value(c.residual).data : nullptr, y,
                        c.also >= 0 ? value(c.also).data : nullptr});
    }

    void convolve(const Convolving& c, const ConvShape& shape) {
        const Value& y = value(c.out);
        const auto make = [&](auto* to) {
            if (auto step = convolution(c, shape, to)) made_.push_back(std::move(step));
        };
        if (!c.values) return make(y.data);
        dispatch_floating(y.dtype, [&](auto type) { make(reinterpret_cast<decltype(type)*>(y.data)); });
    }

    void pool(const Pooling& p, PoolProblem problem) {
        problem.x = value(p.source).data;
        problem.y = value(p.out).data;
        if (value(p.out).numel() > 0) made_.push_back(std::make_unique<MaxPool>(problem));
    }

    const std::vector<Tensor>&inputs_, &constants_;
    const std::vector<int64_t>& code_;
    const ScalarType dtype_;
    size_t at_ = 0;  // the next number
    std::vector<Value> values_;
    std::deque<std::vector<int64_t>> leading_;  // sizes that features share
    std::vector<int64_t> order_;                // in which values are made
    std::vector<Planned> steps_;
    std::vector<Chained> chains_;  // that each step belongs to
    std::vector<bool> beside_;     // whether the channels of an input lie beside each other
    std::vector<Tensor> held_;     // what inputs lie in
    Arena arena_;
    std::vector<std::pair<uint8_t**, int64_t>> places_;  // in it
    std::optional<Tensor> memory_;                       // that it is
    std::vector<std::unique_ptr<const Step>> made_;
};

std::vector<Tensor> run_layers(std::vector<Tensor> inputs, std::vector<Tensor> constants, std::vector<int64_t> code,
                               int64_t dtype) {
    STD_TORCH_CHECK(!inputs.empty(), kOp, ": there is no input");
    return Execution(inputs, constants, code, floating_type(kOp, dtype)).run();
}

// The bytes that run_layers takes with these arguments beside them and its results.
int64_t memory_of_layers(std::vector<Tensor> inputs, std::vector<Tensor> constants, std::vector<int64_t> code,
                         int64_t dtype) {
    STD_TORCH_CHECK(!inputs.empty(), kOp, ": there is no input");
    return Execution(inputs, constants, code, floating_type(kOp, dtype)).memory();
}

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
}

}  // namespace ptq4cuda
