// What the CUDA backend launches: a pure function of a layer's sizes and a GPU's facts. No torch, no CUDA.
//
// A tile is (some samples, a block of channels, a split of the positions); one block of threads sweeps over it. What
// happens between the two sweeps is the strategy, and it is decided by counting bytes. The rule is that of
// senet_fused/backends/triton/plan.py, which has to work without compiled code; a test holds the two to the same
// counts. Nothing but stream_stores depends on the batch size, so a sample's result does not depend on the batch it is
// in.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "plan.h"

namespace senet {

// What an SE layer's x comes from: nothing that is computed here, or BatchNorm with the statistics of the batch or with
// statistics that are given. With one the problem is a block tail (senet_fused/reference.py).
enum class CudaNorm : int64_t { none, batch, given };
constexpr int64_t kCudaNorms = 3;

// r = 0, of block tails only: no gate.
struct CudaProblem : Problem {
  Squeeze squeeze;
  bool relu;      // behind the layer, with a bit mask that is written forward and read backward
  bool residual;  // read forward; its gradient is written backward where there is a ReLU
  CudaNorm norm;

  bool is_tail() const { return norm != CudaNorm::none; }
};

struct CudaFacts {
  int64_t capability;    // 80, 86, 90, ...
  int64_t sms;           // multiprocessors
  int64_t shared_bytes;  // of shared memory per multiprocessor
  int64_t l2_bytes;
};

enum class CudaStrategy : int64_t {
  partials,    // each tile pushes its share of the first product, each tile of the second sweep sums the shares
  last_block,  // the last tile of a group of samples sums them, once
  launches,    // two small launches between the sweeps
};
constexpr int64_t kCudaStrategies = 3;

enum class CudaForm : int64_t {
  channels_last,   // a thread has 8 channels and walks over positions
  planes,          // some lanes share a plane, which is contiguous
  tile_of_planes,  // planes whose size breaks 16-byte alignment are read as one piece, and summed in shared memory
};
constexpr int64_t kCudaForms = 3;

struct CudaPlan {
  CudaStrategy strategy;
  CudaForm form;
  int64_t samples;        // of a tile
  int64_t channels;       // of a tile; all blocks of channels but the last have as many
  int64_t positions;      // of a split
  int64_t splits;         // tiles that share a plane
  int64_t lanes;          // contiguous forms: threads that share a plane
  bool dependent_launch;  // a launch may begin while the one before it ends
  bool stream_stores;     // the output is marked as not wanted soon

  int64_t blocks(int64_t c) const { return (c + channels - 1) / channels; }
  int64_t tiles(int64_t c) const { return blocks(c) * splits; }  // of one sample
};

// What kernels take for granted of a plan.
constexpr int64_t kCudaThreads = 256;        // of every block
constexpr int64_t kCudaPack = 8;             // elements that a thread reads at once
constexpr int64_t kMaxTileColumns = 2048;    // samples x channels
constexpr int64_t kMaxSamples = 8;           // of a tile, and of a block of the excitation's own launches
constexpr int64_t kMaxFlatChannels = 1024;   // of a contiguous tile
constexpr int64_t kMaxFlatElements = 65536;  // of a contiguous tile
constexpr int64_t kExciteChannels = 128;     // of a block of the excitation's own launches
constexpr int64_t kTailChannels = 32;        // of a block that brings a block tail's statistics together
constexpr int64_t kWeightChannels = 64;      // of a tile of the weight gradients
constexpr int64_t kWeightReduced = 32;

// Bytes that kernels load and store in one direction, by what they are; weight gradients are left out.
struct CudaBytes {
  int64_t tensor, mask, weights, shares, vectors;
  int64_t beside() const { return mask + weights + shares + vectors; }
};

CudaPlan plan_cuda(const CudaProblem& problem, const CudaFacts& facts);
// Every plan that is considered, the cheapest first.
std::vector<CudaPlan> cuda_candidates(const CudaProblem& problem, const CudaFacts& facts);
CudaBytes count_bytes(const CudaProblem& problem, const CudaPlan& plan, int64_t batch);
// Into how many shares the first product of a sample is cut.
int64_t shares_of_sample(const CudaProblem& problem, const CudaPlan& plan);
// Groups of samples for which "last_block" counts blocks.
int64_t counted_groups(const CudaProblem& problem, const CudaPlan& plan);
// Why a plan, in words.
std::string reason(const CudaProblem& problem, const CudaFacts& facts, const CudaPlan& plan);
// "launches, tile_of_planes, 1 x 256 channels x 49 positions, 1 split"
std::string text(const CudaPlan& plan);
// What is wrong with a plan for this problem; empty if the kernels can carry it out.
std::string misfit(const CudaProblem& problem, const CudaPlan& plan);
const char* name(CudaStrategy strategy);
const char* name(CudaForm form);

// Where a call's float32 workspace holds what; -1 for what the call has no need of.
struct CudaWorkspace {
  int64_t parts;   // [n, splits, c]: of pooled, or of dlogit
  int64_t peaks;   // [n, splits, c]
  int64_t ties;    // [n, splits, c]
  int64_t shares;  // [n, tiles, r]: of w1 @ pooled, or of dlogit @ w2
  int64_t vector;  // [n, r]: preact that is not kept, or dpreact
  int64_t gate;    // [n, c]: a gate that is not kept, or dpooled
  int64_t size;    // of all, in floats
};
// kept: pooled and preact are kept for a backward (forward). gate: the gate is kept (forward), dx is wanted (backward).
CudaWorkspace workspace(const CudaProblem& problem, const CudaPlan& plan, bool kept, bool gate);

// As CudaWorkspace, of a block tail.
struct CudaTailWorkspace {
  int64_t shifts;   // [n, splits, c]: forward, of the batch: what means and squares are taken from
  int64_t means;    // [n, splits, c]: forward, also with given statistics: parts of the mean of x - mu
  int64_t squares;  // [n, splits, c]
  int64_t sums;     // [2, n, splits, c]: backward, of g and of g * xhat
  int64_t dlogit;   // [n, splits, c]
  int64_t shares;   // [n, shares, r]: of w1 @ pooled, or of dlogit @ w2
  int64_t dpreact;  // [n, r]
  int64_t dpooled;  // [n, c]
  int64_t parts;    // [2, groups of kMaxSamples samples, c]: of dweight and dbias
  int64_t size;
};
CudaTailWorkspace tail_workspace(const CudaProblem& problem, const CudaPlan& plan);

}  // namespace senet
