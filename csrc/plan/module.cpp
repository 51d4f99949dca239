// senet_fused._plan: the launch planner and the facts of this build, for Python and its tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda_plan.h"
#include "plan.h"

#ifndef SENET_BUILD_CUDA
#define SENET_BUILD_CUDA "unknown"
#endif
#ifndef SENET_BUILD_COMPILER
#define SENET_BUILD_COMPILER "unknown"
#endif
#ifndef SENET_BUILD_ISAS
#define SENET_BUILD_ISAS "unknown"
#endif
#ifndef SENET_BUILD_TORCH
#define SENET_BUILD_TORCH "unknown"
#endif
#ifndef SENET_BUILD_REVISION
#define SENET_BUILD_REVISION "unknown"
#endif
#ifndef SENET_BUILD_VERSION
#define SENET_BUILD_VERSION "unknown"
#endif

namespace py = pybind11;

namespace {

senet::CudaProblem checked(const senet::CudaProblem& p) {
  const bool tail = p.is_tail();
  if (p.n < 0 || p.c < 1 || p.r < (tail ? 0 : 1) || p.m < 1 || (p.element_size != 2 && p.element_size != 4) ||
      (p.weight_size != 2 && p.weight_size != 4))
    throw py::value_error(
        "CudaProblem: n must be >= 0, channels, reduced and positions >= 1, element_size and weight_size 2 or 4");
  if (tail && p.squeeze != senet::Squeeze::avg) throw py::value_error("CudaProblem: block tails squeeze by the mean");
  return p;
}

senet::CudaFacts checked(const senet::CudaFacts& f) {
  if (f.capability < 80 || f.sms < 1 || f.shared_bytes < 48 * 1024 || f.l2_bytes < 0)
    throw py::value_error(
        "CudaFacts: capability must be 80 or more (as 80, 90, ...), sms >= 1, shared_bytes >= 49152, l2_bytes >= 0");
  return f;
}

void bind_cuda(py::module_& m) {
  py::class_<senet::CudaProblem>(m, "CudaProblem",
                                 "One direction of one SE layer or block tail, as the CUDA planner sees it.")
      .def(py::init([](int64_t n, int64_t channels, int64_t reduced, int64_t positions, int64_t element_size,
                       int64_t weight_size, bool channels_last, int64_t squeeze, bool relu, bool residual,
                       bool backward, int64_t norm) {
             if (squeeze < 0 || squeeze >= senet::kSqueezes) throw py::value_error("CudaProblem: unknown squeeze");
             if (norm < 0 || norm >= senet::kCudaNorms) throw py::value_error("CudaProblem: unknown norm");
             return checked({{n, channels, reduced, positions, element_size, weight_size, channels_last, backward},
                             static_cast<senet::Squeeze>(squeeze),
                             relu,
                             residual,
                             static_cast<senet::CudaNorm>(norm)});
           }),
           py::arg("n"), py::arg("channels"), py::arg("reduced"), py::arg("positions"), py::arg("element_size") = 2,
           py::arg("weight_size") = 2, py::arg("channels_last") = true, py::arg("squeeze") = 0, py::arg("relu") = false,
           py::arg("residual") = false, py::arg("backward") = false, py::arg("norm") = 0);

  py::class_<senet::CudaFacts>(m, "CudaFacts", "What the CUDA planner wants to know of a GPU.")
      .def(py::init([](int64_t capability, int64_t sms, int64_t shared_bytes, int64_t l2_bytes) {
             return checked(senet::CudaFacts{capability, sms, shared_bytes, l2_bytes});
           }),
           py::arg("capability"), py::arg("sms"), py::arg("shared_bytes"), py::arg("l2_bytes"));

  py::class_<senet::CudaPlan>(m, "CudaPlan")
      .def_property_readonly("strategy", [](const senet::CudaPlan& p) { return senet::name(p.strategy); })
      .def_property_readonly("form", [](const senet::CudaPlan& p) { return senet::name(p.form); })
      .def_readonly("samples", &senet::CudaPlan::samples)
      .def_readonly("channels", &senet::CudaPlan::channels)
      .def_readonly("positions", &senet::CudaPlan::positions)
      .def_readonly("splits", &senet::CudaPlan::splits)
      .def_readonly("lanes", &senet::CudaPlan::lanes)
      .def_readonly("dependent_launch", &senet::CudaPlan::dependent_launch)
      .def_readonly("stream_stores", &senet::CudaPlan::stream_stores)
      .def(
          "numbers",
          [](const senet::CudaPlan& p) {
            return py::make_tuple(static_cast<int64_t>(p.strategy), static_cast<int64_t>(p.form), p.samples, p.channels,
                                  p.positions, p.lanes, p.dependent_launch, p.stream_stores);
          },
          "The plan as the operators of the CUDA library take it.")
      .def(
          "replace",
          [](const senet::CudaPlan& p, const senet::CudaProblem& problem, int64_t samples, int64_t channels,
             int64_t positions, int64_t lanes) {
            senet::CudaPlan changed = p;
            if (samples > 0) changed.samples = samples;
            if (channels > 0) changed.channels = channels;
            if (positions > 0) changed.positions = positions;
            if (lanes > 0) changed.lanes = lanes;
            changed.splits = (problem.m + changed.positions - 1) / changed.positions;
            const std::string wrong = senet::misfit(problem, changed);
            if (!wrong.empty()) throw py::value_error(senet::text(changed) + ": " + wrong);
            return changed;
          },
          py::arg("problem"), py::kw_only(), py::arg("samples") = 0, py::arg("channels") = 0, py::arg("positions") = 0,
          py::arg("lanes") = 0, "A plan with another tile. Raises ValueError if the kernels cannot carry it out.")
      .def("__repr__", [](const senet::CudaPlan& p) { return "CudaPlan(" + senet::text(p) + ")"; });

  m.def(
      "plan_cuda", [](const senet::CudaProblem& p, const senet::CudaFacts& f) { return senet::plan_cuda(p, f); },
      py::arg("problem"), py::arg("facts"), "The plan of a problem on a GPU.");
  m.def(
      "cuda_candidates",
      [](const senet::CudaProblem& p, const senet::CudaFacts& f) { return senet::cuda_candidates(p, f); },
      py::arg("problem"), py::arg("facts"), "Every plan that is considered, the cheapest first.");
  m.def("cuda_reason", &senet::reason, py::arg("problem"), py::arg("facts"), py::arg("plan"), "Why a plan, in words.");
  m.def(
      "cuda_workspace",
      [](const senet::CudaProblem& p, const senet::CudaPlan& plan, bool kept, bool gate) {
        return senet::workspace(p, plan, kept, gate).size;
      },
      py::arg("problem"), py::arg("plan"), py::arg("kept"), py::arg("gate"),
      "Floats of workspace. kept: pooled and preact are kept for a backward (forward). gate: the gate is kept "
      "(forward), dx is wanted (backward).");
  m.def(
      "cuda_tail_workspace",
      [](const senet::CudaProblem& p, const senet::CudaPlan& plan) { return senet::tail_workspace(p, plan).size; },
      py::arg("problem"), py::arg("plan"), "Floats of workspace of a block tail.");
  m.def("cuda_counters", &senet::counted_groups, py::arg("problem"), py::arg("plan"),
        "Counters that a call takes, all of them at zero.");
  m.def(
      "cuda_bytes",
      [](const senet::CudaProblem& p, const senet::CudaPlan& plan, int64_t batch) {
        const senet::CudaBytes bytes = senet::count_bytes(p, plan, batch);
        py::dict d;
        d["tensor"] = bytes.tensor;
        d["mask"] = bytes.mask;
        d["weights"] = bytes.weights;
        d["shares"] = bytes.shares;
        d["vectors"] = bytes.vectors;
        return d;
      },
      py::arg("problem"), py::arg("plan"), py::arg("batch"),
      "The bytes that the kernels load and store, by what they are.");
  m.attr("EXCITE_SAMPLES") = senet::kMaxSamples;
  m.attr("EXCITE_CHANNELS") = senet::kExciteChannels;
  m.attr("TAIL_CHANNELS") = senet::kTailChannels;
}

}  // namespace

