// A kernel with errors to choose from, which the host run has to find. As a program: planted ERROR THREADS BLOCKS
// says "right" or "wrong", unless the error ended it; ERROR "none" has to be right. Other words in place of ERROR
// ("builtins", "order", "configuration") try out the host run itself.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace senet::cuda {
namespace {

constexpr const char* kErrors[] = {
    "none",
    "no barrier behind the copies",
    "no barrier before the sums",
    "no barrier behind the sums",
    "no copy_wait",
    "copy_wait too late",
    "write behind static",
    "write before static",
    "write behind dynamic",
    "half of a warp",
    "half of a warp ends",
    "half of the block",
    "different masks",
    "different calls",
    "not in its own mask",
    "reads outside of the mask",
    "no wait_for_previous",
    "misaligned load",
    "misaligned store",
    "misaligned copy",
    "copy elsewhere",
    "too much shared memory",
};
constexpr int kNumberOfErrors = sizeof kErrors / sizeof *kErrors;

constexpr int number_of(const char* name) {
  int number = 0;
  for (; number < kNumberOfErrors; ++number) {
    int i = 0;
    while (kErrors[number][i] == name[i] && name[i] != '\0') ++i;
    if (kErrors[number][i] == name[i]) break;
  }
  return number;
}

struct Arguments {
  const float* x;  // gridDim.x rows
  float* y;        // each row times its sum, plus the sum of its squares
  float* sums;     // of each row
  float* total;
  int* counter;
  int length;  // of a row
  int error;

  __device__ bool has(const char* name) const { return error == number_of(name); }
};

__device__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o > 0; o /= 2) v += __shfl_xor_sync(~0u, v, o);
  return v;
}

// The same in every thread. scratch: a float per warp.
__device__ float block_sum(float v, float* scratch, const Arguments& a) {
  if (a.has("half of a warp ends") && threadIdx.x % 32 >= 16) return v;
  if (!a.has("half of a warp") || threadIdx.x % 32 < 16) v = warp_sum(v);
  if (!a.has("no barrier before the sums")) __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  if (!a.has("no barrier behind the sums")) __syncthreads();
  v = 0.0f;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) v += scratch[w];
  return v;
}

// The errors in calls that a whole warp makes.
__device__ void misuse(const Arguments& a) {
  const int lane = threadIdx.x % 32;
  if (a.has("different masks")) __syncwarp(lane == 0 ? 0x7fffffffu : ~0u);
  if (a.has("different calls")) lane == 0 ? __any_sync(~0u, 1) : __all_sync(~0u, 1);
  if (a.has("not in its own mask")) __syncwarp(0xffffu);
  if (a.has("reads outside of the mask") && lane < 16) __shfl_down_sync(0xffffu, 1.0f, 1);
}

