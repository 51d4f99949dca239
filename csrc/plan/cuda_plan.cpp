#include "cuda_plan.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace senet {
namespace {

constexpr int64_t kNominalBatch = 64;
// A tile reads about this much of the tensor: on an H200 that makes four tiles per multiprocessor of SENet-154's second
// stage at batch 64, and the weights that each tile re-reads stay few beside it.
constexpr int64_t kTileBytes = 96 * 1024;
// What a dependent launch, or waiting for a last block, costs: about 1 us, in which an H200 moves this much.
constexpr int64_t kLaunchBytes = 4 * 1024 * 1024;
constexpr int64_t kTilesPerSm = 2;
// Weights, shares and vectors come from the L2, which is at least twice as fast as device memory.
constexpr int64_t kL2Speed = 2;
// One sector group of a line: narrower blocks of channels would waste parts of a request.
constexpr int64_t kNarrowest = 128;
// What a block with staged planes may take of shared memory beside its 12 KiB of vectors: 48 KiB need no opt-in.
constexpr int64_t kMostStaged = 32 * 1024;
constexpr int64_t kBlocksPerSm = 4;
constexpr int64_t kVectorBytes = 12 * 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

int64_t power_below(int64_t n) {
  int64_t p = 1;
  while (2 * p <= n) p *= 2;
  return p;
}

double fill(int64_t size, int64_t block) {
  return static_cast<double>(size) / static_cast<double>(round_up(size, block));
}

int64_t passes(const CudaProblem& p) {
  if (p.is_tail()) {
    if (p.backward) return 4 + (p.norm == CudaNorm::batch) + (p.residual && p.relu);
    return (p.norm == CudaNorm::given && p.r == 0 ? 2 : 3) + p.residual;
  }
  if (!p.backward) return 3 + p.residual;
  return 4 + (p.squeeze != Squeeze::avg) + (p.residual && p.relu);
}

// Tensors that the first sweep stages.
int64_t staged(const CudaProblem& p) { return p.backward ? 2 : 1; }

void channels_last_tiles(const CudaProblem& p, std::vector<CudaPlan>& found) {
  const int64_t packs = ceil_div(p.c, kCudaPack);
  const int64_t in_flight = kCudaPack / p.element_size;
  int64_t before = 0;
  for (int64_t widest : {32, 16, 8, 4}) {
    const int64_t lanes = ceil_div(packs, ceil_div(packs, widest));
    if (lanes == before || (before != 0 && lanes * kCudaPack * p.element_size < kNarrowest)) continue;
    before = lanes;
    for (int64_t samples : {1, 2, 4, 8}) {
      const int64_t rows = kCudaThreads / lanes / samples;
      const int64_t channels = lanes * kCudaPack;
      const int64_t size = samples * channels * p.m * p.element_size;
      if (rows == 0 || (samples > 1 && 4 * size > 5 * kTileBytes)) continue;
      const int64_t step = rows * in_flight;
      const int64_t steps = ceil_div(p.m, step);
      const int64_t wanted = std::clamp<int64_t>((2 * size + kTileBytes) / (2 * kTileBytes), 1, steps);
      const int64_t positions = ceil_div(steps, wanted) * step;
      CudaPlan plan{};
      plan.form = CudaForm::channels_last;
      plan.samples = samples;
      plan.channels = channels;
      plan.positions = positions;
      plan.splits = ceil_div(p.m, positions);
      found.push_back(plan);
    }
  }
}

// How many planes make a multiple of 16 bytes.
int64_t unit_of(const CudaProblem& p) {
  const int64_t vector = 16 / p.element_size;
  return vector / std::gcd(vector, p.m);
}

CudaPlan planes_tile(const CudaProblem& p) {
  CudaPlan plan{};
  plan.form = CudaForm::planes;
  plan.samples = 1;
  const int64_t bytes = p.m * p.element_size;
  // Multiples of 8 channels: weights are then read four at a time.
  int64_t channels = std::clamp<int64_t>(kTileBytes / bytes, 1, kMaxFlatChannels);
  if (channels > kCudaPack) channels -= channels % kCudaPack;
  channels = ceil_div(p.c, ceil_div(p.c, channels));
  if (channels > kCudaPack) channels = round_up(channels, kCudaPack);
  plan.channels = channels;
  const int64_t splits = ceil_div(channels * bytes, kTileBytes);
  plan.positions = splits == 1 ? p.m : round_up(ceil_div(p.m, splits), kCudaPack);
  plan.splits = ceil_div(p.m, plan.positions);
  plan.lanes = std::clamp<int64_t>(power_below(kCudaThreads / std::min(channels, kCudaThreads)), 8, kCudaThreads);
  return plan;
}

// The bytes of one tensor that a block may stage.
int64_t stage_bytes(const CudaProblem& p, const CudaFacts& facts) {
  return std::clamp(facts.shared_bytes / kBlocksPerSm - kVectorBytes, kMostStaged / 4, kMostStaged) / staged(p);
}

bool breaks_alignment(const CudaProblem& p) { return p.m * p.element_size % 16 != 0; }

bool can_be_staged(const CudaProblem& p, const CudaFacts& facts) {
  return unit_of(p) * p.m * p.element_size <= stage_bytes(p, facts);
}

CudaPlan tile_of_planes_tile(const CudaProblem& p, const CudaFacts& facts) {
  CudaPlan plan{};
  plan.form = CudaForm::tile_of_planes;
  plan.samples = 1;
  const int64_t unit = unit_of(p), plane = p.m * p.element_size;
  const int64_t most = std::min(stage_bytes(p, facts) / (unit * plane) * unit, kMaxFlatChannels);
  const int64_t blocks = ceil_div(p.c, most);
  plan.channels = std::min(round_up(ceil_div(p.c, blocks), unit), most);
  plan.positions = p.m;
  plan.splits = 1;
  plan.lanes = std::clamp<int64_t>(power_below(kCudaThreads / std::min(plan.channels, kCudaThreads)), 1, 32);
  return plan;
}

bool is_allowed(const CudaProblem& p, CudaStrategy strategy) {
  if (p.r == 0) return strategy == CudaStrategy::partials;  // no products, so no shares
  // The maximum of a plane is not a sum of shares.
  return strategy == CudaStrategy::launches || p.squeeze == Squeeze::avg;
}

// The bytes as time, in bytes of device memory: the tensor's weighted by how well the tiles fill the device and the
// threads, the others by the L2's speed, and what waiting costs.
double cost(const CudaProblem& p, const CudaPlan& plan, const CudaFacts& facts) {
  const CudaBytes bytes = count_bytes(p, plan, kNominalBatch);
  const int64_t tiles = plan.tiles(p.c) * ceil_div(kNominalBatch, plan.samples);
  const double idle = std::max(1.0, static_cast<double>(kTilesPerSm * facts.sms) / static_cast<double>(tiles));
  double full = 1.0;
  if (plan.form == CudaForm::channels_last) {
    const int64_t lanes = plan.channels / kCudaPack, rows = kCudaThreads / lanes / plan.samples;
    full = fill(p.c, plan.channels) * fill(p.m, plan.positions) *
           (static_cast<double>(lanes * rows * plan.samples) / kCudaThreads) *
           fill(std::min(p.m, plan.positions), rows);
  }
  // Between a tail's sweeps there is a launch in any case, so that "launches" means one more and not two.
  const int64_t waits = std::min<int64_t>(static_cast<int64_t>(plan.strategy), p.is_tail() ? 1 : 2);
  return static_cast<double>(bytes.tensor) * idle * (1 + 0.25 * (1 / full - 1)) +
         static_cast<double>(bytes.beside()) / kL2Speed + static_cast<double>(waits * kLaunchBytes);
}

void count_tail_bytes(const CudaProblem& p, const CudaPlan& plan, int64_t n, CudaBytes& bytes) {
  const int64_t vectors = n * p.c * 4, gated = p.r > 0, groups = ceil_div(n, kMaxSamples);
  const bool launches = plan.strategy == CudaStrategy::launches, last = plan.strategy == CudaStrategy::last_block;
  const int64_t blocks = ceil_div(p.c, kExciteChannels), shares = shares_of_sample(p, plan);
  const int64_t in_sweep = ceil_div(n, plan.samples) * plan.splits;
  bytes.weights = gated * p.c * p.r * p.weight_size * (groups + (launches ? groups : in_sweep));
  // Who sums the shares: forward the tiles of the second sweep, backward the launch between the sweeps.
  const int64_t readers = p.backward || launches ? blocks : plan.tiles(p.c);
  bytes.shares = gated * n * p.r * 4 * shares * (1 + (last ? 1 : readers));
  if (last) bytes.shares += gated * n * p.r * 4 * (1 + readers);
  if (p.backward) {
    bytes.vectors = vectors * (2 * (gated ? 3 : 2) * plan.splits + 2 * gated);
  } else if (p.norm == CudaNorm::batch || gated) {
    // The statistics are brought together by every group of samples for itself.
    const int64_t parts = p.norm == CudaNorm::batch ? 3 : 1;
    bytes.vectors = vectors * (parts * plan.splits * (1 + (parts == 3 && gated ? groups : 1)) + 2 * gated);
  }
}

std::string plural(int64_t count, const char* word) {
  return std::to_string(count) + " " + word + (count == 1 ? "" : "s");
}

}  // namespace

