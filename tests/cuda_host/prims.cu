// Small kernels around each primitive of csrc/cuda/prim, for tests/test_cuda_prims.py. They do nothing but bring
// memory to a primitive and its results back, so that a result can be held against a model in Python. Every function
// takes pointers, int64_t and float, and returns an empty text or what went wrong with its launch.
#include "cuda/launch.cuh"

#include <algorithm>
#include <cstdint>
#include <string>

#include "cuda/prim/bits.cuh"
#include "cuda/prim/divide.cuh"
#include "cuda/prim/element.cuh"
#include "cuda/prim/function.cuh"
#include "cuda/prim/pack.cuh"
#include "cuda/prim/port.cuh"
#include "cuda/prim/product.cuh"
#include "cuda/prim/reduce.cuh"
#include "cuda/prim/walk.cuh"
#include "cuda/prim/weights.cuh"

#define SENET_TEST extern "C" __attribute__((visibility("default"))) const char*

namespace senet::cuda {
namespace {

__device__ int64_t index() { return static_cast<int64_t>(blockIdx.x) * kThreads + thread_index(); }

const char* kept(const std::string& error) {
  static std::string text;
  text = error;
  return text.c_str();
}

template <class A>
std::string run_blocks(const char* name, void (*kernel)(A), const A& arguments, int64_t blocks,
                       size_t shared_bytes = 0) {
  return launch(name, kernel, arguments, blocks, kThreads, shared_bytes, false, nullptr, 0);
}

// A thread for each of n.
template <class A>
std::string run_threads(const char* name, void (*kernel)(A), const A& arguments, int64_t n) {
  return run_blocks(name, kernel, arguments, (n + kThreads - 1) / kThreads);
}

// ---------------------------------------------------------------------- element

struct Widening {
  const void* elements;
  float *singles, *from_words;
  int64_t words;
};

template <class T>
__global__ void widen_kernel(const Widening a) {
  constexpr int kEach = 4 / sizeof(T);
  const int64_t word = index();
  if (word >= a.words) return;
  widen(static_cast<const uint32_t*>(a.elements)[word], a.from_words + word * kEach, T());
  for (int64_t i = word * kEach; i < (word + 1) * kEach; ++i)
    a.singles[i] = to_float(static_cast<const T*>(a.elements)[i]);
}

struct Narrowing {
  const float* values;
  void* elements;
  uint32_t* words;
  int64_t count;  // of words
};

template <class T>
__global__ void narrow_kernel(const Narrowing a) {
  constexpr int kEach = 4 / sizeof(T);
  const int64_t word = index();
  if (word >= a.count) return;
  a.words[word] = narrow(a.values + word * kEach, T());
  for (int64_t i = word * kEach; i < (word + 1) * kEach; ++i) from_float(a.values[i], static_cast<T*>(a.elements)[i]);
}

// ---------------------------------------------------------------------- pack

struct Packs {
  const void* from;
  void *copied, *converted;
  float* values;
  int64_t n;
  bool stream;
};

template <class T, bool kStream>
__global__ void packs_kernel(const Packs a) {
  const int64_t i = index();
  if (i >= a.n) return;
  const Pack<T> p = load_pack<kStream>(static_cast<const T*>(a.from) + i * kPack);
  float v[kPack];
  unpack(p, v);
  for (int j = 0; j < kPack; ++j) a.values[i * kPack + j] = v[j];
  store_pack(static_cast<T*>(a.copied) + i * kPack, p, a.stream);
  store_pack(static_cast<T*>(a.converted) + i * kPack, pack<T>(v), a.stream);
}

struct PartCase {
  int64_t offset, lo, hi, wide;
};
struct Parts {
  const PartCase* cases;
  const void* from;     // to load from
  const float* values;  // to store: 8 for each case
  void* to;
  int64_t n;
};

template <class T>
__global__ void load_parts_kernel(const Parts a) {
  const int64_t i = index();
  if (i >= a.n) return;
  const PartCase c = a.cases[i];
  const Pack<T> p =
      load_part(static_cast<const T*>(a.from) + c.offset, static_cast<int>(c.lo), static_cast<int>(c.hi), c.wide != 0);
  store_pack(static_cast<T*>(a.to) + i * kPack, p, false);
}

template <class T>
__global__ void store_parts_kernel(const Parts a) {
  const int64_t i = index();
  if (i >= a.n) return;
  const PartCase c = a.cases[i];
  float v[kPack];
  for (int j = 0; j < kPack; ++j) v[j] = a.values[i * kPack + j];
  store_part(static_cast<T*>(a.to) + c.offset, v, static_cast<int>(c.lo), static_cast<int>(c.hi));
}

// ---------------------------------------------------------------------- walk

struct WalkCase {
  int64_t first, end, step;
};
struct Walks {
  const WalkCase* cases;
  int* log;  // 2 * i for load(i), 2 * i + 1 for use(i, what load(i) gave), -1 for use(i, anything else)
  int64_t n, room;
};

template <int kAtOnce>
__global__ void in_flight_kernel(const Walks a) {
  const int64_t i = index();
  if (i >= a.n) return;
  const WalkCase c = a.cases[i];
  int* at = a.log + i * a.room;
  in_flight<kAtOnce>(
      static_cast<int>(c.first), static_cast<int>(c.end), static_cast<int>(c.step),
      [&](int k) {
        *at++ = 2 * k;
        return 1000 + k;
      },
      [&](int k, int loaded) { *at++ = loaded == 1000 + k ? 2 * k + 1 : -1; });
}

constexpr int kMostLanes = 32, kMostPacks = 8;

struct RangeCase {
  int64_t begin, end, lanes, wide;
};
struct Ranges {
  const RangeCase* cases;
  int *whole, *parts;  // calls for each pack
  int* covered;        // calls of use for each element
  int* wrong;          // calls for nothing, for other packs, or with what was loaded for another
  int64_t n;
};
struct Loaded {
  int pack, lo, hi;
};

template <int kAtOnce>
__global__ void over_packs_kernel(const Ranges a) {
  const int64_t i = index() / kMostLanes;
  const int lane = static_cast<int>(index() % kMostLanes);
  if (i >= a.n || lane >= a.cases[i].lanes) return;
  const RangeCase c = a.cases[i];
  const auto count = [&](int* counts, int k) {
    if (k < 0 || k >= kMostPacks)
      atomicAdd(a.wrong + i, 1);
    else
      atomicAdd(counts + i * kMostPacks + k, 1);
  };
  over_packs<kAtOnce>(
      static_cast<int>(c.begin), static_cast<int>(c.end), lane, static_cast<int>(c.lanes), c.wide != 0,
      [&](int k) {
        count(a.whole, k);
        return Loaded{k, 0, kPack};
      },
      [&](int k, int lo, int hi) {
        count(a.parts, k);
        return Loaded{k, lo, hi};
      },
      [&](int k, int lo, int hi, const Loaded& loaded) {
        const bool right = loaded.pack == k && loaded.lo == lo && loaded.hi == hi && 0 <= lo && lo < hi && hi <= kPack;
        if (!right || k < 0 || k >= kMostPacks)
          atomicAdd(a.wrong + i, 1);
        else
          for (int e = lo; e < hi; ++e) atomicAdd(a.covered + (i * kMostPacks + k) * kPack + e, 1);
      });
}

// ---------------------------------------------------------------------- bits

struct BitCase {
  int64_t byte, at, count, m;  // m = 0: bits_at
};
struct Bits {
  const BitCase* cases;
  const uint8_t* bytes;
  int64_t* out;
  int64_t n;
};

__global__ void bits_kernel(const Bits a) {
  const int64_t i = index();
  if (i >= a.n) return;
  const BitCase c = a.cases[i];
  const int count = static_cast<int>(c.count);
  a.out[i] = c.m == 0 ? bits_at(a.bytes + c.byte, c.at, count)
                      : plane_bits(a.bytes + c.byte, static_cast<int>(c.at), count, static_cast<int>(c.m));
}

// ---------------------------------------------------------------------- divide

struct Divisions {
  const Divisor* divisors;
  const int64_t* n;  // [count][each]
  int64_t* out;
  int64_t count, each;
};

__global__ void divide_kernel(const Divisions a) {
  const int64_t i = index();
  if (i >= a.count * a.each) return;
  a.out[i] = a.divisors[i / a.each].divide(static_cast<uint32_t>(a.n[i]));
}

// ---------------------------------------------------------------------- function

struct Functions {
  Elementwise function;
  const float *upstream, *v;
  float* out;
  int64_t which, n;
};

__global__ void function_kernel(const Functions a) {
  const int64_t i = index();
  if (i >= a.n) return;
  a.out[i] = a.which == 0   ? apply(a.function, a.v[i])
             : a.which == 1 ? through_act(a.function, a.upstream[i], a.v[i])
                            : through_gate(a.function, a.upstream[i], a.v[i]);
}

// ---------------------------------------------------------------------- weights

struct WeightCase {
  int64_t at, count;
};
struct Weights {
  Matrix w;
  const WeightCase* cases;
  float *four, *one;
  int64_t n;
};

__global__ void load_weights_kernel(const Weights a) {
  const int64_t i = index();
  if (i >= a.n) return;
  const WeightCase c = a.cases[i];
  const float4 four = weights_at(a.w, c.at, static_cast<int>(c.count));
  a.four[4 * i] = four.x, a.four[4 * i + 1] = four.y, a.four[4 * i + 2] = four.z, a.four[4 * i + 3] = four.w;
  if (c.count > 0) a.one[i] = weight_at(a.w, c.at);
}

struct StoredWeights {
  void* data;
  Type type;
  const int64_t* at;
  const float* values;
  int64_t n;
};

__global__ void store_weights_kernel(const StoredWeights a) {
  const int64_t i = index();
  if (i < a.n) store_weight(a.data, a.type, a.at[i], a.values[i]);
}

// ---------------------------------------------------------------------- reduce

struct Groups {
  const float* v;
  float *sums, *peaks, *doubled;
  int64_t lanes;
};

__global__ void groups_kernel(const Groups a) {
  SENET_SHARED(float, memory, kThreads / 32);
  const int lanes = static_cast<int>(a.lanes);
  float* scratch = lanes > 32 ? memory : nullptr;
  const float v = a.v[index()];
  // One behind the other, without a barrier of the caller's in between.
  a.sums[index()] = group_sum(v, lanes, scratch);
  a.peaks[index()] = group_max(v, lanes, scratch);
  a.doubled[index()] = group_sum(v + v, lanes, scratch);
}

struct Rows {
  const float* v;  // [rows][items][4]
  float *out, *before;
  int *reads, *calls;  // [rows][items], [items]
  int64_t rows, items;
};

// What a caller may count on: its own use of scratch right in front and right behind disturbs nothing.
__global__ void rows_kernel(const Rows a) {
  constexpr int kScratchFloats = 4 * kThreads;
  SENET_SHARED(float, scratch, kScratchFloats);
  for (int i = thread_index(); i < kScratchFloats; i += kThreads) scratch[i] = static_cast<float>(i);
  __syncthreads();
  a.before[thread_index()] = scratch[(thread_index() + 97) % kScratchFloats];
  sum_rows(
      static_cast<int>(a.rows), static_cast<int>(a.items), scratch,
      [&](int row, int i) {
        atomicAdd(a.reads + row * a.items + i, 1);
        return *reinterpret_cast<const float4*>(a.v + 4 * (row * a.items + i));
      },
      [&](int i, const float4& sum) {
        atomicAdd(a.calls + i, 1);
        *reinterpret_cast<float4*>(a.out + 4 * i) = sum;
      });
  for (int i = thread_index(); i < kScratchFloats; i += kThreads) scratch[kScratchFloats - 1 - i] = -1e30f;
}

struct Arrivals {
  int* data;                            // [count][groups][kThreads]
  int *counters, *last_threads, *sums;  // [2][groups], [groups], [groups][kThreads]
  int64_t groups, count;
};

__global__ void arrivals_kernel(const Arrivals a) {
  const int64_t group = blockIdx.x % a.groups;
  a.data[index()] = static_cast<int>(index() + 1);
  const bool last = is_last_block(a.counters + group, static_cast<int>(a.count));
  // At once again, and now another block is missing: that answer must not get in the way of the first.
  const bool never = is_last_block(a.counters + a.groups + group, static_cast<int>(a.count) + 1);
  if (!last && !never) return;
  atomicAdd(a.last_threads + group, 1);
  // What another thread of each block wrote.
  int sum = 0;
  for (int64_t k = 0; k < a.count; ++k)
    sum += __ldcg(a.data + (k * a.groups + group) * kThreads + (thread_index() + 1) % kThreads);
  a.sums[group * kThreads + thread_index()] = sum;
}

// ---------------------------------------------------------------------- product

struct Product {
  Matrix w;
  int64_t first, row_stride;
  int outer, inner, stride, samples;
  const float* v;  // [samples][stride]
  float* out;      // [samples][outer]
  int* calls;
  bool columns;
};

template <class Size>
__global__ void __launch_bounds__(kThreads) product_kernel(const Product a) {
  SENET_SHARED(float, scratch, kProductScratch<Size>);
  SENET_DYNAMIC_SHARED(memory);
  float* v = reinterpret_cast<float*>(memory);
  for (int i = thread_index(); i < a.samples * a.stride; i += kThreads) v[i] = a.v[i];
  __syncthreads();
  const auto out = [&](int s, int k, float total) {
    a.out[static_cast<int64_t>(s) * a.outer + k] = total;
    atomicAdd(a.calls + static_cast<int64_t>(s) * a.outer + k, 1);
  };
  if (!a.columns) {
    rows_dot<Size>(a.w, a.first, a.row_stride, a.outer, a.inner, v, a.stride, a.samples, out);
    return;
  }
  columns_dot<Size>(a.w, a.first, a.row_stride, a.outer, a.inner, v, a.stride, a.samples, scratch, out);
  // It ends behind a barrier, so this disturbs nothing.
  constexpr int kFloats = kProductScratch<Size>;
  for (int i = thread_index(); i < kFloats; i += kThreads) scratch[kFloats - 1 - i] = -1e30f;
  for (int i = thread_index(); i < a.samples * a.stride; i += kThreads) v[a.samples * a.stride - 1 - i] = -1e30f;
}

// ---------------------------------------------------------------------- port

struct Staging {
  const unsigned char* from;
  uint4* to;  // the other way round
  int64_t n;  // of 16 bytes
};

__global__ void staging_kernel(const Staging a) {
  SENET_DYNAMIC_SHARED(memory);
  for (int64_t i = thread_index(); i < a.n; i += kThreads) copy_async(memory + 16 * i, a.from + 16 * i);
  copy_wait();
  __syncthreads();
  for (int64_t i = thread_index(); i < a.n; i += kThreads)
    a.to[i] = reinterpret_cast<const uint4*>(memory)[a.n - 1 - i];
}

}  // namespace
}  // namespace senet::cuda

