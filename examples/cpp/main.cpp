// Runs a quantized network that was packaged by AOTInductor, without Python:
//
//     serve OPERATORS PACKAGE INPUT SHAPE OUTPUT        SHAPE as 8,3,64,64
//
// OPERATORS is the library with ptq4cuda's operators, which `ptq4cuda info` names. INPUT and OUTPUT are float32 in
// the machine's order, as numpy's tofile() writes them.
#include <ATen/ops/empty.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

at::Tensor read(const std::string& path, const std::vector<int64_t>& shape) {
    const at::Tensor x = at::empty(shape, at::kFloat);
    std::ifstream file(path, std::ios::binary);
    if (!file.read(static_cast<char*>(x.mutable_data_ptr()), static_cast<std::streamsize>(x.nbytes())))
        throw std::runtime_error(path + " cannot be read, or holds less than the shape says");
    return x;
}

void write(const std::string& path, const at::Tensor& tensor) {
    const at::Tensor y = tensor.contiguous();
    std::ofstream file(path, std::ios::binary);
    if (!file.write(static_cast<const char*>(y.const_data_ptr()), static_cast<std::streamsize>(y.nbytes())))
        throw std::runtime_error(path + " cannot be written");
}

std::vector<int64_t> numbers(const std::string& text) {
    std::vector<int64_t> found;
    std::istringstream parts(text);
    for (std::string part; std::getline(parts, part, ',');) found.push_back(std::stoll(part));
    return found;
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 6) {
        std::fprintf(stderr, "usage: %s OPERATORS PACKAGE INPUT SHAPE OUTPUT\n", arguments[0]);
        return 2;
    }
    try {
        // The library registers its operators as it is loaded; it stays loaded to the end.
        if (dlopen(arguments[1], RTLD_NOW) == nullptr) throw std::runtime_error(dlerror());
        torch::inductor::AOTIModelPackageLoader network(arguments[2]);
        write(arguments[5], network.run({read(arguments[3], numbers(arguments[4]))}).at(0));
    } catch (const c10::Error& error) {  // of torch
        std::fprintf(stderr, "%s\n", error.what_without_backtrace());
        return 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