CudaBytes count_bytes(const CudaProblem& p, const CudaPlan& plan, int64_t n) {
  const int64_t groups = ceil_div(n, plan.samples), tiles = plan.tiles(p.c);
  const int64_t lines = p.channels_last ? p.m : p.c, line = p.channels_last ? p.c : p.m;
  CudaBytes bytes{};
  bytes.tensor = passes(p) * n * p.c * p.m * p.element_size;
  bytes.mask = p.relu ? (p.backward ? 2 : 1) * n * lines * ceil_div(line, 8) : 0;
  if (p.is_tail()) {
    count_tail_bytes(p, plan, n, bytes);
    return bytes;
  }
  const int64_t vectors = n * p.c * 4;
  if (plan.strategy == CudaStrategy::launches) {
    bytes.weights = 2 * ceil_div(n, kMaxSamples) * p.c * p.r * p.weight_size;
    bytes.shares = n * ceil_div(p.c, kExciteChannels) * p.r * 4 * (1 + ceil_div(p.c, kExciteChannels));
    bytes.vectors = vectors * (3 * plan.splits + 1);
    return bytes;
  }
  bytes.weights = 2 * groups * plan.splits * p.c * p.r * p.weight_size;
  const bool last = plan.strategy == CudaStrategy::last_block;
  bytes.shares = n * tiles * p.r * 4 * (1 + (last ? 1 : tiles));
  if (last) bytes.shares += n * p.r * 4 * (1 + tiles);
  bytes.vectors = vectors * (1 + plan.splits);
  return bytes;
}

