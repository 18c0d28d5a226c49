"""Configuration: what is read, what is refused, and that a refusal names the key and the remedy."""

import dataclasses
import os
import re
import time
import tomllib
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_runtime import reading
from ssd_runtime.bounds import AtMost, Bound, Within, split
from ssd_runtime.config import MOST_BYTES, Config, ConfigFile, config_from_dict, load_config
from ssd_runtime.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    assert isinstance(load_config(path), Config)


def test_the_shipped_default_is_the_built_in_default() -> None:
    assert load_config(ROOT / "configs/smollm2_cpu.toml") == Config()


def test_without_a_file_the_defaults_stand() -> None:
    assert load_config(None) == Config()


def test_a_section_given_in_part_keeps_the_other_defaults() -> None:
    config = config_from_dict({"draft": {"threads": 2}})
    assert config.draft.threads == 2
    assert config.draft.dtype == "int8"


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("speculation.lookahead=3", "speculation", "lookahead", 3),
        ("speculation.mode=sd-colocated", "speculation", "mode", "sd-colocated"),
        ("target.model=/some/where", "target", "model", "/some/where"),
        ('target.model="quoted"', "target", "model", "quoted"),
        ("target.cores=[0, 1]", "target", "cores", (0, 1)),
        ("timeouts.load=7", "timeouts", "load", 7.0),
    ],
)
def test_an_override_is_parsed_as_toml_or_taken_as_a_word(override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(load_config(None, [override]), section), key) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("speculation.lookahaed=3", "did you mean 'lookahead'"),
        ("speculaton.lookahead=3", "did you mean 'speculation'"),
        ("speculation.lookahead=three", "must be int, not 'three'"),
        ("speculation.lookahead=true", "must be int, not True"),
        ("speculation.lookahead=-1", "between 0 and 256, not -1"),
        ("speculation.mode=fast", "must be one of ar, sd, sd-colocated, ssd"),
        ("engine.block_size=0", "between 1 and 65536, not 0"),
        ("target.cores=1", "must be a list"),
        ("target.cores=['a']", "must be int"),
        ("serve.max_queued_requests=0", "must be between 1 and 1048576, not 0"),
        ("serve.max_stop_strings=-1", "between 0 and 256, not -1"),
        ("serve.max_stop_bytes=0", "between 1 and 65536, not 0"),
        ("serve.port=70000", "between 0 and 65535"),
        ("timeouts.load=0", "between 0.01 and 86400, not 0"),
        ("lookahead=3", "expected section.key=value"),
        ("speculation.lookahead", "expected section.key=value"),
        ("a.b.c=3", "expected section.key=value"),
    ],
)
def test_a_bad_override_is_refused_with_the_reason(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


def test_a_value_of_an_unhashable_type_is_refused_where_a_name_is_wanted() -> None:
    with pytest.raises(ConfigError, match="must be one of"):
        load_config(None, ["speculation.mode=['ssd']"])


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read config"):
        load_config(tmp_path / "none.toml")


@pytest.mark.parametrize("content", [b"[target", b"\xff\xfe", b"target = 3"])
def test_a_broken_file_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        load_config(path)


def test_an_override_of_a_section_that_is_a_value_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "flat.toml"
    path.write_text("target = 3")
    with pytest.raises(ConfigError, match="not a section"):
        load_config(path, ["target.threads=1"])


def test_the_digest_covers_what_both_roles_must_agree_on() -> None:
    same = load_config(None, ["target.model=/elsewhere", "draft.threads=2"])
    others = [load_config(None, [one]) for one in ("speculation.budget=9", "link.backend=gloo")]
    assert same.digest() == Config().digest()
    assert Config().digest() not in {other.digest() for other in others}


@pytest.mark.parametrize("role", ["target", "draft"])
def test_nccl_is_refused_where_an_end_of_the_link_is_on_a_cpu(role: str) -> None:
    both = ["target.device=cuda", "draft.device=cuda", "draft.dtype=bf16", "link.backend=nccl"]
    assert load_config(None, both).link.backend == "nccl"
    with pytest.raises(ConfigError, match=f'the {role} is on a CPU: set {role}.device = "cuda", or link.backend'):
        load_config(None, [*both, f"{role}.device=cpu"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("target.tensor_parallel=0", "'target.tensor_parallel' must be between 1 and 256, not 0"),
        ("draft.tensor_parallel=2", "'draft.tensor_parallel' must be 1: a draft is one rank"),
    ],
)
def test_only_the_target_is_shared_among_ranks(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["coupling=neither"], "must be one of shared-noise, rejection"),
        (["coupling=rejection", "top_m=0"], "'speculation.top_m' must be between 1 and 1024, not 0"),
        (["coupling=rejection", "top_m=5000"], "'speculation.top_m' must be between 1 and 1024, not 5000"),
        (["coupling=rejection", "saguaro_c=1.5"], "'speculation.saguaro_c' must be between 0 and 1"),
        (["coupling=rejection", "saguaro_c=0.5", "saguaro_f=0"], "'speculation.saguaro_f' must be between 1 and 1024"),
        (["saguaro_c=0.5"], 'set speculation.coupling = "rejection", or leave saguaro_c at 1.0'),
        (["coupling=rejection", "saguaro_c=0.5", "top_m=4"], "set saguaro_f below speculation.top_m = 4"),
    ],
)
def test_couplings_that_cannot_work_name_their_remedy(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(None, [f"speculation.{override}" for override in overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["draft.device=cuda"], "'draft.dtype' = int8 runs on the CPU only, not on draft.device = cuda: set draft.d"),
        (["target.device=cuda", "target.dtype=int4"], "'target.dtype' = int4 runs on the CPU only, not on target.dev"),
        (
            ["target.device=cuda", "speculation.mode=sd-colocated"],
            "int8 runs on the CPU only, not on target.device = cuda, where a draft in its process is too: set draft.dt",
        ),
        (["target.device=cuda", "deployment.colocated=true"], "where a draft in its process is too: set draft.dtype"),
        (["deployment.share_gpu=true"], "'deployment.share_gpu' is for both roles on GPUs: set target.device = draft"),
        (["deployment.share_gpu=true", "target.device=cuda"], "set target.device = draft.device"),
    ],
)
def test_what_does_not_run_on_a_device_is_refused_with_the_remedy(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(None, overrides)


def test_a_target_on_a_gpu_may_have_an_int8_draft_on_the_cpu_and_share_its_gpu_with_one_in_bf16() -> None:
    assert load_config(None, ["target.device=cuda"]).draft.dtype == "int8"
    both = ["target.device=cuda", "draft.device=cuda", "draft.dtype=bf16"]
    assert load_config(None, [*both, "deployment.share_gpu=true"]).deployment.share_gpu


@pytest.mark.parametrize(
    ("overrides", "sent"), [([], 0), (["coupling=rejection"], 32), (["coupling=rejection", "top_m=1"], 0)]
)
def test_probabilities_travel_only_where_draft_tokens_are_sampled(overrides: list[str], sent: int) -> None:
    config = load_config(None, [f"speculation.{override}" for override in overrides])
    assert config.speculation.sent_probabilities == sent


# ---- data of strangers -----------------------------------------------------------------------------------------------


def keys(cls: Any = Config, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its annotation."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from keys(hint, f"{where}{name}.")
        else:
            yield f"{where}{name}", hint


KEYS = dict(keys())


def unbounded(hint: Any) -> Iterator[Any]:
    """The numbers, texts and lists of an annotation that have no bound."""
    bare, bound = split(hint)
    if typing.get_origin(bare) is tuple:
        yield from unbounded(typing.get_args(bare)[0])
    if bare in (int, float) and not isinstance(bound, Within):
        yield bare
    if (bare is str or typing.get_origin(bare) is tuple) and not isinstance(bound, AtMost):
        yield bare


@pytest.mark.parametrize("key", KEYS)
def test_every_number_has_a_range_and_every_text_and_list_a_size(key: str) -> None:
    assert list(unbounded(KEYS[key])) == []


NUMBERS = [(key, *split(hint)) for key, hint in KEYS.items() if isinstance(split(hint)[1], Within)]


@pytest.mark.parametrize(("key", "kind", "bound"), NUMBERS, ids=[key for key, _, _ in NUMBERS])
@pytest.mark.parametrize("far", [10**6, 2**63, -(2**63), 10**400])
def test_a_number_beyond_its_range_is_refused_with_key_and_range(key: str, kind: type, bound: Bound, far: int) -> None:
    if bound.allows(far):
        return
    with pytest.raises(ConfigError, match=f"'{key}' must be {re.escape(bound.wanted)}, not "):
        load_config(None, [f"{key}={far}"])
    for odd in ("inf", "-inf", "nan") if kind is float else ():
        with pytest.raises(ConfigError, match=f"'{key}' must be {re.escape(bound.wanted)}, not {odd}"):
            load_config(None, [f"{key}={odd}"])


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**5000), 10**5000)
    | st.floats()
    | st.text()
    | st.sampled_from(["ssd", "list", "rejection", "0.0.0.0", "x" * 5000, "\0", "\ud800"])
    | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
