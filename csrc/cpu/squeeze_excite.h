// The CPU operators; library.cpp gives them their names.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace senet {

using torch::stable::Tensor;

// Fills y, and those of gate, saved and mask that are there. x and residual are dense within a sample, in contiguous or
// channels_last order.
void squeeze_excite_cpu(Tensor x, Tensor w1, std::optional<Tensor> b1, Tensor w2, std::optional<Tensor> b2,
                        std::optional<Tensor> residual, int64_t act, double act_p0, int64_t gate_fn, double gate_p0,
                        double gate_p1, int64_t squeeze, int64_t relu, bool channels_last, Tensor y,
                        std::optional<Tensor> gate, std::optional<Tensor> saved, std::optional<Tensor> mask);

// Fills those of dx, dw1, db1, dw2, db2, dresidual that are there; dw1 and dw2 go together.
void squeeze_excite_backward_cpu(Tensor dy, std::optional<Tensor> dgate, Tensor x, Tensor w1, Tensor w2, Tensor gate,
                                 Tensor saved, std::optional<Tensor> mask, int64_t act, double act_p0, int64_t gate_fn,
                                 double gate_p0, double gate_p1, int64_t squeeze, int64_t relu, bool channels_last,
                                 std::optional<Tensor> dx, std::optional<Tensor> dw1, std::optional<Tensor> db1,
                                 std::optional<Tensor> dw2, std::optional<Tensor> db2, std::optional<Tensor> dresidual);

}  // namespace senet