int64_t shares_of_sample(const CudaProblem& p, const CudaPlan& plan) {
  if (p.is_tail() && !p.backward) return ceil_div(p.c, kTailChannels);
  return plan.strategy == CudaStrategy::launches ? ceil_div(p.c, kExciteChannels) : plan.tiles(p.c);
}

int64_t counted_groups(const CudaProblem& p, const CudaPlan& plan) {
  if (plan.strategy != CudaStrategy::last_block) return 0;
  return ceil_div(p.n, p.is_tail() && !p.backward ? kMaxSamples : plan.samples);
}

std::vector<CudaPlan> cuda_candidates(const CudaProblem& p, const CudaFacts& facts) {
  std::vector<CudaPlan> tiles;
  if (p.channels_last)
    channels_last_tiles(p, tiles);
  else if (breaks_alignment(p) && can_be_staged(p, facts))
    tiles.push_back(tile_of_planes_tile(p, facts));
  else
    tiles.push_back(planes_tile(p));

  std::vector<std::pair<double, CudaPlan>> found;
  for (CudaPlan plan : tiles) {
    plan.dependent_launch = facts.capability >= 90;
    // The next layer would find little of an output that fills the L2 by itself.
    plan.stream_stores = p.n * p.c * p.m * p.element_size > facts.l2_bytes;
    for (int64_t s = 0; s < kCudaStrategies; ++s) {
      plan.strategy = static_cast<CudaStrategy>(s);
      if (is_allowed(p, plan.strategy)) found.emplace_back(cost(p, plan, facts), plan);
    }
  }
  std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<CudaPlan> plans;
  for (const auto& entry : found) plans.push_back(entry.second);
  return plans;
}

