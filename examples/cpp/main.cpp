// Says what is in a picture, without Python: runs a package of `parnet export net.safetensors net.pt2`.
//   ./classify net.pt2 path/to/_C.so picture.ppm [logits.bin]
// Size and normalisation of pictures, names of classes and the device are read from the package.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

using nlohmann::json;
using Numbers = std::vector<double>;
namespace F = torch::nn::functional;

// uint8 [1, 3, H, W] of a binary PPM file with 8 bits a colour.
torch::Tensor read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t width = 0, height = 0, largest = 0;
  file >> magic >> width >> height >> largest;
  if (magic != "P6" || largest != 255 || std::min(width, height) < 1 || std::max(width, height) > 1 << 14)
    throw std::runtime_error(path + " is no P6 file of 8-bit colours");
  torch::Tensor pixels = torch::empty({1, height, width, 3}, torch::kUInt8);
  file.get();  // one blank before the pixels
  file.read(static_cast<char*>(pixels.data_ptr()), pixels.nbytes());
  return file ? pixels.permute({0, 3, 1, 2}) : throw std::runtime_error(path + " ends early");
}

// A network's input, as `parnet_kernels.Preprocessing` describes it: resized, cut, normalised.
torch::Tensor prepared(const torch::Tensor& x, const json& p) {
  if (p.at("interpolation") != "bilinear" || p.at("color") != "rgb")
    throw std::runtime_error("the network wants other pictures: " + p.dump());
  const json& said = p.at("size");
  const std::vector<int64_t> size = said.is_array() ? said : json::array({said, said});
  const double crop = p.at("crop"), scale = std::max(size[0] / crop / x.size(2), size[1] / crop / x.size(3));
  const auto side = [&](int d) { return std::max<int64_t>(size[d - 2], std::nearbyint(x.size(d) * scale)); };
  auto how = F::InterpolateFuncOptions().mode(torch::kBilinear).align_corners(false).antialias(true);
  torch::Tensor y = F::interpolate(x, how.size(std::vector<int64_t>{side(2), side(3)}));
  for (int d : {2, 3}) y = y.narrow(d, (side(d) - size[d - 2]) / 2, size[d - 2]);
  const torch::Tensor mean = torch::tensor(p.at("mean").get<Numbers>(), torch::kFloat64).view({3, 1, 1});
  const torch::Tensor std = torch::tensor(p.at("std").get<Numbers>(), torch::kFloat64).view({3, 1, 1});
  y = y.to(torch::kFloat32).sub((255 * mean).to(torch::kFloat32)).mul((1 / (255 * std)).to(torch::kFloat32));
  return y.contiguous();
}

int main(int count, char** arguments) try {
  if (count < 4) throw std::runtime_error("usage: classify net.pt2 _C.so picture.ppm [logits.bin]");
  if (!dlopen(arguments[2], RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());  // the kernels
  std::string gpu = arguments[2];
  dlopen(gpu.insert(gpu.size() - 3, "_cuda").c_str(), RTLD_NOW | RTLD_GLOBAL);  // those for GPUs, if built
  const c10::InferenceMode no_gradients;
  torch::inductor::AOTIModelPackageLoader network(arguments[1]);
  auto said = network.get_metadata();
  if (!said.count("parnet_preprocessing")) throw std::runtime_error("the package says nothing of pictures");
  torch::Tensor x = prepared(read_ppm(arguments[3]), json::parse(said["parnet_preprocessing"]));
  x = x.to(torch::Device(said["parnet_device"]), c10::getStringToDtypeMap().at(said["parnet_dtype"]));
  const torch::Tensor logits = network.run({x})[0].to(torch::kCPU, torch::kFloat32).contiguous();
  if (count > 4) std::ofstream(arguments[4]).write(static_cast<char*>(logits.data_ptr()), logits.nbytes());
  const json names = json::parse(said.count("parnet_class_names") ? said["parnet_class_names"] : "[]");
  const auto [probabilities, classes] = logits[0].softmax(0).topk(std::min<int64_t>(3, logits.size(1)));
  for (int64_t i = 0; i < classes.size(0); i++) {
    const size_t k = classes[i].item<int64_t>();
    const std::string name = k < names.size() ? names[k].get<std::string>() : "class " + std::to_string(k);
    std::printf("%5.1f %%  %s\n", 100 * probabilities[i].item<double>(), name.c_str());
  }
  Numbers ms(51);
  for (double& taken : ms) {
    const auto start = std::chrono::steady_clock::now();
    network.run({x})[0].cpu();  // a GPU is waited for
    taken = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }
  std::sort(ms.begin(), ms.end());
  std::printf("%s, %d threads: %.3f ms\n", said["parnet_isa"].c_str(), at::get_num_threads(), ms[25]);
} catch (const std::exception& error) {
  std::fprintf(stderr, "classify: %s\n", error.what());
  return 1;
}
