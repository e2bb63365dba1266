// Runs a package of `parnet export net.safetensors net.pt2` without Python:
//   ./classify net.pt2 path/to/_C.so [N C H W images.bin logits.bin]
// images.bin: float32 numbers [N, C, H, W]. Without it, an image of zeros, 224 x 224.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

torch::Tensor read_images(char** arguments) {
  std::vector<int64_t> shape;
  for (int i = 0; i < 4; i++) shape.push_back(std::atoll(arguments[i]));
  torch::Tensor images = torch::empty(shape);
  std::ifstream file(arguments[4], std::ios::binary);
  if (!file.read(static_cast<char*>(images.data_ptr()), images.nbytes())) {
    throw std::runtime_error(std::string("cannot read so many numbers from ") + arguments[4]);
  }
  return images;
}

double median_ms(torch::inductor::AOTIModelPackageLoader& network, const torch::Tensor& images) {
  std::vector<double> times;
  for (int i = 0; i < 50; i++) {
    const auto start = std::chrono::steady_clock::now();
    network.run({images});
    const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;
    times.push_back(taken.count());
  }
  std::nth_element(times.begin(), times.begin() + 25, times.end());
  return times[25];
}

int main(int count, char** arguments) try {
  if (count != 3 && count != 9) {
    std::fprintf(stderr, "usage: classify net.pt2 _C.so [N C H W images.bin logits.bin]\n");
    return 2;
  }
  if (!dlopen(arguments[2], RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());  // the kernels
  const c10::InferenceMode no_gradients;
  torch::inductor::AOTIModelPackageLoader network(arguments[1]);
  std::printf("packed for %s\n", network.get_metadata().at("parnet_isa").c_str());

  const torch::Tensor images = count == 9 ? read_images(arguments + 3) : torch::zeros({1, 3, 224, 224});
  const torch::Tensor logits = network.run({images})[0].contiguous();
  if (count == 9) {
    std::ofstream file(arguments[8], std::ios::binary);
    file.write(static_cast<const char*>(logits.data_ptr()), logits.nbytes());
    if (!file.flush()) throw std::runtime_error(std::string("cannot write ") + arguments[8]);
  }
  std::printf("best class of image 0: %ld\n", static_cast<long>(logits[0].argmax().item<int64_t>()));
  std::printf("%d threads, median of 50: %.3f ms\n", at::get_num_threads(), median_ms(network, images));
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "classify: %s\n", error.what());
  return 1;
}
