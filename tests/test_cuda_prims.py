"""Each CUDA primitive (csrc/cuda/prim) on its own, held against a model in PyTorch or plain Python.

The kernels around them are in tests/cuda_host/prims.cu. They run on the host, and also on a GPU where there is one and
nvcc; SENET_HOST_SANITIZE=1 takes the host's with sanitizers, as for tests/test_cuda_kernels.py.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import random
import shutil
import subprocess

import pytest
import torch
from cuda_host import build
from torch import Tensor

from senet_fused.activations import ACT_NAMES, GATE_NAMES, Activation

SOURCE = "tests/cuda_host/prims.cu"
TYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of the kernels' enums
PAGE = mmap.PAGESIZE
PACK = 8
SEEDS = range(4)
nan, inf = math.nan, math.inf

VENUES = ["host"]
if torch.cuda.is_available() and shutil.which("nvcc") is not None:
    VENUES.append("device")


class Venue:
    """Where the kernels run, and the memory that they see there."""

    def __init__(self, name: str, path: os.PathLike[str]):
        self.device = "cpu" if name == "host" else "cuda:0"
        self.library = ctypes.CDLL(str(path))

    def call(self, function: str, *arguments: Tensor | int | float) -> None:
        symbol = getattr(self.library, f"test_{function}")
        symbol.restype = ctypes.c_char_p
        error = symbol(*map(self._argument, arguments))
        assert error == b"", error
        if self.device != "cpu":
            torch.cuda.synchronize()

    def _argument(self, value: Tensor | int | float) -> object:
        if isinstance(value, Tensor):
            assert value.is_contiguous() and value.device == torch.device(self.device)
            return ctypes.c_void_p(value.data_ptr())
        return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)

    def of(self, values: Tensor | list, dtype: torch.dtype | None = None) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).contiguous().to(self.device)

    def full(self, *shape: int, fill: float = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, fill, dtype=dtype, device=self.device)

    def between_walls(self, values: Tensor) -> Tensor:
        """A copy of whole pages. On the host, who touches the byte in front of it or behind it gets a SIGSEGV."""
        if self.device != "cpu":
            return values.to(self.device)
        assert values.nbytes % PAGE == 0
        area = mmap.mmap(-1, values.nbytes + 2 * PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        libc = ctypes.CDLL(None, use_errno=True)
        for wall in (address, address + PAGE + values.nbytes):
            assert libc.mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(PAGE), 0) == 0, ctypes.get_errno()
        inside = torch.frombuffer(area, dtype=values.dtype, count=values.numel(), offset=PAGE)
        return inside.copy_(values)

    def seeds(self):
        """Orders to run the threads in, one after another; a GPU has its own."""
        for seed in SEEDS:
            if self.device == "cpu":
                self.library.senet_host_seed(seed)
            yield seed


@pytest.fixture(scope="module", params=VENUES)
def venue(request, tmp_path_factory) -> Venue:
    if request.param == "host":
        if (problem := build.problem()) is not None:
            pytest.skip(problem)
        sanitize = os.environ.get("SENET_HOST_SANITIZE") == "1"
        return Venue("host", build.build([SOURCE], "prims.so", sanitize=sanitize))
    path = tmp_path_factory.mktemp("device") / "prims.so"
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-arch=native", "-cudart=static", f"-I{build.CSRC}"]
    flags += ["-shared", "-Xcompiler=-fPIC"]
    subprocess.run(["nvcc", *flags, str(build.ROOT / SOURCE), "-o", str(path)], check=True)
    return Venue("device", path)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits_of(t: Tensor) -> Tensor:
    return t.view({4: torch.int32, 2: torch.int16, 1: torch.int8}[t.element_size()])


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Bit by bit, but any NaN for any NaN."""
    found, expected = found.cpu(), expected.cpu()
    assert found.dtype == expected.dtype and found.shape == expected.shape
    is_nan = expected.isnan()
    assert torch.equal(found.isnan(), is_nan)
    assert torch.equal(bits_of(found)[~is_nan], bits_of(expected)[~is_nan])