// True in all threads of the block that is the last to come here.
__device__ bool is_last_block(int* counter) {
  SENET_SHARED(bool, last, 1);
  if (threadIdx.x == 0) {
    __threadfence();
    *last = atomicAdd(counter, 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  return *last;
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 2) scale_rows(const Arguments a) {
  SENET_DYNAMIC_SHARED(row_bytes);
  SENET_SHARED(float, warps, kThreads / 32);
  float* row = reinterpret_cast<float*>(row_bytes);
  const float* x = a.x + int64_t{blockIdx.x} * a.length;
  const int chunks = a.length / 4;
  if (!a.has("no wait_for_previous")) wait_for_previous();

  if (a.has("too much shared memory")) {
    SENET_SHARED(double, much, 6 * 1024);
    much[threadIdx.x] = 0.0;
  }
  if (a.has("misaligned copy")) copy_async(row + 4, x + 1);
  if (a.has("copy elsewhere")) copy_async(a.y, x);
  for (int i = threadIdx.x; i < chunks; i += kThreads) copy_async(row + 4 * i, x + 4 * i);
  if (!a.has("copy_wait too late") && !a.has("no copy_wait")) copy_wait();
  if (!a.has("no barrier behind the copies")) __syncthreads();

  float sum = 0.0f, squares = 0.0f;
  for (int i = threadIdx.x; i < a.length; i += kThreads) sum += row[i], squares += row[i] * row[i];
  if (a.has("copy_wait too late")) copy_wait();
  misuse(a);
  sum = block_sum(sum, warps, a);
  if (a.has("half of a warp ends") && threadIdx.x % 32 >= 16) return;
  squares = block_sum(squares, warps, a);
  if (a.has("half of the block") && threadIdx.x < kThreads / 2) __syncthreads();

  if (threadIdx.x == 0 && a.has("write behind static")) (&warps[0])[kThreads / 32] = 1.0f;
  if (threadIdx.x == 0 && a.has("write before static")) (&warps[0])[-1] = 1.0f;
  if (threadIdx.x == 0 && a.has("write behind dynamic")) row[a.length] = 1.0f;
  if (a.has("misaligned load")) row[0] = __ldg(reinterpret_cast<const float4*>(x + 2)).x;
  if (a.has("misaligned store")) __stcs(reinterpret_cast<float2*>(a.y + 1), make_float2(0.0f, 0.0f));
  for (int i = threadIdx.x; i < a.length; i += kThreads)
    a.y[int64_t{blockIdx.x} * a.length + i] = row[i] * sum + squares;

  if (threadIdx.x == 0) a.sums[blockIdx.x] = sum;
  release_dependents();
  if (is_last_block(a.counter) && threadIdx.x == 0) {
    float total = 0.0f;
    for (int block = 0; block < static_cast<int>(gridDim.x); ++block) total += __ldcg(a.sums + block);
    *a.total = total;
  }
}

// Each builtin once, against what CUDA documents.
struct Results {
  int* wrong;
};
__global__ void __launch_bounds__(64) builtins(const Results r) {
  const int thread = threadIdx.x, lane = thread % 32, other = lane ^ 16;
  const auto expect = [&](bool right, int line) {
    if (!right && *r.wrong == 0) *r.wrong = line;
  };
  expect(__shfl_sync(~0u, lane, 35) == 3, __LINE__);
  expect(__shfl_sync(~0u, lane, 5, 8) == lane / 8 * 8 + 5, __LINE__);
  expect(__shfl_xor_sync(~0u, lane, 16) == other, __LINE__);
  expect(__shfl_xor_sync(~0u, lane, 16, 16) == (other < lane ? other : lane), __LINE__);
  expect(__shfl_down_sync(~0u, lane, 1u) == (lane < 31 ? lane + 1 : lane), __LINE__);
  expect(__shfl_down_sync(~0u, lane, 2u, 4) == (lane % 4 < 2 ? lane + 2 : lane), __LINE__);
  expect(__shfl_down_sync(~0u, 0.5 * lane, 31u) == (lane == 0 ? 15.5 : 0.5 * lane), __LINE__);
  expect(__half2float(__shfl_xor_sync(~0u, __float2half_rn(lane), 1)) == float(lane ^ 1), __LINE__);
  if (lane % 2 == 0) expect(__shfl_xor_sync(0x55555555u, lane, 2) == (lane ^ 2), __LINE__);
  expect(__ballot_sync(~0u, lane % 3 == 0) == 0x49249249u, __LINE__);
  expect(__any_sync(~0u, lane == 7) && !__any_sync(~0u, 0), __LINE__);
  expect(__all_sync(~0u, lane < 32) && !__all_sync(~0u, lane != 7), __LINE__);
  expect(__syncthreads_count(thread % 4 == 0) == 16, __LINE__);
  expect(__syncthreads_or(thread == 40) && !__syncthreads_or(0), __LINE__);
  expect(__syncthreads_and(1) && !__syncthreads_and(thread != 40), __LINE__);
  expect(__umulhi(0x80000000u, 6u) == 3u && __umul64hi(1ull << 63, 6ull) == 3ull, __LINE__);
  expect(__expf(0.0f) == 1.0f && __fdividef(3.0f, 2.0f) == 1.5f && __frcp_rn(4.0f) == 0.25f, __LINE__);
  expect(__fmaf_rn(2.0f, 3.0f, 1.0f) == 7.0f && rsqrtf(4.0f) == 0.5f && min(2, 3) == 2, __LINE__);
  expect(__bfloat162float(__float2bfloat16_rn(1.00390625f)) == 1.0f, __LINE__);
  expect(__float_as_uint(1.0f) == 0x3f800000u && __popc(0xf0fu) == 8, __LINE__);
  const uint4 words = {1, 2, 3, 4};
  uint4 copy = {};
  __stcs(&copy, words);
  const unsigned char bytes[2] = {5, 6};
  expect(__ldcs(&copy).w == 4 && __ldg(&bytes[1]) == 6 && __ldcg(&words).x == 1, __LINE__);
  if (lane >= 16) return;
  // The lanes that have ended are waited for no more.
  expect(__shfl_sync(~0u, lane, 15) == 15 && __ballot_sync(~0u, 1) == 0xffffu, __LINE__);
  expect(__syncthreads_count(1) == 32, __LINE__);
}

// Which thread of the grid came when.
struct Arrivals {
  int* threads;
  int* arrived;
};
__global__ void __launch_bounds__(64) arrive(const Arrivals a) {
  __syncthreads();
  a.threads[atomicAdd(a.arrived, 1)] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

struct Repeats {
  int count;
};
__global__ void __launch_bounds__(256) shuffles(const Repeats r) {
  float v = 1.0f;
  for (int i = 0; i < r.count; ++i) v = __shfl_xor_sync(~0u, v, 1 << i % 5);
}

template <int kThreads>
std::string scale(const std::vector<float>& x, int64_t blocks, int error) {
  const int length = static_cast<int>(static_cast<int64_t>(x.size()) / blocks);
  std::vector<float> y(x.size()), sums(blocks);
  float total = 0.0f;
  int counter = 0;
  const Arguments a{x.data(), y.data(), sums.data(), &total, &counter, length, error};
  const std::string problem =
      launch("scale_rows", scale_rows<kThreads>, a, blocks, kThreads, length * sizeof(float), true, nullptr, 0);
  if (!problem.empty()) return problem;
  float right_total = 0.0f;
  bool right = true;
  for (int64_t row = 0; row < blocks; ++row) {
    float sum = 0.0f, squares = 0.0f;
    for (int i = 0; i < length; ++i) sum += x[row * length + i], squares += x[row * length + i] * x[row * length + i];
    for (int i = 0; i < length; ++i) right = right && y[row * length + i] == x[row * length + i] * sum + squares;
    right_total += sum;
  }
  return right && total == right_total ? "right" : "wrong";
}

std::string try_out(const char* error, int threads, int64_t blocks) {
  if (std::strcmp(error, "builtins") == 0) {
    int wrong = 0;
    launch("builtins", builtins, Results{&wrong}, blocks, 64, 0, false, nullptr, 0);
    return wrong == 0 ? "right" : "wrong: line " + std::to_string(wrong);
  }
  if (std::strcmp(error, "order") == 0) {
    std::vector<int> order(blocks * threads);
    int arrived = 0;
    launch("arrive", arrive, Arrivals{order.data(), &arrived}, blocks, threads, 0, false, nullptr, 0);
    std::string text;
    for (int thread : order) text += std::to_string(thread) + " ";
    return text;
  }
  if (std::strcmp(error, "configuration") == 0)
    return launch("shuffles", shuffles, Repeats{1}, blocks, threads, 0, false, nullptr, 0);
  // Small whole numbers, so that every order of summation gives the same.
  std::vector<float> x(blocks * 4 * 300);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(1 + i % 7);
  const int number = number_of(error);
  if (number == kNumberOfErrors) return "there is no such error";
  return threads == 64 ? scale<64>(x, blocks, number) : scale<256>(x, blocks, number);
}

}  // namespace
}  // namespace senet::cuda

extern "C" [[gnu::visibility("default")]] const char* planted(const char* error, int threads, int64_t blocks) {
  static std::string answer;
  answer = senet::cuda::try_out(error, threads, blocks);
  return answer.c_str();
}

int main(int, char** arguments) {
  const std::string answer = planted(arguments[1], std::atoi(arguments[2]), std::atoll(arguments[3]));
  std::puts(answer.c_str());
  return 0;
}
