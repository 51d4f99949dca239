"""Measurement: what is compared, how it is checked and timed, and the reports.

    problems     the SE layers of known networks, and the case that one measurement is (no torch)
    oracle       float64 results and the error bound: a provider whose output is wrong is not timed
    buffers      weights, the inputs that are judged, and the rotating inputs that keep the caches cold
    providers    eager, compile, max-autotune, fused, cuda, triton and fused+compile behind one interface, and the copy
    timing       interleaved wall-clock sampling;  cuda_timing: CUDA graphs
    runner       one case after the other -> rows
    report       rows -> tables, summary;  plot: rows -> pictures
    command      `senet-fused bench`: arguments and exit status

Whole networks, `senet-fused bench model`:

    zoo          networks by name: timm's, torchvision's, and those of files
    variants     stock, without SE, fused, tails, and folded, each as it is, compiled, or as a CUDA graph
    model_case   input, loss, the check against stock, the timed call;  model_memory: saved and peak bytes
    model_run    one case after the other -> rows;  largest_batch: --batch max
    model_report, model   as report and command

Both: session (their options, and the way from cases to exit status), header, progress, tables, saved (JSON), and
compare, `senet-fused bench compare`.

Nothing is imported here, so `senet-fused --help` stays quick.
"""
