"""Configuration: what is read, what is refused, and that a refusal names the key and the remedy."""

import re
from pathlib import Path

import pytest

from ssd_runtime.config import Config, config_from_dict, load_config
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
        ("speculation.lookahead=-1", "at least 0"),
        ("speculation.mode=fast", "must be one of ar, sd, sd-colocated, ssd"),
        ("engine.block_size=0", "at least 1"),
        ("target.cores=1", "must be a list"),
        ("target.cores=['a']", "must be int"),
        ("serve.max_queued_requests=0", "must be at least 1, not 0"),
        ("serve.max_stop_strings=-1", "at least 0"),
        ("serve.max_stop_bytes=0", "at least 1"),
        ("serve.port=70000", "between 0 and 65535"),
        ("timeouts.load=0", "at least 0.01"),
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
    other = load_config(None, ["speculation.budget=9"])
    assert same.digest() == Config().digest()
    assert other.digest() != Config().digest()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["speculation.fan_out_list=[1, 2]"], "is for speculation.fan_out"),
        (["speculation.fan_out=list"], r"lookahead \+ 1 = 7 numbers"),
        (["speculation.fan_out=list", "speculation.fan_out_list=[1, 1, 1]"], r"lookahead \+ 1 = 7 numbers"),
        (["speculation.fan_out=list", "speculation.fan_out_list=[1, 1, 1, 1, 1, 1, -1]"], "at least 0"),
        (["speculation.fan_out=list", "speculation.fan_out_list=[2, 2, 2, 2, 2, 2, 2]"], "sums to 14: raise"),
    ],
)
def test_a_fan_out_list_must_fit_the_rest(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def test_a_fan_out_list_is_read() -> None:
    config = load_config(None, ["speculation.fan_out=list", "speculation.fan_out_list=[1, 1, 1, 1, 1, 1, 2]"])
    assert config.speculation.fan_out_list == (1, 1, 1, 1, 1, 1, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("target.tensor_parallel=0", "'target.tensor_parallel' must be at least 1, not 0"),
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
        (["coupling=rejection", "saguaro_c=0.5", "saguaro_f=0"], "'speculation.saguaro_f' must be at least 1"),
        (["saguaro_c=0.5"], 'set speculation.coupling = "rejection", or leave saguaro_c at 1.0'),
        (["coupling=rejection", "saguaro_c=0.5", "top_m=4"], "set saguaro_f below speculation.top_m = 4"),
    ],
)
def test_couplings_that_cannot_work_name_their_remedy(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(None, [f"speculation.{override}" for override in overrides])


@pytest.mark.parametrize(
    ("overrides", "sent"), [([], 0), (["coupling=rejection"], 32), (["coupling=rejection", "top_m=1"], 0)]
)
def test_probabilities_travel_only_where_draft_tokens_are_sampled(overrides: list[str], sent: int) -> None:
    config = load_config(None, [f"speculation.{override}" for override in overrides])
    assert config.speculation.sent_probabilities == sent