CudaPlan plan_cuda(const CudaProblem& problem, const CudaFacts& facts) {
  return cuda_candidates(problem, facts).front();
}

std::string misfit(const CudaProblem& p, const CudaPlan& plan) {
  const auto within = [](int64_t v, int64_t low, int64_t high) { return v >= low && v <= high; };
  if (p.channels_last != (plan.form == CudaForm::channels_last)) return "the form does not fit the layout";
  if (p.r == 0 && !is_allowed(p, plan.strategy)) return "without a gate there is nothing to wait for: partials";
  if (!is_allowed(p, plan.strategy)) return "the maximum of a plane is no sum of shares: the strategy must be launches";
  if (plan.channels < 1 || !within(plan.positions, 1, int64_t{1} << 30) || plan.splits != ceil_div(p.m, plan.positions))
    return "the splits do not cover the positions";
  if (plan.form == CudaForm::channels_last) {
    if (!within(plan.samples, 1, kMaxSamples) || plan.channels % kCudaPack != 0 ||
        plan.channels * plan.samples > kMaxTileColumns)
      return "a tile has 1 to 8 samples and a multiple of 8 channels, at most 2048 of both";
    return "";
  }
  if (plan.samples != 1 || plan.channels > kMaxFlatChannels ||
      plan.channels * std::min(p.m, plan.positions) > kMaxFlatElements - 2 * kCudaPack)
    return "a contiguous tile has one sample, at most 1024 channels and 65520 elements";
  if (!within(plan.lanes, 1, kCudaThreads) || power_below(plan.lanes) != plan.lanes)
    return "a power of two of threads shares a plane";
  if (plan.splits > 1 && (plan.positions % kCudaPack != 0 || plan.channels != 1))
    return "split planes come one at a time, in multiples of 8 positions";
  if (plan.form == CudaForm::tile_of_planes &&
      (plan.splits != 1 || plan.lanes > 32 || staged(p) * plan.channels * p.m * p.element_size > kMostStaged))
    return "a tile of planes takes at most 32 KiB, and 32 threads share a plane";
  return "";
}

std::string text(const CudaPlan& plan) {
  return std::string(name(plan.strategy)) + ", " + name(plan.form) + ", " + std::to_string(plan.samples) + " x " +
         plural(plan.channels, "channel") + " x " + plural(plan.positions, "position") + ", " +
         plural(plan.splits, "split");
}

