// senet_fused._plan: the launch planner and the facts of this build, for Python and its tests.
#include <pybind11/pybind11.h>

#include "plan.h"

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
      "build_info",
      [] {
        py::dict info;
        info["version"] = SENET_BUILD_VERSION;
        info["revision"] = SENET_BUILD_REVISION;
        info["compiler"] = SENET_BUILD_COMPILER;
        info["instruction_sets"] = SENET_BUILD_ISAS;
        info["torch_headers"] = SENET_BUILD_TORCH;
        return info;
      },
      "The version, revision, compiler, instruction sets and torch headers that this package was built with.");
}
