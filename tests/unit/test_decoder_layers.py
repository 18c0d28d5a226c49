"""The layers of a decoder in one compiled call against the walk over single operators: the same bits."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from cuda_ext import ops
from ssd_runtime.config import Dtype
from ssd_runtime.model.batch import ForwardBatch
from ssd_runtime.model.decoder import Decoder
from tests.tiny_models import PagedRun, tiny_decoder

pytestmark = pytest.mark.skipif(ops.backend() == "plain", reason="cuda_ext._C is not built")

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-no-groups": {"num_kv_heads": 4},
    "llama-one-layer": {"num_layers": 1},
    "smollm2-heads": {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "hidden_size": 80},
    "qwen2": {"family": "qwen2", "qkv_bias": True},
    "qwen3": {"family": "qwen3", "qk_norm": True, "head_dim": 16},
    "mistral": {"family": "mistral", "head_dim": 20},
    "every-bias": {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True},
}
DTYPES: tuple[Dtype, ...] = ("fp32", "bf16", "int8", "int4")
TOKENS = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(7)).tolist()


def walking(decoder: Decoder) -> Decoder:
    """The same decoder, operator by operator."""
    assert decoder._packed is not None
    walker = copy.copy(decoder)
    walker._packed = None
    return walker


def tree(run: PagedRun, rows: list[int], logit_rows: torch.Tensor | None = None) -> ForwardBatch:
    """Rows of two sequences over a trunk of 31; chains of different length on scratch slots."""
    scratch = run.slots[-8:].tolist()
    chains = torch.tensor([[-1, scratch[row]] if row < 2 else [scratch[row % 2], scratch[row]] for row in rows])
    count = len(rows)
    return ForwardBatch(
        tokens_N=torch.tensor(rows) + 11,
        positions_N=31 + (torch.tensor(rows) >= 2).long(),
        slots_N=torch.tensor(scratch)[rows],
        sequence_N=torch.arange(count) % 2,
        tables_SC=torch.stack((run.slots, run.slots.roll(-1))),
        prefix_N=31 - torch.arange(count) % 2,
        chain_ND=chains,
        spans=(),  # on the CPU the compiled operators do not look at them
        logit_rows_R=logit_rows,
    )


def everything(decoder: Decoder, kv_dtype: torch.dtype) -> list[torch.Tensor]:
    """Logits of a chunked prefill, single tokens and a tree, and the cache they leave."""
    run = PagedRun(decoder)
    run.kv = run.kv.to(kv_dtype)
    logits = [
        run.trunk(TOKENS[:7], logit_rows=[]),
        run.trunk(TOKENS[7:30], 7, [22, 3, 22]),
        run.trunk(TOKENS[30:31], 30),
    ]
    logits += [decoder.forward(tree(run, [0, 1]), run.kv), decoder.forward(tree(run, [2, 3, 4, 5, 6]), run.kv)]
    logits.append(decoder.forward(tree(run, [0, 1, 2], torch.tensor([2])), run.kv))
    return [*logits, run.kv.float().nan_to_num(-9.0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_gives_the_bits_of_the_walk(family: str, dtype: Dtype) -> None:
    decoder = tiny_decoder(seed=3, dtype=dtype, **FAMILIES[family])
    for kv_dtype in (torch.float32, torch.bfloat16):
        outcomes = everything(decoder, kv_dtype), everything(walking(decoder), kv_dtype)
        for actual, expected in zip(*outcomes, strict=True):
            assert torch.equal(actual, expected)
        assert all(logits.isfinite().all() for logits in outcomes[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: Dtype) -> None:
    decoder = tiny_decoder(seed=5, dtype=dtype, num_heads=6, num_kv_heads=2, head_dim=64)
    run = PagedRun(decoder)
    run.trunk(TOKENS[:31])
    for size in range(1, 9):
        rows = list(range(size))
        together = decoder.forward(tree(run, [0, 1, 2, 3, 4, 5, 6, 7]), run.kv)
        some = decoder.forward(tree(run, rows), run.kv)
        assert torch.equal(some, together[:size])


def test_threads_do_not_change_the_bits() -> None:
    decoder = tiny_decoder(seed=6, dtype="bf16", hidden_size=256, intermediate_size=512)
    alone = everything(decoder, torch.bfloat16)
    torch.set_num_threads(2)
    try:
        shared = everything(decoder, torch.bfloat16)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tokens_N", torch.tensor([1, 96]), r"token 96 is outside \[0, 96\)"),
        ("slots_N", torch.tensor([1, 128]), r"slot 128 is outside \[0, 128\)"),
        ("slots_N", torch.tensor([1]), "number of slots must be 2, not 1"),
        ("prefix_N", torch.tensor([1, 129]), "prefix 129 is outside"),
        ("sequence_N", torch.tensor([0, 2]), "sequence 2 is outside"),
        ("sequence_N", torch.tensor([0, 0], dtype=torch.int32), "sequence must be int64"),
        ("chain_ND", torch.tensor([[0], [128]]), "chain slot 128 is outside"),
        ("logit_rows_R", torch.tensor([2]), "logit row 2 is outside"),
        ("positions_N", torch.tensor([0]), "number of rows of cos and sin must be 2, not 1"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_before_anything_is_written(
    field: str, value: torch.Tensor, message: str
) -> None:
    decoder = tiny_decoder()
    run = PagedRun(decoder)
    run.kv.zero_()
    batch = tree(run, [0, 1])
    with pytest.raises(RuntimeError, match=message):
        decoder.forward(replace(batch, **{field: value}), run.kv)
    assert not run.kv.any()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", "int3", "weights must be int4, int8, bf16 or fp32, not int3"),
        ("kind", "bf16", "qkv is not a packed weight of 64 x 32"),
        ("num_heads", 3, "3 query heads are no multiple of 2"),
        ("down", (), "down must have a weight for each of 2 layers, not 0"),
        ("norms_ME", torch.ones(4, 32), "norms must be 5 x 32, not 4 x 32"),
    ],
)
def test_weights_that_do_not_fit_are_refused(field: str, value: Any, message: str) -> None:
    decoder = tiny_decoder()
    assert decoder._packed is not None
    decoder._packed = replace(decoder._packed, **{field: value})
    with pytest.raises(RuntimeError, match=message):
        PagedRun(decoder).trunk(TOKENS[:2])


def test_without_the_extension_the_decoder_walks() -> None:
    program = (
        "import sys, torch\n"
        "from tests.tiny_models import PagedRun, tiny_decoder\n"
        "decoder = tiny_decoder(seed=3, qkv_bias=True)\n"
        "assert decoder._packed is None\n"
        "torch.save(PagedRun(decoder).trunk(range(9)), sys.stdout.buffer)"
    )
    environment = os.environ | {"SSD_CUDA_EXT": "0", "OMP_NUM_THREADS": "1"}
    plain = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, timeout=120, check=True
    )
    expected = torch.load(io.BytesIO(plain.stdout))
    actual = PagedRun(tiny_decoder(seed=3, qkv_bias=True)).trunk(range(9))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