using namespace senet::cuda;

SENET_TEST test_widen(int64_t type, const void* elements, int64_t words, float* singles, float* from_words) {
  return kept(with_type(static_cast<Dtype>(type), [&](auto t) {
    return run_threads("widen", widen_kernel<decltype(t)>, Widening{elements, singles, from_words, words}, words);
  }));
}

SENET_TEST test_narrow(int64_t type, const float* values, int64_t words, void* elements, uint32_t* packed) {
  return kept(with_type(static_cast<Dtype>(type), [&](auto t) {
    return run_threads("narrow", narrow_kernel<decltype(t)>, Narrowing{values, elements, packed, words}, words);
  }));
}

SENET_TEST test_packs(int64_t type, const void* from, int64_t n, int64_t stream_loads, int64_t stream_stores,
                      void* copied, void* converted, float* values) {
  return kept(with_type(static_cast<Dtype>(type), [&](auto t) {
    using T = decltype(t);
    const Packs a{from, copied, converted, values, n, stream_stores != 0};
    return run_threads("packs", stream_loads != 0 ? packs_kernel<T, true> : packs_kernel<T, false>, a, n);
  }));
}

SENET_TEST test_load_parts(int64_t type, const PartCase* cases, int64_t n, const void* from, void* to) {
  return kept(with_type(static_cast<Dtype>(type), [&](auto t) {
    return run_threads("load_parts", load_parts_kernel<decltype(t)>, Parts{cases, from, nullptr, to, n}, n);
  }));
}

