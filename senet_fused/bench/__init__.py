"""Measurement: problems, what is compared, how it is timed, and the report.

    problems     the SE layers of known networks, and the case that one measurement is: such a layer, or the block tail
                 around it (no torch)
    providers    eager, compile, max-autotune, fused, cuda, triton and fused+compile behind one interface, and the copy,
                 their ceiling
    oracle       float64 results and the error bound: a provider whose output is wrong is not timed
    buffers      weights, the inputs that are judged, and the rotating inputs that keep the caches cold
    timing       interleaved wall-clock sampling;  cuda_timing: CUDA-graph replays beside it
    runner       one case after the other -> rows
    report       rows -> terminal tables, summary, JSON and back;  plot: rows -> pictures
    tables       how tables look;  header: what a run is stamped with
    command      the arguments of `senet-fused bench` and its exit status
    compare      `senet-fused bench compare`: two saved runs, row by row

Whole networks, `senet-fused bench model`:

    zoo          networks by name: timm's, torchvision's, and those of files
    presets      networks and defaults by a short name
    variants     stock, the twin without SE, fused, tails, and folded, each as it is, compiled, or as a CUDA graph
    model_case   input, loss, the check against stock, the timed call;  model_run: one case after the other -> rows
    largest_batch  --batch max
    model_graph  a call as a CUDA graph
    model_memory what autograd saves, and the peak of a training step
    model_report rows -> tables, summary
    model        its arguments and its exit status

Nothing is imported here, so `senet-fused --help` stays quick.
"""