TREES = st.dictionaries(st.sampled_from(list(KEYS)) | st.text(), VALUES, max_size=5)


def config_or_reason(make: Callable[[], Config]) -> Config | str:
    try:
        return make()
    except ConfigError as error:
        return str(error)


@given(TREES)
def test_any_value_of_any_key_gives_a_configuration_or_an_error_that_names_it(given: dict[str, Any]) -> None:
    tree: dict[str, Any] = {}
    for key, value in given.items():
        section, dot, name = key.partition(".")
        if not dot:
            tree[key] = value
        elif isinstance(tree.setdefault(section, {}), dict):
            tree[section][name] = value
    found = config_or_reason(lambda: config_from_dict(tree))
    if isinstance(found, Config):
        assert config_from_dict(tomllib.loads(found.to_toml())) == found
        return
    assert len(found) < 1000
    assert any(repr(part)[1:-1][:40] in found for key in given for part in (key, *key.split(".")))


SIZES = ("engine.max_num_seqs", "engine.max_model_len", "engine.block_size", "engine.num_blocks")
LARGE = {
    key: (int(bound.least), int(bound.most))
    for key, _, bound in NUMBERS
    if key in ("speculation.budget", "speculation.lookahead", *SIZES)
}


@given(st.fixed_dictionaries({key: st.integers(least, most) for key, (least, most) in LARGE.items()}))
def test_sizes_that_are_large_together_are_refused_by_their_names(sizes: dict[str, int]) -> None:
    """Each alone is within its range."""
    found = config_or_reason(lambda: load_config(None, [f"{key}={value}" for key, value in sizes.items()]))
    if isinstance(found, Config):
        assert found.engine.pool_blocks * found.engine.block_size <= 2**31
        return
    assert re.search("(frames of|a pool of more than) .*: lower one of them", found)
    assert any(key in found for key in sizes)


