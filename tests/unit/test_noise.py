"""The shared noise: fixed bits, bounds, independence, and the Gumbel distribution."""

import math

import torch

from ssd_runtime.speculation.noise import MAX_NOISE, MIN_NOISE, gumbel_noise, noise_key, splitmix64


def test_splitmix64_gives_the_published_sequence():
    # First outputs of the reference generator with seed 1234567 (Vigna's splitmix64.c).
    state, outputs = 1234567, []
    for _ in range(3):
        outputs.append(splitmix64(state))
        state = (state + 0x9E3779B97F4A7C15) % 2**64
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_tensor_hash_equals_the_scalar_hash():
    tokens = torch.tensor([0, 1, 7, 49151, 2**31 - 1])
    for seed, position in [(0, 0), (1, 5), (2**64 - 1, 123456)]:
        key = noise_key(seed, position)
        for token, noise in zip(tokens.tolist(), gumbel_noise(key, tokens).tolist(), strict=True):
            bits = splitmix64((key + token * 0x9E3779B97F4A7C15) % 2**64)
            uniform = ((bits >> 32) + 0.5) / 2**32
            assert math.isclose(noise, -math.log(-math.log(uniform)), rel_tol=1e-12)


def test_noise_depends_on_seed_position_and_token():
    tokens = torch.arange(1000)
    base = gumbel_noise(noise_key(1, 1), tokens)
    assert base.unique().numel() == 1000
    assert not torch.equal(base, gumbel_noise(noise_key(1, 2), tokens))
    assert not torch.equal(base, gumbel_noise(noise_key(2, 1), tokens))
    assert torch.equal(base, gumbel_noise(noise_key(1, 1), tokens))


def test_noise_is_gumbel_and_bounded():
    noise = torch.cat([gumbel_noise(noise_key(3, position), torch.arange(4096)) for position in range(64)])
    assert noise.min() >= MIN_NOISE
    assert noise.max() <= MAX_NOISE
    # Kolmogorov-Smirnov at 262144 samples: the 1e-6 critical value is 2.7 / sqrt(n).
    uniform = torch.exp(-torch.exp(-noise)).sort().values
    expected = (torch.arange(noise.numel(), dtype=torch.float64) + 0.5) / noise.numel()
    assert (uniform - expected).abs().max() < 2.7 / math.sqrt(noise.numel())


def test_neighbouring_positions_are_uncorrelated():
    tokens = torch.arange(20000)
    first, second = (gumbel_noise(noise_key(9, position), tokens) for position in (100, 101))
    correlation = torch.corrcoef(torch.stack([first, second]))[0, 1]
    assert abs(float(correlation)) < 4.9 / math.sqrt(20000)
