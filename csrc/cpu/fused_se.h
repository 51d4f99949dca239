// The CPU operators; library.cpp gives them their names. x, residual, dy, y, dx and dresidual share one layout, dense
// within a sample, in contiguous or channels_last order. Vectors are in the accumulation type (double for float64, else
// float), weights in their own. With statistics there is a norm in front, with w1 and w2 a gate; one of both is there.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace senet {

using torch::stable::Tensor;

// (T1). Fills xbar, the first c columns of saved [n, c + r], if saved is there, and statistics [3, c] if that is there:
// mean, (variance + eps)^-1/2, and the variance with m - 1.
void moments_cpu(Tensor x, double eps, bool channels_last, std::optional<Tensor> saved,
                 std::optional<Tensor> statistics);

// (E1) to (E4), with statistics (T2), (E2), (E3), (T3), with pre_act, too, (P1), (E2), (E3), (P2). Fills y, and those
// of gate [n, c], saved and mask that are there; with both a norm and a gate, gate and saved are. weight, bias and
// factor belong to a norm.
void forward_cpu(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> statistics,
                 std::optional<Tensor> w1, std::optional<Tensor> b1, std::optional<Tensor> w2, std::optional<Tensor> b2,
                 std::optional<Tensor> residual, std::optional<Tensor> factor, int64_t act, double act_p0,
                 int64_t gate_fn, double gate_p0, double gate_p1, int64_t squeeze, int64_t relu, int64_t pre_act,
                 double pre_act_p0, bool channels_last, Tensor y, std::optional<Tensor> gate,
                 std::optional<Tensor> saved, std::optional<Tensor> mask);

// (B1) to (B7), without a norm. Fills those of dx, dw1, db1, dw2, db2, dresidual that are there; dw1 and dw2 go
// together.
void backward_cpu(Tensor dy, std::optional<Tensor> dgate, Tensor x, Tensor w1, Tensor w2, Tensor gate, Tensor saved,
                  std::optional<Tensor> mask, int64_t act, double act_p0, int64_t gate_fn, double gate_p0,
                  double gate_p1, int64_t squeeze, int64_t relu, bool channels_last, std::optional<Tensor> dx,
                  std::optional<Tensor> dw1, std::optional<Tensor> db1, std::optional<Tensor> dw2,
                  std::optional<Tensor> db2, std::optional<Tensor> dresidual);

// With a norm the backward is two operators, between which processes exchange their sums. The first, (T4) to (T6),
// fills dweight and dbias [c]; with w1 and w2 also dpooled [n, c] and those of dw1, db1, dw2, db2 that are there, where
// dw1 and dw2 go together.
void gradient_sums_cpu(Tensor dy, Tensor x, std::optional<Tensor> mask, std::optional<Tensor> weight,
                       std::optional<Tensor> bias, Tensor statistics, std::optional<Tensor> w1,
                       std::optional<Tensor> w2, std::optional<Tensor> factor, std::optional<Tensor> gate,
                       std::optional<Tensor> saved, int64_t act, double act_p0, int64_t gate_fn, double gate_p0,
                       double gate_p1, int64_t squeeze, int64_t relu, int64_t pre_act, double pre_act_p0,
                       bool channels_last, Tensor dweight, Tensor dbias, std::optional<Tensor> dpooled,
                       std::optional<Tensor> dw1, std::optional<Tensor> db1, std::optional<Tensor> dw2,
                       std::optional<Tensor> db2);

// The second, (T7) or (P6), fills dx, and dresidual if it is there. count: m of (T7); 0 if the statistics were given.
void gradient_cpu(Tensor dy, Tensor x, std::optional<Tensor> mask, std::optional<Tensor> weight,
                  std::optional<Tensor> bias, Tensor statistics, std::optional<Tensor> factor,
                  std::optional<Tensor> gate, Tensor dweight, Tensor dbias, std::optional<Tensor> dpooled, double count,
                  int64_t pre_act, double pre_act_p0, bool channels_last, Tensor dx, std::optional<Tensor> dresidual);

}  // namespace senet