DEEP = "[" * 16_000
FILES = {
    "nested lists": f"[engine]\nblock_size = {DEEP}",
    "nested tables": "engine.block_size" + ".a" * 8_000 + " = 1",
    "a header of many parts": f"[{'a.' * 8_000}a]",
    "a number of many digits": f"[engine]\nblock_size = {'9' * 16_000}",
    "many bits": f"[engine]\nblock_size = 0x{'f' * 16_000}",
    "a long key": f"{'k' * 16_000} = 1",
    "a long text": f'[target]\nmodel = "{"m" * 16_000}"',
    "a long list": f"[target]\ncores = [{'0,' * 8_000}]",
    "too large": "#" * (MOST_BYTES + 1),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_made_to_hurt_is_refused_in_one_short_line_at_once(name: str, tmp_path: Path) -> None:
    path = tmp_path / "hurts.toml"
    path.write_text(FILES[name])
    began = time.monotonic()
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    assert time.monotonic() - began < 20
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/dev/zero", "more than 16384 bytes"),
        ("/", "Is a directory"),
        ("/dev/null/x", "Not a directory"),
        ("\0", "null"),
    ],
)
def test_what_is_no_file_is_refused_in_one_line(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_pipe_that_nobody_writes_to_is_given_up_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SILENCE_S", 0.05)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"pipe: nothing came within 0\.05 s"):
        load_config(tmp_path / "pipe")


def test_a_pipe_is_read_once_and_used_often() -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as out:
        out.write("[speculation]\nlookahead = 3\n")
    file = ConfigFile.read(f"/dev/fd/{read}")
    os.close(read)
    assert load_config(file).speculation.lookahead == 3
    assert load_config(file, ["speculation.budget=5"]).speculation == dataclasses.replace(
        load_config(file).speculation, budget=5
    )


@pytest.mark.parametrize("override", ["engine.block_size=3\nx = 4", "target.model=a\0b", "serve.host=a\nb"])
def test_an_override_of_several_lines_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"config key '\w+\.\w+' must be"):
        load_config(None, [override])
