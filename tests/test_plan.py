"""scripts/plan_pod: reading optimised HLO, its arithmetic, and one real compilation."""

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "scripts" / "plan_lib"
# The optimised step of a net of two convolutions (4 to 16 channels; 16 to 32, stride 2)
# and a matrix (32 to 10), with 7 steps of input gradient before the update: 32 images
# of 8 x 8 on v5e:2x2. As libtpu 0.0.50 wrote it, backend configurations cut to cycles.
GOLDEN = ROOT / "tests" / "golden" / "plan" / "step.hlo"


@pytest.fixture
def lib(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def hlo(lib):
    return lib("hlo")


@pytest.fixture
def main(lib):
    spec = importlib.util.spec_from_file_location("plan_main", FOLDER / "main.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_compiled_step_is_read_as_it_was_written(hlo):
    program = hlo.parse(GOLDEN.read_text())
    (loop,) = hlo.loops(program)
    assert (loop.trips, loop.op_name) == (7, "jit(step)/while")
    # One pass of each layer, 8 images a device: outputs x taps x inputs.
    a, b, c = 8 * 64 * 16 * 9 * 4, 8 * 16 * 32 * 9 * 16, 8 * 32 * 10
    # 7 forwards and 7 gradients of the input; then forward, gradient of the weights,
    # and that of the input but for the first layer.
    passes = 7 * 2 * (a + b + c) + 2 * (a + b + c) + (b + c)
    items = hlo.work(program)
    flops = sum(item.count * hlo.flops(program, item.instruction) for item in items)
    assert flops == 2 * passes
    weights = 4 * (3 * 3 * 4 * 16 + 3 * 3 * 16 * 32 + 32 * 10)
    assert [row[:3] for row in hlo.collectives(program)] == [("all-reduce", weights, 1)]


def test_cycles_are_those_of_the_entry_and_seven_bodies(hlo, lib):
    """Against a reading by regular expressions alone."""
    text = GOLDEN.read_text()

    def cycles(header):
        block = re.search(header + r".*?\n(.*?)\n}", text, re.S)
        found = re.findall(r'"estimated_cycles":"(\d+)"', block[1])
        assert found
        return sum(map(int, found))

    body = re.search(r" while\(.*?body=%([\w.\-]+)", text)[1]
    inside = 7 * cycles(r"\n%" + re.escape(body) + r" \(")
    cost = lib("cost").cost_of(text)
    assert cost.loop_cycles == inside
    assert cost.cycles == inside + cycles(r"\nENTRY ")
    assert len(cost.costly) == 10
    assert cost.costly[0]["cycles"] == max(
        item.cycles for item in hlo.work(hlo.parse(text))
    )


def products(k, out, stride, low, holes):
    """Pairs of an output and a tap along one axis, those that meet a hole left out."""
    pairs = product(range(out), range(k))
    return sum((i * stride + u - low) % holes == 0 for i, u in pairs)


@pytest.mark.parametrize(
    "x, k, out, window, stride, holes, low",
    [
        (8, 3, 8, "size=3x3 pad=1_1x1_1", 1, 1, 1),
        (8, 3, 4, "size=3x3 stride=2x2 pad=1_1x1_1", 2, 1, 1),
        (4, 1, 8, "size=1x1 pad=0_1x0_1 lhs_dilate=2x2", 1, 2, 0),
        (6, 2, 5, "size=2x2", 1, 1, 0),
        (4, 3, 8, "size=3x3 pad=1_2x1_2 lhs_dilate=2x2", 1, 2, 1),
    ],
)
def test_flops_of_a_convolution(hlo, x, k, out, window, stride, holes, low):
    attributes = f", window={{{window}}}, dim_labels=b01f_01io->b01f"
    found = hlo.convolution_flops(
        (2, x, x, 3), (k, k, 3, 5), (2, out, out, 5), attributes
    )
    along = products(k, out, stride, low, holes)
    assert found == 2 * 2 * 3 * 5 * along**2


def test_a_convolution_and_its_gradients_count_alike(hlo):
    """As XLA writes them: 3x3, stride 2, 8x8x3 to 4x4x5, 2 images."""
    forward = hlo.convolution_flops(
        *((2, 8, 8, 3), (3, 3, 3, 5), (2, 4, 4, 5)),
        "window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
    )
    of_input = hlo.convolution_flops(
        *((2, 4, 4, 5), (3, 3, 3, 5), (2, 8, 8, 3)),
        "window={size=3x3 pad=1_2x1_2 lhs_dilate=2x2 rhs_reversal=1x1}, "
        "dim_labels=b01f_01oi->b01f",
    )
    of_kernel = hlo.convolution_flops(
        *((2, 8, 8, 3), (2, 4, 4, 5), (3, 3, 3, 5)),
        "window={size=4x4 pad=1_0x1_0 rhs_dilate=2x2}, dim_labels=f01b_i01o->01bf",
    )
    assert forward == of_input == of_kernel == 2 * (2 * 16 * 5 * 9 * 3)
    # 1x1, kernel and image in each other's place.
    swapped = hlo.convolution_flops(
        *((160, 1, 1, 16), (8, 32, 32, 160), (8, 32, 32, 16)),
        "window={size=32x32 pad=31_31x31_31 rhs_reversal=1x1}, "
        "dim_labels=f01b_o01i->f01b",
    )
    assert swapped == 2 * 8 * 32 * 32 * 160 * 16
    # A product of 12 pairs of matrices, (196 x 64) (64 x 100), as libtpu writes it.
    batched = hlo.convolution_flops(
        *((12, 196, 64), (12, 100, 64), (12, 196, 100)),
        "window={size=12 stride=11 lhs_dilate=12}, dim_labels=0bf_0oi->0bf",
    )
    assert batched == 2 * 12 * 196 * 64 * 100
    grouped = hlo.convolution_flops(
        *((2, 8, 8, 6), (3, 3, 2, 12), (2, 8, 8, 12)),
        "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, "
        "feature_group_count=3",
    )
    assert grouped == 2 * 2 * 64 * 12 * 9 * 2


LOOP = """HloModule m

%body (c: (s32[], f32[2])) -> (s32[], f32[2]) {{
  %c = (s32[], f32[2]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[2]{{0}} get-tuple-element(%c), index=1
  %s = s32[] constant({stride})
  %j = s32[] add({order})
  %y = f32[2]{{0}} copy(%x), backend_config={{"estimated_cycles":"10"}}
  ROOT %t = (s32[], f32[2]{{0}}) tuple(%j, %y)
}}

%cond (c.1: (s32[], f32[2])) -> pred[] {{
  %c.1 = (s32[], f32[2]{{0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%c.1), index=0
  %n = s32[] constant({bound})
  ROOT %lt = pred[] compare(%i.1, %n), direction={direction}
}}

ENTRY %main (p: f32[2], q: s32[]) -> f32[2] {{
  %p = f32[2]{{0}} parameter(0)
  %q = s32[] parameter(1)
  %b = s32[] constant({begin})
  %b.1 = s32[] copy(%b)
  %init = (s32[], f32[2]{{0}}) tuple({first}, %p)
  %w = (s32[], f32[2]{{0}}) while(%init), condition=%cond, body=%body{note}
  ROOT %r = f32[2]{{0}} get-tuple-element(%w), index=1
}}
"""
PLAIN = {
    "stride": 1, "order": "%i, %s", "bound": 10, "direction": "LT", "begin": 0,
    "first": "%b.1", "note": "",
}  # fmt: skip


@pytest.mark.parametrize(
    "changed, trips",
    [
        ({}, 10),
        ({"begin": 2, "stride": 3, "order": "%s, %i"}, len(range(2, 10, 3))),
        ({"direction": "LE", "begin": 4}, len(range(4, 11))),
        ({"begin": 12}, 0),
        (
            {"first": "%q", "note": ', backend_config={"known_trip_count":{"n":"6"}}'},
            6,
        ),
    ],
)
def test_trips_are_read_from_the_loop(hlo, lib, changed, trips):
    text = LOOP.format(**{**PLAIN, **changed})
    (loop,) = hlo.loops(hlo.parse(text))
    assert loop.trips == trips
    assert lib("cost").cost_of(text).cycles == 10 * trips


@pytest.mark.parametrize(
    "changed", [{"first": "%q"}, {"direction": "GT"}, {"order": "%i, %i"}]
)
def test_trips_are_never_guessed(hlo, changed):
    program = hlo.parse(LOOP.format(**{**PLAIN, **changed}))
    with pytest.raises(hlo.UnknownTripCount, match="%w .*fixed number of steps"):
        hlo.work(program)


def test_a_conditional_costs_its_dearer_branch_and_no_text_is_refused(hlo, lib):
    text = """
%a (x: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %a.1 = f32[] negate(%x), backend_config={"estimated_cycles":"5"}
}
%b (y: f32[]) -> f32[] {
  %y = f32[] parameter(0)
  ROOT %b.1 = f32[] negate(%y), backend_config={"estimated_cycles":"7"}
}
ENTRY %main (i: s32[], z: f32[]) -> f32[] {
  %i = s32[] parameter(0)
  %z = f32[] parameter(1)
  ROOT %r = f32[] conditional(%i, %z, %z), branch_computations={%a, %b}
}
"""
    assert lib("cost").cost_of(text).cycles == 7
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("module @jit_step")


def test_an_asynchronous_collective_counts_once(hlo):
    text = """
ENTRY %main (x: bf16[6,4]) -> bf16[24,4] {
  %x = bf16[6,4]{1,0:T(8,128)} parameter(0)
  %s = (bf16[6,4]{1,0}, bf16[24,4]{1,0}) all-gather-start(%x), dimensions={0}
  %d = bf16[24,4]{1,0} all-gather-done(%s)
  %r.1 = (f32[], f32[5]{0}) all-reduce-start(%d, %d), to_apply=%add
  ROOT %r = (f32[], f32[5]{0}) all-reduce-done(%r.1)
}
"""
    found = hlo.collectives(hlo.parse(text))
    assert [row[:3] for row in found] == [("all-gather", 192, 1), ("all-reduce", 24, 1)]


def cost(lib, cycles, loop_cycles, size):
    rows = [{"kind": "all-reduce", "bytes": size, "count": 1, "what": ""}]
    return lib("cost").Cost(cycles, loop_cycles, 0, 0, [], rows, [])


def test_scaling_by_hand(lib):
    chip, module = lib("chips").CHIPS["v5e"], lib("cost")
    step = cost(lib, 30e6, 24e6, 200e6)  # 20 ms, of which 4 outside of the loops
    one = module.point(1, 8, step, chip)
    assert one.links == 0 and one.step == one.overlapped == pytest.approx(20)
    four = module.point(4, 8, step, chip)
    assert four.links == pytest.approx(2 * 3 / 4 * 200e6 / 200e9 * 1e3)
    assert four.step == pytest.approx(21.5)
    assert four.overlapped == pytest.approx(20)  # 1.5 ms hide behind 4
    assert module.efficiency(one, four) == pytest.approx((20 / 21.5, 1))
    much = module.point(4, 8, cost(lib, 30e6, 24e6, 2000e6), chip)
    assert much.overlapped == pytest.approx(20 + 15 - 4)


def test_clocks_follow_from_the_products_per_cycle(lib):
    products = {"v5e": 65_536, "v5p": 131_072, "v4": 65_536, "v6e": 262_144}
    for name, chip in lib("chips").CHIPS.items():
        assert 2 * chip.clock * products[name] == pytest.approx(chip.peak, rel=0.01)


def test_advice_names_the_lanes(lib):
    report = lib("report")
    row = {
        "what": "jit(step)/while/body/conv1/conv_general_dilated",
        "result": "bf16[8,32,32,160]",
        "opcode": "fusion",
    }
    assert "160 channels fill 256 lanes" in report.advice(row, 0.4)
    assert "nothing" in report.advice(row, 0.8)
    assert "memory" in report.advice({**row, "what": "mul"}, 0.0)


def test_loops_of_another_length_are_refused(main):
    module = importlib.import_module("cost")
    found = module.Cost(1, 1, 1, 1, [{"trips": 9}], [], [])
    with pytest.raises(ValueError, match=r"\[9\] trips.*takes 10 steps"):
        main.check_trips(found, 10, 1)
    main.check_trips(found, 9, 1)
    main.check_trips(found._replace(loops=[]), 10, 1)


@pytest.mark.parametrize(
    "arguments, installed, message",
    [
        (["madry_cifar"], False, "scripts/setup tpu"),
        (["no_such"], True, "there is no experiments/no_such.py"),
        (["quickstart"], True, "no function `workload(config)`"),
        (["madry_cifar", "--topology", "h100:8"], True, "Known: v5e, v5p, v6e, v4"),
        (
            ["madry_cifar", "--topology", "v5e:axb"],
            True,
            "write a generation and a grid",
        ),
    ],
)
def test_errors_say_what_to_do(
    main, monkeypatch, capsys, arguments, installed, message
):
    monkeypatch.setattr(main, "compiler_is_there", lambda: installed)
    assert main.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_tables_show_the_chips_that_are_asked_for(main):
    options = main.arguments(["madry_cifar", "--chips", "256", "16"])
    assert main.counts(options, 256) == [16, 256]
    with pytest.raises(ValueError, match="--chips 256: v5e:16x16 has 1 to 64"):
        main.counts(options, 64)
    assert main.counts(main.arguments(["madry_cifar"]), 8) == [1, 2, 4, 8]


def test_a_plan_has_the_options_of_training(main):
    tiles = {"xla_tpu_scoped_vmem_limit_kib": "32768"}
    assert main.compiler_options("TPU v5 lite", []) == tiles
    assert main.compiler_options("TPU v5 lite", ["a=b=c"]) == {**tiles, "a": "b=c"}
    without = ["xla_tpu_scoped_vmem_limit_kib=", "a=1"]
    assert main.compiler_options("TPU v5 lite", without) == {"a": "1"}
    assert main.compiler_options("TPU v4", []) == {}


@pytest.mark.slow
def test_a_small_net_is_planned_by_the_real_compiler(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (scripts/setup tpu installs it)")
    command = [
        *(sys.executable, str(FOLDER / "main.py"), "madry_cifar"),
        *("--topology", "v5e:2x2", "--batch-per-chip", "8", "--global-batch", "32"),
        *("--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")),
        *("--", "--preset", "pod", "--depth", "10", "--width", "1"),
    ]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "nothing was run on one" in first.stdout
    assert "worker hostname" not in first.stderr  # libtpu's start-up noise
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    step, attack, evaluation = plan["programs"]
    trips = [[loop["trips"] for loop in p["cost"]["loops"]] for p in plan["programs"]]
    assert trips == [[10], [10], [20]]
    assert attack["cost"]["collectives"] == evaluation["cost"]["collectives"] == []
    assert step["fits"] and 0 < step["utilization"] < 1
    # The gradients' all-reduce: every weight, in the type the net computes in.
    largest = max(row["bytes"] for row in step["cost"]["collectives"])
    assert 2 * 77_000 < largest < 2 * 80_000
    assert [row["devices"] for row in plan["weak"]] == [1, 2, 4]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout == first.stdout