SENET_TEST test_store_parts(int64_t type, const PartCase* cases, int64_t n, const float* values, void* to) {
  return kept(with_type(static_cast<Dtype>(type), [&](auto t) {
    return run_threads("store_parts", store_parts_kernel<decltype(t)>, Parts{cases, nullptr, values, to, n}, n);
  }));
}

SENET_TEST test_in_flight(int64_t at_once, const WalkCase* cases, int64_t n, int* log, int64_t room) {
  const auto kernel = at_once == 1 ? in_flight_kernel<1> : at_once == 2 ? in_flight_kernel<2> : in_flight_kernel<4>;
  return kept(run_threads("in_flight", kernel, Walks{cases, log, n, room}, n));
}

SENET_TEST test_over_packs(int64_t at_once, const RangeCase* cases, int64_t n, int* whole, int* parts, int* covered,
                           int* wrong) {
  const auto kernel = at_once == 1 ? over_packs_kernel<1> : at_once == 2 ? over_packs_kernel<2> : over_packs_kernel<4>;
  return kept(run_threads("over_packs", kernel, Ranges{cases, whole, parts, covered, wrong, n}, n * kMostLanes));
}

SENET_TEST test_bits(const BitCase* cases, int64_t n, const uint8_t* bytes, int64_t* out) {
  return kept(run_threads("bits", bits_kernel, Bits{cases, bytes, out, n}, n));
}

