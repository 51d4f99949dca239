// Checks of tensors at the boundary: shared by every host file. Each failure says what was expected and what came.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <string>

namespace senet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string text(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i != 0 ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

inline bool has_sizes(const Tensor& t, std::initializer_list<int64_t> sizes) {
  // Trailing dimensions of size 1 are allowed: a 1x1 convolution's weight is a matrix.
  if (t.dim() < static_cast<int64_t>(sizes.size())) return false;
  int64_t i = 0;
  for (int64_t size : sizes)
    if (t.size(i++) != size) return false;
  for (; i < t.dim(); ++i)
    if (t.size(i) != 1) return false;
  return true;
}

// A dense tensor of these sizes and dtype, on the CPU.
inline void check_dense(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  std::string expected = "[";
  if (!has_sizes(t, sizes)) {
    for (int64_t size : sizes) expected += (expected.size() > 1 ? ", " : "") + std::to_string(size);
    STD_TORCH_CHECK(false, "senet_fused: ", name, " must be ", expected, "], got ", text(t));
  }
  STD_TORCH_CHECK(t.scalar_type() == dtype, "senet_fused: ", name, " has another dtype than this call needs");
  STD_TORCH_CHECK(t.is_cpu(), "senet_fused: ", name, " must be on the CPU");
  STD_TORCH_CHECK(t.is_contiguous(), "senet_fused: ", name, " must be contiguous");
}

// How far samples of an [n, c, *spatial] tensor are apart, in elements. Within a sample the tensor must be dense, in
// channels_last or contiguous order; dimensions of size 1 have no say.
inline int64_t check_samples(const Tensor& t, const char* name, bool channels_last) {
  STD_TORCH_CHECK(t.is_cpu(), "senet_fused: ", name, " must be on the CPU");
  STD_TORCH_CHECK(t.dim() >= 3, "senet_fused: ", name, " must be [N, C, *spatial], got ", text(t));
  int64_t expected = 1;
  const auto dense = [&](int64_t d) {
    STD_TORCH_CHECK(t.size(0) == 0 || t.size(d) == 1 || t.stride(d) == expected, "senet_fused: ", name,
                    " is not dense in ", channels_last ? "channels_last" : "contiguous", " order: dimension ", d,
                    " of ", text(t), " has stride ", t.stride(d));
    expected *= t.size(d);
  };
  if (channels_last) dense(1);
  for (int64_t d = t.dim() - 1; d >= 2; --d) dense(d);
  if (!channels_last) dense(1);
  return t.size(0) > 1 ? t.stride(0) : expected;
}

inline void check_same_shape(const Tensor& t, const char* name, const Tensor& x) {
  bool same = t.dim() == x.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == x.size(i);
  STD_TORCH_CHECK(same, "senet_fused: ", name, " must have x's shape ", text(x), ", got ", text(t));
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), "senet_fused: ", name, " must have x's dtype");
}

}  // namespace senet
