"""The compiled linear layers against plain torch. Skipped only where the extension is not built."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_ext import reference

compiled = pytest.importorskip("cuda_ext.compiled", reason="cuda_ext._C is not built", exc_type=ImportError)

ROWS = st.integers(0, 33)
FEATURES = st.sampled_from([1, 2, 3, 7, 16, 31, 32, 33, 64, 65, 130, 576])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
KINDS = ["int8", "bf16", "fp32", "grouped4", "grouped8"]


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


def pack(kind: str, weight: torch.Tensor):
    if kind.startswith("grouped"):
        return compiled.pack_grouped(weight, int(kind[-1]))
    return getattr(compiled, f"pack_{kind}")(weight)


def runner(kind: str):
    return compiled.linear_grouped if kind.startswith("grouped") else getattr(compiled, f"linear_{kind}")


def linear(kind: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return runner(kind)(x, pack(kind, weight), bias)


@settings(max_examples=80, deadline=None)
@given(rows=ROWS, inputs=FEATURES, outputs=FEATURES, dtype=DTYPES, bias_dtype=DTYPES, biased=st.booleans())
def test_int8_equals_the_oracle_bit_for_bit(rows, inputs, outputs, dtype, bias_dtype, biased):
    x, weight = random(0, rows, inputs).to(dtype), random(1, outputs, inputs)
    bias = random(2, outputs).to(bias_dtype) if biased else None
    expected = reference.linear_int8(x, reference.pack_int8(weight), bias)
    assert torch.equal(linear("int8", x, weight, bias), expected)


@settings(max_examples=80, deadline=None)
@given(rows=ROWS, inputs=FEATURES, outputs=FEATURES, dtype=DTYPES, biased=st.booleans(), bits=st.sampled_from([4, 8]))
def test_grouped_equals_the_oracle_but_for_the_order_of_groups(rows, inputs, outputs, dtype, biased, bits):
    x, weight = random(0, rows, inputs).to(dtype), random(1, outputs, inputs)
    bias = random(2, outputs) if biased else None
    expected = reference.linear_grouped(x, reference.pack_grouped(weight, bits), bias)
    # Sums of up to 18 groups, whose terms are larger than the result: minimum and scale have opposite signs.
    rounding = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(linear(f"grouped{bits}", x, weight, bias), expected, rtol=rounding, atol=2e-4)


@pytest.mark.parametrize(("bits", "most"), [(4, 0.12), (8, 0.02)])
def test_grouped_is_as_near_as_its_bits_allow(bits, most):
    x, weight = random(0, 16, 576), random(1, 64, 576)
    wide = torch.where(torch.arange(576) % 97 == 0, 40.0, 1.0)  # a few features are far larger than the rest
    wanted = exact(x * wide, weight, None)
    assert (linear(f"grouped{bits}", x * wide, weight).double() - wanted).norm() < most * wanted.norm()


def test_a_matrix_of_sixteen_levels_a_group_is_kept_exactly():
    levels = torch.arange(16).repeat(2)
    codes = torch.stack([levels[torch.randperm(32, generator=torch.Generator().manual_seed(i))] for i in range(40)])
    scales, minima = random(3, 40).abs().half().float() + 0.5, random(4, 40).half().float()
    weight = (scales.half().float()[:, None] * codes + minima[:, None]).float()
    packed = reference.pack_grouped(weight, 4)
    assert torch.equal(packed.data, codes.to(torch.uint8))
    restored = packed.scales_OG.float() * packed.data + packed.minima_OG.float()
    torch.testing.assert_close(restored, weight, rtol=0, atol=2e-6)


@settings(max_examples=80, deadline=None)
@given(rows=ROWS, inputs=FEATURES, outputs=FEATURES, dtype=DTYPES, bias_dtype=DTYPES, biased=st.booleans())
def test_bf16_accumulates_in_float32_and_rounds_once(rows, inputs, outputs, dtype, bias_dtype, biased):
    x, weight = random(0, rows, inputs).to(dtype), random(1, outputs, inputs)
    bias = random(2, outputs).to(bias_dtype) if biased else None
    out = linear("bf16", x, weight, bias)
    assert out.dtype == dtype
    # vdpbf16ps rounds every product pair to float32; 576 of them stay within 1e-4 of values near 1 to 50.
    expected = exact(x.bfloat16(), weight.bfloat16(), bias)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=2e-4)


@settings(max_examples=80, deadline=None)
@given(rows=ROWS, inputs=FEATURES, outputs=FEATURES, dtype=DTYPES, bias_dtype=DTYPES, biased=st.booleans())
def test_fp32_agrees_with_double_precision(rows, inputs, outputs, dtype, bias_dtype, biased):
    x, weight = random(0, rows, inputs).to(dtype), random(1, outputs, inputs)
    bias = random(2, outputs).to(bias_dtype) if biased else None
    out = linear("fp32", x, weight, bias)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), exact(x, weight, bias), rtol=rounding, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_rows_beside_it(kind, dtype):
    packed = pack(kind, random(1, 100, 130))
    run = runner(kind)
    x = random(0, 33, 130).to(dtype)
    alone = torch.cat([run(x[row : row + 1], packed, None) for row in range(33)])
    for rows in range(1, 34):
        assert torch.equal(run(x[:rows], packed, None), alone[:rows])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_number_of_threads(kind):
    packed = pack(kind, random(1, 500, 130))
    run = runner(kind)
    x = random(0, 5, 130)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(x, packed, None)
        torch.set_num_threads(2)
        assert torch.equal(run(x, packed, None), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_be_a_slice_of_a_wider_tensor(kind):
    wide, weight = random(0, 5, 100), random(1, 40, 60)
    assert torch.equal(linear(kind, wide[:, 20:80], weight), linear(kind, wide[:, 20:80].contiguous(), weight))


def test_a_row_of_zeros_quantizes_to_zeros():
    assert torch.equal(linear("int8", torch.zeros(2, 8), random(1, 4, 8)), torch.zeros(2, 4))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_row_that_is_not_finite_becomes_nan_and_leaves_the_others_alone(bad):
    x, weight = random(0, 3, 20), random(1, 4, 20)
    broken = x.clone()
    broken[1, 19] = bad
    out, expected = linear("int8", broken, weight), linear("int8", x, weight)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_inputs_are_refused_with_a_reason(kind):
    packed = pack(kind, random(1, 40, 64))
    run = runner(kind)
    with pytest.raises(RuntimeError, match="x must be float32 or bfloat16"):
        run(random(0, 2, 64).half(), packed, None)
    with pytest.raises(RuntimeError, match="x must have 2 dimensions"):
        run(random(0, 64), packed, None)
    with pytest.raises(RuntimeError, match="not one of 40 x 600"):
        run(random(0, 2, 600), packed, None)
    with pytest.raises(RuntimeError, match="length of bias must be 40"):
        run(random(0, 2, 64), packed, random(0, 41))
    with pytest.raises(RuntimeError, match="must be contiguous"):
        run(random(0, 64, 2).T, packed, None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_packed_weight_outlives_the_matrix_it_came_from(kind):
    x, weight = random(0, 3, 64), random(1, 40, 64)
    packs = [pack(kind, weight * scale) for scale in (1, 2, 4)]
    outs = [runner(kind)(x, packed, None) for packed in packs]
    assert [packed.data.is_contiguous() for packed in packs] == [True] * 3
    assert torch.equal(outs[2], outs[0] * 4)