def random_bits(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Elements of any kind: NaN, infinities and subnormals among them."""
    halves = dtype.itemsize // 2
    return torch.randint(-(2**15), 2**15, (n * halves,), generator=generator(seed), dtype=torch.int16).view(dtype)


def all_elements(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit type; of float32 the special ones and a random sample."""
    if dtype == torch.float32:
        special = [0.0, -0.0, inf, -inf, nan, 2.0**-149, -(2.0**-149), 2.0**-126, torch.finfo(dtype).max]
        return torch.cat([torch.tensor([*special, 1.0] * 8), random_bits(65536, dtype)])[:65536]
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def hard_to_round(dtype: torch.dtype) -> Tensor:
    """float32 at, next to and far from the middles between neighbours of `dtype`, and beyond its range."""
    if dtype == torch.float32:
        return all_elements(dtype)
    values = all_elements(dtype).double()
    values = values[values.isfinite()].sort().values
    # What would come behind the largest is as far off as what is in front of it.
    last = 2 * values[-1] - values[-2]
    values = torch.cat([-last[None], values, last[None]])
    middles = ((values[:-1] + values[1:]) / 2).float()
    assert torch.equal(middles.double(), (values[:-1] + values[1:]) / 2)
    up, down = (torch.nextafter(middles, torch.tensor(to)) for to in (inf, -inf))
    special = torch.tensor([inf, -inf, nan, 0.0, -0.0, 2.0**-149, -(2.0**-149), 3.4e38, -3.4e38, 1.0])
    floats = torch.cat([middles, up, down, values.float(), special, random_bits(20000, torch.float32)])
    return torch.cat([floats, floats[: -len(floats) % PACK]])


# ---------------------------------------------------------------------------------------------------- element


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_elements_widen_exactly(venue, dtype):
    elements = all_elements(dtype)
    words = elements.nbytes // 4
    singles, from_words = (venue.full(len(elements), fill=-7) for _ in range(2))
    venue.call("widen", TYPES.index(dtype), venue.of(elements), words, singles, from_words)
    assert_same(singles, elements.float())
    assert_same(from_words, elements.float())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_floats_round_to_nearest_even(venue, dtype):
    floats = hard_to_round(dtype)
    elements, words = (venue.full(len(floats), fill=-7, dtype=dtype) for _ in range(2))
    venue.call("narrow", TYPES.index(dtype), venue.of(floats), elements.nbytes // 4, elements, words)
    assert_same(elements, floats.to(dtype))
    assert_same(words, floats.to(dtype))


# ---------------------------------------------------------------------------------------------------- pack


@pytest.mark.parametrize("stream_loads", [0, 1])
@pytest.mark.parametrize("stream_stores", [0, 1])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_packs_go_round(venue, dtype, stream_loads, stream_stores):
    elements = all_elements(dtype)
    # A pack in front and one behind that must stay as they are.
    copied, converted = (venue.full(len(elements) + 2 * PACK, fill=3, dtype=dtype) for _ in range(2))
    values = venue.full(len(elements), fill=-7)
    inner = slice(PACK, -PACK)
    venue.call(
        *("packs", TYPES.index(dtype), venue.of(elements), len(elements) // PACK, stream_loads, stream_stores),
        *(copied[inner], converted[inner], values),
    )
    assert torch.equal(bits_of(copied[inner].cpu()), bits_of(elements))  # NaN's payload as well
    assert_same(converted[inner], elements)
    assert_same(values, elements.float())
    for t in (copied, converted):
        assert t[:PACK].eq(3).all() and t[-PACK:].eq(3).all()


PARTS = [(lo, hi) for lo in range(PACK + 1) for hi in range(lo, PACK + 1)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_parts_are_loaded_and_nothing_else(venue, dtype):
    size = PAGE // dtype.itemsize
    memory = random_bits(size, dtype)
    cases = [(offset, lo, hi, 0) for offset in range(PACK, 3 * PACK) for lo, hi in PARTS]
    cases += [(PACK, lo, hi, 1) for lo, hi in PARTS]
    # The wanted elements are the first or the last that there are: nothing in front of them or behind may be read.
    for lo, hi in PARTS:
        for offset in (-lo, size - hi):
            wide = (0, 1) if offset * dtype.itemsize % 16 == 0 else (0,)
            cases += [(offset, lo, hi, w) for w in wide]
    found = venue.full(len(cases), PACK, fill=5, dtype=dtype)
    venue.call(
        "load_parts", TYPES.index(dtype), venue.of(cases, torch.int64), len(cases), venue.between_walls(memory), found
    )
    expected = torch.zeros(len(cases), PACK, dtype=dtype)
    for row, (offset, lo, hi, _) in zip(expected, cases, strict=True):
        row[lo:hi] = memory[offset + lo : offset + hi]
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_parts_are_stored_and_nothing_else(venue, dtype):
    room = 4 * PACK
    cases = [
        (room * i + PACK + misaligned, lo, hi, 0)
        for i, (misaligned, (lo, hi)) in enumerate(itertools.product(range(PACK), PARTS))
    ]
    floats = hard_to_round(dtype)
    values = floats[torch.randperm(len(floats), generator=generator())][: PACK * len(cases)]
    memory = random_bits(room * len(cases), dtype, seed=1)
    expected = memory.clone()
    for (offset, lo, hi, _), row in zip(cases, values.to(dtype).view(-1, PACK), strict=True):
        expected[offset + lo : offset + hi] = row[lo:hi]
    stored = venue.of(memory)
    venue.call("store_parts", TYPES.index(dtype), venue.of(cases, torch.int64), len(cases), venue.of(values), stored)
    assert_same(stored, expected)


# ---------------------------------------------------------------------------------------------------- walk


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_in_flight_visits_each_once_and_in_order(venue, at_once):
    steps = ((1, 0), (1, 5), (3, 2), (7, 6), (32, 31))
    cases = [(first, end, step) for step, first in steps for end in (0, 3, *range(first, first + 13 * step + 2))]
    expected = []
    for walk in itertools.starmap(range, cases):
        log = []
        for i in range(0, len(walk), at_once):
            log += [2 * k for k in walk[i : i + at_once]] + [2 * k + 1 for k in walk[i : i + at_once]]
        expected.append(log)
    room = max(map(len, expected)) + 2 * at_once
    log = venue.full(len(cases), room, fill=-9, dtype=torch.int32)
    venue.call("in_flight", at_once, venue.of(cases, torch.int64), len(cases), log, room)
    assert log.tolist() == [visits + [-9] * (room - len(visits)) for visits in expected]


@pytest.mark.parametrize("wide", [0, 1])
@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_over_packs_covers_a_range_once(venue, at_once, wide):
    cases = [
        (begin, begin + length, lanes, wide)
        for begin, length, lanes in itertools.product(range(10), range(41), (1, 3, 32))
    ]
    packs = 8
    whole, parts = (venue.full(len(cases), packs, dtype=torch.int32) for _ in range(2))
    covered, wrong = venue.full(len(cases), packs * PACK, dtype=torch.int32), venue.full(len(cases), dtype=torch.int32)
    venue.call("over_packs", at_once, venue.of(cases, torch.int64), len(cases), whole, parts, covered, wrong)
    begins, ends = (torch.tensor(column)[:, None] for column in list(zip(*cases, strict=True))[:2])
    element, pack = torch.arange(packs * PACK), torch.arange(packs) * PACK
    expected = (element >= begins) & (element < ends)
    expected_whole = (begins <= pack) & (pack + PACK <= ends) & (wide == 1)
    expected_parts = expected.view(-1, packs, PACK).any(2) & ~expected_whole
    assert [case for case, count in zip(cases, wrong.tolist(), strict=True) if count] == []
    assert torch.equal(covered.cpu(), expected.int())
    assert torch.equal(whole.cpu(), expected_whole.int())
    assert torch.equal(parts.cpu(), expected_parts.int())


# ---------------------------------------------------------------------------------------------------- bits


def run_bits(venue, cases, memory):
    out = venue.full(len(cases), fill=-1, dtype=torch.int64)
    venue.call("bits", venue.of(cases, torch.int64), len(cases), venue.between_walls(memory), out)
    return out.tolist()


def bit_memory() -> tuple[Tensor, list[int]]:
    memory = torch.randint(0, 256, (PAGE,), generator=generator(), dtype=torch.uint8)
    return memory, [byte >> i & 1 for byte in memory.tolist() for i in range(8)]


def number(bits) -> int:
    return sum(bit << i for i, bit in enumerate(bits))


def test_bits_at(venue):
    """The bits asked for are in the first bytes that there are, somewhere, and in the last ones."""
    memory, bits = bit_memory()
    spots = [*range(8), *range(8000, 8000 + 64), *range(8 * PAGE - 16, 8 * PAGE)]
    cases = [(0, at, count, 0) for at in spots for count in range(1, 9) if at + count <= len(bits)]
    found = run_bits(venue, cases, memory)
    assert found == [number(bits[at : at + count]) for _, at, count, _ in cases]


@pytest.mark.parametrize("m", [1, 2, 3, 7, 8, 9, 49])
def test_plane_bits(venue, m):
    memory, bits = bit_memory()
    line = (m + 7) // 8
    cases, expected = [], []
    for p, count in itertools.product(range(m), range(1, 9)):
        # Where the elements' bits are, counted from the first plane's first byte.
        at = [8 * line * ((p + i) // m) + (p + i) % m for i in range(count)]
        first, last = at[0] // 8, at[-1] // 8
        for byte in (-first, 100, PAGE - last - 1):
            cases.append((byte, p, count, m))
            expected.append(number(bits[8 * byte + i] for i in at))
    assert run_bits(venue, cases, memory) == expected


# ---------------------------------------------------------------------------------------------------- divide


def test_divisors(venue):
    most = 2**31 - 1
    powers = [2**i + near for i in range(1, 31) for near in (-1, 0, 1)]
    rng = random.Random(0)
    some = [rng.randint(1, most) for _ in range(50)]
    divisors = sorted({*range(1, 301), *powers, 49, 196, 3136, most - 1, most, *some})
    each, numbers = 64, []
    for d in divisors:
        multiples = {d, 2 * d, 3 * d, most // d * d, *(rng.randint(0, most // d) * d for _ in range(10))}
        n = {0, 1, most - 1, most, *(multiple + near for multiple in multiples for near in (-1, 0, 1))}
        n = sorted(v for v in n if 0 <= v <= most)
        numbers.append(n + [rng.randint(0, most) for _ in range(each - len(n))])
    # Divisors are made on the host, wherever kernels run.
    values, made = torch.tensor(divisors), torch.empty(len(divisors), 3, dtype=torch.int32)
    venue.library.test_divisors(*(ctypes.c_void_p(t.data_ptr()) for t in (values, made)), ctypes.c_int64(len(values)))
    out = venue.full(len(divisors), each, fill=-1, dtype=torch.int64)
    venue.call("divide", venue.of(made), len(divisors), each, venue.of(numbers, torch.int64), out)
    assert out.tolist() == [[v // d for v in n] for d, n in zip(divisors, numbers, strict=True)]


# ---------------------------------------------------------------------------------------------------- function

ACTS = [Activation.parse(spec) for spec in (*ACT_NAMES, "gelu_tanh", "leaky_relu(0.2)")]
GATES = [Activation.parse(spec) for spec in (*GATE_NAMES, "hardsigmoid(0.2, 0.5)")]
ALL = sorted({*ACTS, *GATES}, key=lambda function: function.spec)
APPLY, THROUGH_ACT, THROUGH_GATE = range(3)


def elementwise(venue, which, function, upstream, v) -> Tensor:
    p0, p1 = (*function.args, 0.0, 0.0)[:2]
    v = torch.as_tensor(v, dtype=torch.float32)
    upstream = torch.as_tensor(upstream, dtype=torch.float32).expand_as(v)
    out = venue.full(len(v), fill=-7)
    venue.call("function", which, function.code, p0, p1, venue.of(upstream), venue.of(v), len(v), out)
    return out.cpu()


def whole_range() -> Tensor:
    far = torch.tensor([1e-30, 0.0, 100.0, 1e5, 1e12])
    return torch.cat([torch.linspace(-30, 30, 61), torch.linspace(-12, 12, 2401), far, -far])


def upstream_for(v: Tensor) -> Tensor:
    return torch.tensor([1.0, -1.0, 0.5]).repeat(len(v) // 3 + 1)[: len(v)]


@pytest.mark.parametrize("function", ALL, ids=str)
def test_functions_over_their_whole_range(venue, function):
    v = whole_range()
    found = elementwise(venue, APPLY, function, 0.0, v)
    torch.testing.assert_close(found.double(), function(v.double()), rtol=2e-6, atol=4e-7)
    assert elementwise(venue, APPLY, function, 0.0, [nan]).isnan().all()


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_gradients_through_acts(venue, act):
    v = whole_range()
    upstream = upstream_for(v)
    found = elementwise(venue, THROUGH_ACT, act, upstream, v)
    torch.testing.assert_close(found.double(), upstream * act.derivative(v.double()), rtol=2e-6, atol=4e-7)
    # As in PyTorch, a NaN passes where relu and relu6 let anything pass.
    at_nan = elementwise(venue, THROUGH_ACT, act, [2.0], [nan])
    assert at_nan.item() == 2 if act.name in ("relu", "relu6") else at_nan.isnan().all()
    assert elementwise(venue, THROUGH_ACT, act, [nan], [1.0]).isnan().all()


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_gradients_through_gates(venue, gate):
    low, high = {"tanh": (-1, 1), "relu": (-5, 5), "identity": (-5, 5)}.get(gate.name, (0, 1))
    out = torch.cat([torch.linspace(low, high, 1001), torch.tensor([low, 0.0, high])])
    if gate.name in ("relu", "identity"):
        out = torch.cat([out, torch.tensor([1e-30, 1e30])])
    upstream = upstream_for(out)
    found = elementwise(venue, THROUGH_GATE, gate, upstream, out)
    torch.testing.assert_close(
        found.double(), upstream * gate.derivative_from_output(out.double()), rtol=2e-6, atol=4e-7
    )
    at_nan = elementwise(venue, THROUGH_GATE, gate, [2.0], [nan])
    expected = {"relu": 2.0, "hardsigmoid": 0.0}.get(gate.name, nan)
    assert_same(at_nan, torch.tensor([expected]))
    assert elementwise(venue, THROUGH_GATE, gate, [nan], [0.5]).isnan().all()


@pytest.mark.parametrize("sign", [1, -1])
def test_infinite_gradients_at_flat_places(venue, sign):
    """Nothing comes through where a function is flat, and all of it where it is not."""
    flat = {
        (THROUGH_ACT, "relu"): ([-1.0, -0.0, 0.0, -1e30], [1e-30, 1.0]),
        (THROUGH_ACT, "relu6"): ([-1.0, 0.0, 6.0, 7.0, 1e30], [1e-30, 1.0, 5.9]),
        (THROUGH_ACT, "hardswish"): ([-3.0, -4.0, -1e30], [-1.0, 2.9, 3.0, 4.0]),
        (THROUGH_GATE, "relu"): ([0.0], [1e-30, 1.0]),
        (THROUGH_GATE, "hardsigmoid"): ([0.0, 1.0], [1e-30, 0.5, 0.999]),
        (THROUGH_GATE, "hardsigmoid(0.2, 0.5)"): ([0.0, 1.0], [1e-30, 0.5, 0.999]),
    }
    for (which, spec), (nothing, everything) in flat.items():
        found = elementwise(venue, which, Activation.parse(spec), sign * inf, nothing + everything)
        assert found.tolist() == [0.0] * len(nothing) + [sign * inf] * len(everything), spec


# ---------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_weights_are_loaded_and_nothing_else(venue, dtype):
    size = PAGE // dtype.itemsize
    memory = random_bits(size, dtype)
    spots = [*range(9), *range(size - 9, size + 1)]
    cases = [(at, count) for at in spots for count in range(-2, 9) if at + min(count, 4) <= size]
    expected = torch.zeros(len(cases), 4)
    for row, (at, count) in zip(expected, cases, strict=True):
        here = max(0, min(count, 4))
        row[:here] = memory[at : at + here].float()
    single = torch.tensor([memory[at].item() if count > 0 else -7.0 for at, count in cases])
    walled = venue.between_walls(memory)
    for wide in (0, 1):
        four, one = venue.full(len(cases), 4, fill=-7), venue.full(len(cases), fill=-7)
        venue.call(
            "load_weights", walled, TYPES.index(dtype), wide, venue.of(cases, torch.int64), len(cases), four, one
        )
        assert_same(four, expected)
        assert_same(one, single)
    # From an address that no wide read could take.
    four, one = venue.full(len(cases), 4, fill=-7), venue.full(len(cases), fill=-7)
    shifted = venue.of([(at - 1, count) for at, count in cases if at > 0], torch.int64)
    venue.call("load_weights", walled[1:], TYPES.index(dtype), 0, shifted, len(shifted), four, one)
    kept = [i for i, (at, _) in enumerate(cases) if at > 0]
    assert_same(four[: len(kept)], expected[kept])
    assert_same(one[: len(kept)], single[kept])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_stored_weights_round_as_in_torch(venue, dtype):
    floats = hard_to_round(dtype)
    at = 2 * torch.randperm(len(floats), generator=generator()) + 1
    stored = venue.full(2 * len(floats) + 1, fill=3, dtype=dtype)
    venue.call("store_weights", stored, TYPES.index(dtype), venue.of(at), venue.of(floats), len(floats))
    expected = torch.full((2 * len(floats) + 1,), 3, dtype=dtype)
    expected[at] = floats.to(dtype)
    assert_same(stored, expected)


# ---------------------------------------------------------------------------------------------------- reduce


def whole_numbers(*shape: int) -> Tensor:
    """Every order of summation gives the same."""
    return torch.randint(-1000, 1001, shape, generator=generator()).float()


def once(results: list[Tensor]) -> Tensor:
    """The one result of several schedules, bit by bit."""
    for result in results[1:]:
        assert torch.equal(bits_of(result), bits_of(results[0]))
    return results[0].cpu()


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_sums_and_peaks_of_groups(venue, lanes):
    blocks = 2
    exact, rough = whole_numbers(blocks, 256), torch.randn(blocks, 256, generator=generator()) * 1e3
    rough[0, :lanes] = -rough[0, :lanes].abs()
    rough[1, 3], rough[1, 255] = -inf, 1e6
    for v in (exact, rough):
        runs = []
        for _ in venue.seeds():
            out = venue.full(3, blocks, 256, fill=nan)
            venue.call("groups", venue.of(v), blocks, lanes, *out)
            runs.append(out)
        sums, peaks, doubled = once(runs).view(3, -1, lanes)
        groups = v.view(-1, lanes)
        assert torch.equal(peaks, groups.amax(1, keepdim=True).expand_as(peaks))
        assert torch.equal(bits_of(sums), bits_of(sums[:, :1].expand_as(sums)))  # the same in every thread
        assert torch.equal(doubled, 2 * sums)
        if v is exact:
            assert torch.equal(sums, groups.sum(1, keepdim=True).expand_as(sums))
        else:
            error = (sums[:, 0].double() - groups.double().sum(1)).abs()
            assert (error[groups.isfinite().all(1)] <= lanes * 2.0**-24 * groups.double().abs().sum(1).max()).all()


@pytest.mark.parametrize(
    "rows, items",
    [(1, 1), (3, 256), (100, 7), (16, 4), (5, 200), (0, 9), (1, 129), (300, 1), (257, 1), (64, 4), (7, 257), (2, 600)],
)
def test_sum_rows(venue, rows, items):
    exact = whole_numbers(rows, items * 4)
    rough = torch.randn(rows, items * 4, generator=generator())
    for v in (exact, rough):
        runs = []
        for _ in venue.seeds():
            out, before = venue.full(items * 4, fill=nan), venue.full(256, fill=nan)
            reads, calls = (venue.full(n, dtype=torch.int32) for n in (rows * items, items))
            venue.call("sum_rows", venue.of(v), rows, items, out, before, reads, calls)
            # The last row is read again in place of those behind it, and not added.
            table = reads.view(rows, items)
            assert table[:-1].eq(1).all() and table.ge(1).all() and calls.eq(1).all()
            assert before.tolist() == [float(i + 97) for i in range(256)]
            runs.append(out)
        sums = once(runs)
        if v is exact:
            assert torch.equal(sums, v.sum(0))
        else:
            bound = (rows + 1) * 2.0**-24 * v.double().abs().sum(0)
            assert ((sums.double() - v.double().sum(0)).abs() <= bound).all()


@pytest.mark.parametrize("count", [1, 2, 7])
def test_one_block_of_a_group_is_the_last(venue, count):
    groups = 5
    blocks = torch.arange(groups * count * 256).view(count, groups, 256) + 1
    expected = blocks.sum(0).roll(-1, 1).int()
    counters = venue.full(2, groups, dtype=torch.int32)  # nobody clears the first ones between the launches
    for _ in venue.seeds():
        data, sums = venue.full(count, groups, 256, dtype=torch.int32), venue.full(groups, 256, dtype=torch.int32)
        last_threads = venue.full(groups, dtype=torch.int32)
        venue.call("is_last_block", groups, count, data, counters, last_threads, sums)
        assert counters.tolist() == [[0] * groups, [count] * groups]
        counters[1] = 0
        assert last_threads.tolist() == [256] * groups
        assert torch.equal(sums.cpu(), expected)


# ---------------------------------------------------------------------------------------------------- product

SAMPLES = 8


class Product:
    """A slice of a matrix, with NaN around it, and vectors, with NaN behind the zeros that the kernels may read."""

    def __init__(self, venue: Venue, dtype: torch.dtype, columns: bool, outer: int, inner: int, wide: bool):
        self.by_itself = False
        self.venue, self.columns, self.outer, self.inner, self.wide = venue, columns, outer, inner, wide
        self.type = TYPES.index(dtype)
        rows, length = (inner, outer) if columns else (outer, inner)
        self.row_stride, self.first = (length + 7, 3) if not wide else ((length + 11) // 4 * 4, 4)
        w = torch.randn(rows, length, generator=generator(1)).to(dtype)
        reach = self.first + (rows - 1) * self.row_stride + length
        size = -(-reach * dtype.itemsize // PAGE) * PAGE // dtype.itemsize
        # The slice's last weight is the last that there is, as far as the alignment of wide reads allows it.
        begin = size - reach if not wide else (size - reach) // PACK * PACK
        memory = torch.full((size,), nan, dtype=dtype)
        memory.as_strided((rows, length), (self.row_stride, 1), begin + self.first).copy_(w)
        self.w = venue.between_walls(memory)[begin:]
        self.padded = (inner + 3) // 4 * 4
        self.v = torch.randn(SAMPLES, self.padded + 4, generator=generator(2))
        self.v[:, inner:] = 0
        self.v[:, self.padded :] = nan
        self.exact_w = (w if not columns else w.T).double()

    def run(self, first: int, samples: int) -> Tensor:
        out = self.venue.full(samples, self.outer, fill=nan)
        calls = self.venue.full(samples, self.outer, dtype=torch.int32)
        self.venue.call(
            *("product", self.by_itself, self.columns, self.w, self.type, self.wide, self.first, self.row_stride),
            *(self.outer, self.inner, self.venue.of(self.v[first : first + samples]), self.v.shape[1], samples),
            *(out, calls),
        )
        assert calls.eq(1).all()
        return out

    def check(self, out: Tensor) -> None:
        v = self.v[:, : self.inner].double()
        error = (out.cpu().double() - v @ self.exact_w.T).abs()
        assert (error <= (self.inner + 1) * 2.0**-24 * (v.abs() @ self.exact_w.T.abs())).all()


ROWS = [(1, 1), (2, 3), (3, 4), (5, 7), (17, 33), (70, 50), (300, 9), (4, 260), (16, 16)]
COLUMNS = [(1, 1), (3, 2), (4, 4), (7, 5), (33, 17), (260, 3), (1030, 5), (16, 100), (64, 16), (2, 1)]


@pytest.mark.parametrize(
    "columns, outer, inner",
    [(False, *sizes) for sizes in ROWS] + [(True, *sizes) for sizes in COLUMNS],
    ids=lambda value: {False: "rows", True: "columns"}[value] if isinstance(value, bool) else str(value),
)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_products(venue, dtype, columns, outer, inner):
    product = Product(venue, dtype, columns, outer, inner, wide=False)
    all_samples = once([product.run(0, SAMPLES) for _ in venue.seeds()])
    product.check(all_samples)
    # A sample's result depends neither on the others nor on its place among them.
    for samples in range(1, SAMPLES):
        for first in {0, SAMPLES - samples}:
            once([all_samples[first : first + samples], product.run(first, samples).cpu()])
    # Nor on how many are worked on at a time.
    product.by_itself = True
    for samples in (1, 5, SAMPLES):
        once([all_samples[:samples], product.run(0, samples).cpu()])
    wide = Product(venue, dtype, columns, outer, inner, wide=True)
    once([all_samples, *(wide.run(0, SAMPLES).cpu() for _ in venue.seeds())])


# ---------------------------------------------------------------------------------------------------- port


@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000])
def test_copies_to_shared_memory(venue, n):
    memory = torch.randint(0, 256, (n, 16), generator=generator(), dtype=torch.uint8)
    for _ in venue.seeds():
        out = venue.full(n, 16, dtype=torch.uint8)
        venue.call("staging", venue.of(memory), out, n)
        assert torch.equal(out.cpu(), memory.flip(0))