PYBIND11_MODULE(_plan, m) {
  m.doc() = "The launch planner and the facts of this build.";

  py::class_<senet::CpuPlan>(m, "CpuPlan")
      .def_property_readonly("strategy", [](const senet::CpuPlan& p) { return senet::name(p.strategy); })
      .def_readonly("samples_at_a_time", &senet::CpuPlan::samples_at_a_time)
      .def_readonly("pieces_per_sample", &senet::CpuPlan::pieces_per_sample)
      .def_readonly("stream_stores", &senet::CpuPlan::stream_stores)
      .def_readonly("reason", &senet::CpuPlan::reason)
      .def("__repr__", [](const senet::CpuPlan& p) {
        return py::str(
                   "CpuPlan(strategy={!r}, samples_at_a_time={}, pieces_per_sample={}, stream_stores={}, reason={!r})")
            .format(senet::name(p.strategy), p.samples_at_a_time, p.pieces_per_sample, p.stream_stores, p.reason);
      });

  m.def(
      "plan_cpu",
      [](int64_t n, int64_t c, int64_t r, int64_t spatial, int64_t element_size, int64_t weight_size,
         bool channels_last, bool backward, int64_t threads, int64_t l2_bytes, int64_t l3_bytes) {
        if (n < 0 || c < 1 || r < 1 || spatial < 1 || element_size < 1 || weight_size < 1 || threads < 1 ||
            l2_bytes < 0 || l3_bytes < 0)
          throw py::value_error("plan_cpu: n, l2_bytes and l3_bytes must be >= 0, every other size >= 1");
        return senet::plan_cpu({n, c, r, spatial, element_size, weight_size, channels_last, backward},
                               {threads, l2_bytes, l3_bytes});
      },
      py::arg("n"), py::arg("c"), py::arg("r"), py::arg("spatial"), py::kw_only(), py::arg("element_size") = 4,
      py::arg("weight_size") = 4, py::arg("channels_last") = false, py::arg("backward") = false, py::arg("threads"),
      py::arg("l2_bytes"), py::arg("l3_bytes"),
      "How the CPU backend runs x [n, c, spatial] with a bottleneck of r, on a machine with these facts (bytes).");

  m.def(
      "plan_cpu_tail",
      [](int64_t n, int64_t c, int64_t spatial, int64_t element_size, bool backward, int64_t threads, int64_t l2_bytes,
         int64_t l3_bytes) {
        if (n < 0 || c < 1 || spatial < 1 || element_size < 1 || threads < 1 || l2_bytes < 0 || l3_bytes < 0)
          throw py::value_error("plan_cpu_tail: n, l2_bytes and l3_bytes must be >= 0, every other size >= 1");
        return senet::plan_cpu_tail({n, c, 0, spatial, element_size, 0, false, backward},
                                    {threads, l2_bytes, l3_bytes});
      },
      py::arg("n"), py::arg("c"), py::arg("spatial"), py::kw_only(), py::arg("element_size") = 4,
      py::arg("backward") = false, py::arg("threads"), py::arg("l2_bytes"), py::arg("l3_bytes"),
      "How the CPU backend runs a block tail on x [n, c, spatial], on a machine with these facts (bytes).");

  bind_cuda(m);

  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = SENET_BUILD_VERSION;
        info["revision"] = SENET_BUILD_REVISION;
        info["compiler"] = SENET_BUILD_COMPILER;
        info["instruction_sets"] = SENET_BUILD_ISAS;
        info["cuda"] = SENET_BUILD_CUDA;
        info["torch_headers"] = SENET_BUILD_TORCH;
        return info;
      },
      "The version, revision, compiler, instruction sets, CUDA compiler and torch headers that this package was built "
      "with.");
}