// On the host, as callers of kernels do it.
SENET_TEST test_divisors(const int64_t* d, Divisor* out, int64_t n) {
  static_assert(sizeof(Divisor) == 12);
  for (int64_t i = 0; i < n; ++i) out[i] = Divisor::of(d[i]);
  return "";
}

SENET_TEST test_divide(const Divisor* divisors, int64_t count, int64_t each, const int64_t* n, int64_t* out) {
  return kept(run_threads("divide", divide_kernel, Divisions{divisors, n, out, count, each}, count * each));
}

SENET_TEST test_function(int64_t which, int64_t function, float p0, float p1, const float* upstream, const float* v,
                         int64_t n, float* out) {
  const Elementwise f{static_cast<senet::Function>(function), p0, p1};
  return kept(run_threads("function", function_kernel, Functions{f, upstream, v, out, which, n}, n));
}

SENET_TEST test_load_weights(const void* data, int64_t type, int64_t wide, const WeightCase* cases, int64_t n,
                             float* four, float* one) {
  const Matrix w{data, static_cast<Type>(type), wide != 0};
  return kept(run_threads("load_weights", load_weights_kernel, Weights{w, cases, four, one, n}, n));
}

SENET_TEST test_store_weights(void* data, int64_t type, const int64_t* at, const float* values, int64_t n) {
  const StoredWeights a{data, static_cast<Type>(type), at, values, n};
  return kept(run_threads("store_weights", store_weights_kernel, a, n));
}

