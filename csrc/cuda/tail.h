// The CUDA operators of block tails; library.cpp gives them their names. Tensors are as in squeeze_excite.h, vectors
// are float32.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace senet {

using torch::stable::Tensor;

// (T1) to (T3), with the batch's statistics or with mean and var. Fills y, statistics [3, c], gate [n, c] and saved
// [n, c + r], which are there with w1 and w2 (the first c columns of saved are the means of xhat), and mask if it is
// there. stages: 0 all; 1 up to the statistics; 2, with the same memory, what follows them.
void tail_forward_cuda(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, Tensor statistics,
                       std::optional<Tensor> mean, std::optional<Tensor> var, std::optional<Tensor> w1,
                       std::optional<Tensor> b1, std::optional<Tensor> w2, std::optional<Tensor> b2,
                       std::optional<Tensor> residual, std::optional<Tensor> factor, double eps, int64_t act,
                       double act_p0, int64_t gate_fn, double gate_p0, double gate_p1, int64_t squeeze, int64_t relu,
                       bool channels_last, Tensor y, std::optional<Tensor> gate, std::optional<Tensor> saved,
                       std::optional<Tensor> mask, int64_t stages, Tensor workspace, std::optional<Tensor> counters,
                       int64_t strategy, int64_t form, int64_t samples, int64_t channels, int64_t positions,
                       int64_t lanes, bool dependent_launch, bool stream_stores);

// (T4) to (T7). Fills those of dx, dweight, dbias, dw1, db1, dw2, db2, dresidual that are there. count: m of (T7), 0
// with given statistics. stages: 0 all; 1 up to the gradients of vectors and weights; 2, with the same memory, dx and
// dresidual, from `shared_dweight` and `shared_dbias` [c] in place of dweight / m and dbias / m.
void tail_backward_cuda(Tensor dy, Tensor x, std::optional<Tensor> mask, std::optional<Tensor> weight,
                        std::optional<Tensor> bias, Tensor statistics, std::optional<Tensor> w1,
                        std::optional<Tensor> w2, std::optional<Tensor> factor, std::optional<Tensor> gate,
                        std::optional<Tensor> saved, int64_t act, double act_p0, int64_t gate_fn, double gate_p0,
                        double gate_p1, int64_t squeeze, int64_t relu, bool channels_last, double count,
                        std::optional<Tensor> shared_dweight, std::optional<Tensor> shared_dbias,
                        std::optional<Tensor> dx, std::optional<Tensor> dweight, std::optional<Tensor> dbias,
                        std::optional<Tensor> dw1, std::optional<Tensor> db1, std::optional<Tensor> dw2,
                        std::optional<Tensor> db2, std::optional<Tensor> dresidual, int64_t stages, Tensor workspace,
                        std::optional<Tensor> counters, int64_t strategy, int64_t form, int64_t samples,
                        int64_t channels, int64_t positions, int64_t lanes, bool dependent_launch, bool stream_stores);

}  // namespace senet