std::string reason(const CudaProblem& p, const CudaFacts& facts, const CudaPlan& plan) {
  std::string why;
  if (p.squeeze != Squeeze::avg) {
    why = "the maximum of a plane is not a sum of shares";
  } else if (p.r == 0) {
    why = "without a gate there are no shares";
  } else {
    // Each strategy with the tile that it would take.
    std::string here, others;
    for (int64_t s = 0; s < kCudaStrategies; ++s) {
      CudaPlan other = plan;
      if (s != static_cast<int64_t>(plan.strategy))
        for (const CudaPlan& candidate : cuda_candidates(p, facts))
          if (static_cast<int64_t>(candidate.strategy) == s) {
            other = candidate;
            break;
          }
      const CudaBytes bytes = count_bytes(p, other, kNominalBatch);
      const std::string percent =
          std::to_string(std::lround(100.0 * static_cast<double>(bytes.beside()) / static_cast<double>(bytes.tensor))) +
          " %";
      if (s == static_cast<int64_t>(plan.strategy))
        here = percent;
      else
        others += (others.empty() ? "" : ", ") + percent + " by " + name(other.strategy);
    }
    why = here + " of the tensor's bytes beside it, against " + others;
  }
  switch (plan.form) {
    case CudaForm::channels_last:
      return why + "; " + plural(plan.channels * p.element_size, "byte") + " of each pixel to a tile";
    case CudaForm::planes:
      return why + "; " + plural(plan.lanes, "thread") + " to a plane";
    case CudaForm::tile_of_planes:
      return why + "; planes of " + std::to_string(p.m * p.element_size) + " bytes break 16-byte alignment, " +
             std::to_string(plan.channels) + " together do not";
  }
  return why;
}

CudaWorkspace workspace(const CudaProblem& p, const CudaPlan& plan, bool kept, bool gate) {
  const bool launches = plan.strategy == CudaStrategy::launches, peak = p.squeeze != Squeeze::avg;
  const bool last = plan.strategy == CudaStrategy::last_block;
  const int64_t plane_parts = p.n * plan.splits * p.c;
  CudaWorkspace w{};
  const auto take = [&w](bool wanted, int64_t floats) -> int64_t {
    if (!wanted) return -1;
    const int64_t at = w.size;
    w.size += round_up(floats, 4);
    return at;
  };
  // One split of an average is pooled itself, and goes where it is kept.
  const bool direct = !p.backward && kept && !peak && plan.splits == 1;
  w.parts = take(p.backward || (!direct && (launches || kept)), plane_parts);
  w.peaks = take(!p.backward && peak, plane_parts);
  w.ties = take(!p.backward && peak, plane_parts);
  w.shares = take(true, p.n * shares_of_sample(p, plan) * p.r);
  w.vector = take(last && (p.backward || !kept), p.n * p.r);
  w.gate = take(launches && p.backward == gate, p.n * p.c);
  return w;
}

CudaTailWorkspace tail_workspace(const CudaProblem& p, const CudaPlan& plan) {
  const bool gated = p.r > 0, batch = p.norm == CudaNorm::batch;
  const int64_t plane_parts = p.n * plan.splits * p.c;
  CudaTailWorkspace w{};
  const auto take = [&w](bool wanted, int64_t floats) -> int64_t {
    if (!wanted) return -1;
    const int64_t at = w.size;
    w.size += round_up(floats, 4);
    return at;
  };
  w.shifts = take(!p.backward && batch, plane_parts);
  w.means = take(!p.backward && (batch || gated), plane_parts);
  w.squares = take(!p.backward && batch, plane_parts);
  w.sums = take(p.backward, 2 * plane_parts);
  w.dlogit = take(p.backward && gated, plane_parts);
  w.shares = take(gated, p.n * shares_of_sample(p, plan) * p.r);
  w.dpreact = take(p.backward && plan.strategy == CudaStrategy::last_block, p.n * p.r);
  w.dpooled = take(p.backward && gated, p.n * p.c);
  w.parts = take(p.backward, 2 * ceil_div(p.n, kMaxSamples) * p.c);
  return w;
}

const char* name(CudaStrategy strategy) {
  switch (strategy) {
    case CudaStrategy::partials:
      return "partials";
    case CudaStrategy::last_block:
      return "last_block";
    case CudaStrategy::launches:
      return "launches";
  }
  return "?";
}

const char* name(CudaForm form) {
  switch (form) {
    case CudaForm::channels_last:
      return "channels_last";
    case CudaForm::planes:
      return "planes";
    case CudaForm::tile_of_planes:
      return "tile_of_planes";
  }
  return "?";
}

}  // namespace senet
