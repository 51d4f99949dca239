// Checks of tensors at the boundary: shared by every host file. Each failure says what was expected and what came.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "plan/plan.h"

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

inline void check_device(const Tensor& t, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(
      t.is_cpu() == x.is_cpu() && t.is_cuda() == x.is_cuda() && t.get_device_index() == x.get_device_index(),
      "senet_fused: ", name, " must be on x's device");
}

// A dense tensor of these sizes and dtype, where x is.
inline void check_dense(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes, ScalarType dtype,
                        const Tensor& x) {
  std::string expected = "[";
  if (!has_sizes(t, sizes)) {
    for (int64_t size : sizes) expected += (expected.size() > 1 ? ", " : "") + std::to_string(size);
    STD_TORCH_CHECK(false, "senet_fused: ", name, " must be ", expected, "], got ", text(t));
  }
  STD_TORCH_CHECK(t.scalar_type() == dtype, "senet_fused: ", name, " has another dtype than this call needs");
  check_device(t, name, x);
  STD_TORCH_CHECK(t.is_contiguous(), "senet_fused: ", name, " must be contiguous");
}

// How far samples of an [n, c, *spatial] tensor are apart, in elements. Within a sample the tensor must be dense, in
// channels_last or contiguous order; dimensions of size 1 have no say.
inline int64_t check_samples(const Tensor& t, const char* name, bool channels_last) {
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
  check_device(t, name, x);
}

// The bits that a ReLU let through: each line, a plane or a pixel's channels, is padded to a byte.
inline void check_mask(const Tensor& mask, const Problem& p, const Tensor& x) {
  const int64_t lines = p.channels_last ? p.m : p.c, line = p.channels_last ? p.c : p.m;
  check_dense(mask, "mask", {p.n, lines, (line + 7) / 8}, ScalarType::Byte, x);
}

inline void check_codes(int64_t act, int64_t gate, int64_t squeeze, int64_t relu) {
  STD_TORCH_CHECK(act >= 0 && act < kFunctions && gate >= 0 && gate < kFunctions && squeeze >= 0 &&
                      squeeze < kSqueezes && (relu == 0 || relu == 1),
                  "senet_fused: unknown function code");
  const Function g = static_cast<Function>(gate);
  STD_TORCH_CHECK(g == Function::sigmoid || g == Function::hardsigmoid || g == Function::tanh || g == Function::relu ||
                      g == Function::identity,
                  "senet_fused: this function is no gate: its derivative does not follow from its value");
}

inline int64_t element_size(ScalarType t) { return t == ScalarType::Double ? 8 : t == ScalarType::Float ? 4 : 2; }

// The sizes of a call; w1 of its gate, or nothing. x's dtype is the caller's to check.
inline Problem check_problem(const Tensor& x, const std::optional<Tensor>& w1, bool channels_last, bool backward) {
  STD_TORCH_CHECK(x.dim() >= 3, "senet_fused: x must be [N, C, *spatial], got ", text(x));
  int64_t m = 1;
  for (int64_t d = 2; d < x.dim(); ++d) m *= x.size(d);
  STD_TORCH_CHECK(m > 0 && x.size(1) > 0, "senet_fused: empty channels or positions: x ", text(x));
  Problem p{x.size(0), x.size(1), 0, m, element_size(x.scalar_type()), 0, channels_last, backward};
  if (w1.has_value()) {
    STD_TORCH_CHECK(w1->dim() >= 2 && w1->size(0) > 0, "senet_fused: w1 must be [R, C], got ", text(*w1));
    p.r = w1->size(0);
    p.weight_size = element_size(w1->scalar_type());
  }
  return p;
}

}  // namespace senet