SENET_TEST test_groups(const float* v, int64_t blocks, int64_t lanes, float* sums, float* peaks, float* doubled) {
  return kept(run_blocks("groups", groups_kernel, Groups{v, sums, peaks, doubled, lanes}, blocks));
}

SENET_TEST test_sum_rows(const float* v, int64_t rows, int64_t items, float* out, float* before, int* reads,
                         int* calls) {
  return kept(run_blocks("sum_rows", rows_kernel, Rows{v, out, before, reads, calls, rows, items}, 1));
}

SENET_TEST test_is_last_block(int64_t groups, int64_t count, int* data, int* counters, int* last_threads, int* sums) {
  const Arrivals a{data, counters, last_threads, sums, groups, count};
  return kept(run_blocks("is_last_block", arrivals_kernel, a, groups * count));
}

SENET_TEST test_product(int64_t by_itself, int64_t columns, const void* data, int64_t type, int64_t wide, int64_t first,
                        int64_t row_stride, int64_t outer, int64_t inner, const float* v, int64_t stride,
                        int64_t samples, float* out, int* calls) {
  const auto narrow = [](int64_t n) { return static_cast<int>(n); };
  const Product a{{data, static_cast<Type>(type), wide != 0},
                  first,
                  row_stride,
                  narrow(outer),
                  narrow(inner),
                  narrow(stride),
                  narrow(samples),
                  v,
                  out,
                  calls,
                  columns != 0};
  const size_t shared = samples * stride * sizeof(float);
  if (by_itself != 0) return kept(run_blocks("product", product_kernel<ByItself>, a, 1, shared));
  return kept(run_blocks("product", product_kernel<InSweep>, a, 1, shared));
}

SENET_TEST test_staging(const unsigned char* from, void* to, int64_t n) {
  return kept(run_blocks("staging", staging_kernel, Staging{from, static_cast<uint4*>(to), n}, 1, 16 * n));
}
