"""The configuration of one run: frozen dataclasses read from TOML. Knows no devices, opens no model files.

Read once, passed down; each class takes what it uses. A file is data of strangers: every number has a range and every
text and list a size, said in its annotation and checked in `_typed`. Unknown keys and values that are not as they must
be are errors that name the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import tomllib
import typing
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from ssd_runtime.bounds import AtMost, Within, shown, split
from ssd_runtime.errors import ConfigError
from ssd_runtime.reading import read_text

Dtype = Literal["fp32", "bf16", "int8", "int4"]
Device = Literal["cpu", "cuda"]
Mode = Literal["ar", "sd", "sd-colocated", "ssd"]
Numerics = Literal["fast", "invariant"]
NUMERICS: tuple[Numerics, ...] = ("fast", "invariant")
Coupling = Literal["shared-noise", "rejection"]
MOST_LOOKAHEAD = 256
MOST_BYTES = 1 << 14  # of a file; a key of so many dots takes a second to parse
MOST_SLOTS = 1 << 31  # of a KV pool
MOST_WORDS = 1 << 24  # of the largest frame that a draft sends: one number for each token of each branch of a batch
Seconds = Annotated[float, Within(0.01, 86400.0)]
MODES: tuple[Mode, ...] = ("ar", "sd", "sd-colocated", "ssd")


def runs_on(dtype: Dtype, device: str) -> bool:
    """Whether linear layers compute in `dtype` on this kind of device."""
    return device == "cpu" or dtype in ("fp32", "bf16")


@dataclass(frozen=True)
class ModelConfig:
    """One role's model and where it runs.

    Attributes:
        model: path of a Hugging Face directory or GGUF file, or the name of an embedded or random model.
        dtype: what the linear layers compute in.
        device: kind of device; which one follows from the rank (allotment.py).
        threads: compute threads of the rank on a CPU.
        cores: CPU cores the rank is pinned to; empty means "choose apart from the other ranks". Several ranks of one
            role, host and torchrun share them out.
        tensor_parallel: ranks that share the model, the first of the world; for the target only.
    """

    model: Annotated[str, AtMost(4096)] = "smollm2-135m-instruct"
    dtype: Dtype = "bf16"
    device: Device = "cpu"
    threads: Annotated[int, Within(1, 1024)] = 1
    cores: Annotated[tuple[Annotated[int, Within(0, 8191)], ...], AtMost(1024)] = ()
    tensor_parallel: Annotated[int, Within(1, 256)] = 1


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine, the same for both roles.

    Attributes:
        max_model_len: most tokens (prompt and output) of one sequence.
        max_num_seqs: most sequences decoded at once.
        block_size: KV slots in one block.
        num_blocks: blocks in the pool; 0 means enough for max_num_seqs sequences of max_model_len, on a GPU as many of
            these as fit.
        kv_memory: share that KV pools may take of what is free on a GPU once the models are loaded, less the working
            memory of a forward (model/memory.py).
        prefill_chunk: most prompt tokens of one forward.
        numerics: "invariant": a row's rounding depends on nothing that shares its forward, so the tokens are the same
            in every mode, speculation length and batch in bf16 and int8 too. Free with the compiled operators, which
            round so anyway; elsewhere one forward a sequence, of a fixed shape. "fast" leaves it to the operators.
    """

    max_model_len: Annotated[int, Within(2, 1 << 20)] = 2048
    max_num_seqs: Annotated[int, Within(1, 4096)] = 4
    block_size: Annotated[int, Within(1, 1 << 16)] = 16
    num_blocks: Annotated[int, Within(0, 1 << 24)] = 0
    kv_memory: Annotated[float, Within(0.05, 1.0)] = 0.9
    prefill_chunk: Annotated[int, Within(1, 1 << 16)] = 256
    numerics: Numerics = "fast"

    @property
    def sequence_blocks(self) -> int:
        """Blocks of one sequence of max_model_len."""
        return -(-self.max_model_len // self.block_size)

    @property
    def most_blocks(self) -> int:
        """Blocks of sequences that can be in use at once."""
        return self.max_num_seqs * self.sequence_blocks

    @property
    def pool_blocks(self) -> int:
        """Blocks in a pool of KV rows of sequences; a rank on a GPU has put what fits there in place of 0."""
        return self.num_blocks or self.most_blocks


@dataclass(frozen=True)
class SpeculationConfig:
    """How to speculate.

    Attributes:
        mode: what a request gets that does not ask for a mode itself.
        lookahead: K, most draft tokens in one speculation.
        adapt: whether mode `ssd` chooses K and B by measurement, down to no speculation where it does not pay; then
            lookahead and budget are the most of each.
        fan_out: how the budget is spread over the fork positions.
        budget: B, bonus candidates prepared in one verification (sum of F_k): of one sequence, on average over the
            batch.
        recycle: candidates from earlier in the sequence that the draft forwards as bets on its own next token; the
            first leads a chain of as many tokens.
        backup: what speculates after a miss.
        coupling: how draft and target randomness relate. "shared-noise" is exact and drafter-invariant: the tokens are
            the same in every mode. "rejection" is the scheme of the papers: the draft samples tokens of its own, the
            target accepts them with probability min(1, p/q); exact in distribution only.
        top_m: under "rejection", the draft samples from its top_m likeliest tokens and sends as many probabilities; 1
            is a greedy draft, which sends none.
        saguaro_c, saguaro_f: under "rejection", the draft's saguaro_f likeliest tokens are scaled by saguaro_c before
            it samples (Definition 14 of the paper); 1.0 is off.
    """

    mode: Mode = "ssd"
    lookahead: Annotated[int, Within(0, MOST_LOOKAHEAD)] = 6
    adapt: bool = True
    fan_out: Literal["uniform", "geometric", "confidence"] = "confidence"
    budget: Annotated[int, Within(1, 1024)] = 8
    recycle: Annotated[int, Within(0, 1024)] = 3
    backup: Literal["draft", "ngram", "none"] = "draft"
    coupling: Coupling = "shared-noise"
    top_m: Annotated[int, Within(1, 1024)] = 32
    saguaro_c: Annotated[float, Within(0.0, 1.0)] = 1.0
    saguaro_f: Annotated[int, Within(1, 1024)] = 4

    @property
    def sent_probabilities(self) -> int:
        """Most probabilities that travel with a draft token."""
        return self.top_m if self.coupling == "rejection" and self.top_m > 1 else 0


@dataclass(frozen=True)
class TimeoutConfig:
    """Deadlines in seconds. Nothing waits without one.

    Attributes:
        load: longest time a model takes to load.
        handshake: longest time the other side takes to answer while both come up.
        link: longest silence of a peer that was asked for something.
        idle_heartbeat: a side with nothing to say says so this often.
        rejoin: how long a draft that has lost its target tries to find it again.
        shutdown: how long ranks may take to leave.
    """

    load: Seconds = 300.0
    handshake: Seconds = 60.0
    link: Seconds = 20.0
    idle_heartbeat: Seconds = 5.0
    rejoin: Seconds = 120.0
    shutdown: Seconds = 10.0


@dataclass(frozen=True)
class DeploymentConfig:
    """How targets and drafts come together.

    Attributes:
        drafts: D, most drafts at a time. One torchrun world has a rank for each, after the target's; with --role each
            is a torchrun of its own.
        draft_required: a target in a torchrun of its own serves only once a draft has come; else at once, without.
        colocated: a target whose drafts have ranks of their own holds a draft of its own too, for requests in mode
            sd-colocated; in that speculation.mode it does anyway.
        share_gpu: target and drafts of one host are on the same GPUs. They share bandwidth, so drafting hides behind
            verification in part only.
    """

    drafts: Annotated[int, Within(1, 256)] = 1
    draft_required: bool = False
    colocated: bool = False
    share_gpu: bool = False

    def holds_draft(self, mode: Mode) -> bool:
        """Whether the target's process has a draft of its own, by `speculation.mode`."""
        return self.colocated or mode == "sd-colocated"


@dataclass(frozen=True)
class LinkConfig:
    """What frames between target and draft travel by.

    Attributes:
        backend: "gloo" between CPUs, also of ranks on GPUs; "nccl" between GPUs; "auto": topology.link_backend knows.
    """

    backend: Literal["auto", "gloo", "nccl"] = "auto"


@dataclass(frozen=True)
class ServeConfig:
    """The front door.

    Attributes:
        host: address of the leader's node to listen at; 0.0.0.0 for all, :: for those of IPv6 too.
        port: 0 takes a free one.
        announce: with host 0.0.0.0, which of the node's addresses clients and drafts are told; empty finds one.
        allow_shutdown: whether clients of other hosts may end the engine. Those of this host may, over a loopback
            address, and whoever started it.
        max_queued_requests: while so many wait beyond those there is a place for, further ones are refused at once.
            Each output of a request with several counts.
        max_stop_strings: most stop strings of a request.
        max_stop_bytes: most bytes of UTF-8 of each.
    """

    host: Annotated[str, AtMost(255)] = "127.0.0.1"
    port: Annotated[int, Within(0, 65535)] = 0
    max_queued_requests: Annotated[int, Within(1, 1 << 20)] = 1024
    max_stop_strings: Annotated[int, Within(0, 256)] = 16
    max_stop_bytes: Annotated[int, Within(1, 1 << 16)] = 1024
    announce: Annotated[str, AtMost(255)] = ""
    allow_shutdown: bool = False

    @property
    def is_wildcard(self) -> bool:
        """Whether `host` is all addresses, and so none to tell others."""
        return self.host.strip("[]") in ("0.0.0.0", "::", "*")


@dataclass(frozen=True)
class Config:
    """A complete run."""

    target: ModelConfig = field(default_factory=ModelConfig)
    draft: ModelConfig = field(default_factory=lambda: ModelConfig(dtype="int8"))
    engine: EngineConfig = field(default_factory=EngineConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    timeouts: TimeoutConfig = field(default_factory=TimeoutConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    deployment: DeploymentConfig = field(default_factory=DeploymentConfig)
    link: LinkConfig = field(default_factory=LinkConfig)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_toml(self) -> str:
        """All of it as a file that `load_config` reads back. JSON's numbers, lists and text are TOML's as well."""
        lines = []
        for section, values in self.to_dict().items():
            lines += ["", f"[{section}]"]
            lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
        return "\n".join(lines[1:]) + "\n"

    def digest(self) -> str:
        """What both roles must agree on, as 16 hexadecimal digits (models and cores may differ in spelling)."""
        shared = {name: dataclasses.asdict(getattr(self, name)) for name in ("engine", "speculation", "link")}
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ConfigFile:
    """A configuration file that has been read: a pipe gives its text only once.

    Attributes:
        path: where it was.
        text: TOML, as yet unparsed.
    """

    path: Path
    text: str

    @classmethod
    def read(cls, path: str | Path) -> ConfigFile:
        """Raises ConfigError for a file that cannot be read, is too large, or is not text."""
        return cls(Path(path), read_text(path, "config", MOST_BYTES))


def load_config(source: str | Path | ConfigFile | None, overrides: typing.Sequence[str] = ()) -> Config:
    """Read TOML, apply `section.key=value` overrides, validate.

    Raises:
        ConfigError: unreadable file, unknown section or key, ill-typed value, impossible combination.
    """
    tree: dict[str, Any] = {}
    if source is not None:
        file = source if isinstance(source, ConfigFile) else ConfigFile.read(source)
        try:
            tree = tomllib.loads(file.text)
        except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
            raise ConfigError(f"config {file.path} is not valid TOML: {_reason(error)}") from None
    for override in overrides:
        _override(tree, override)
    return config_from_dict(tree)


def config_from_dict(tree: dict[str, Any]) -> Config:
    """Build and validate a `Config` from nested dicts; raises ConfigError naming the key at fault."""
    config = _build(Config, tree, "")
    _validate(config)
    return config


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) != 2 or not all(parts):
        raise ConfigError(f"--set {shown(text)}: expected section.key=value, as in speculation.lookahead=3")
    try:
        parsed = tomllib.loads(f"x = {value}")
    except (ValueError, RecursionError):
        parsed = {}
    section = tree.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise ConfigError(f"--set {shown(text)}: {shown(parts[0])} is not a section")
    # A bare word is a string: --set target.model=/path/to/model
    section[parts[1]] = parsed["x"] if list(parsed) == ["x"] else value


def _build(cls: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"config key {where!r} must be a section, not {shown(values)}")
    hints = typing.get_type_hints(cls, include_extras=True)
    defaults = Config() if cls is Config else None
    arguments = {}
    for key, value in values.items():
        name = f"{where}.{key}" if where else key
        if key not in hints:
            close = difflib.get_close_matches(key[:64], hints, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(hints)}"
            raise ConfigError(f"unknown config key {shown(name)}{hint}")
        if dataclasses.is_dataclass(hints[key]):
            base = dataclasses.asdict(getattr(defaults, key)) if defaults else {}
            if isinstance(value, dict):
                value = {**base, **value}
            arguments[key] = _build(hints[key], value, name)
        else:
            arguments[key] = _typed(value, hints[key], name)
    return cls(**arguments)


def _typed(value: Any, hint: Any, name: str) -> Any:
    """The value of one key, if it is of the type and within the bound that its annotation says."""
    hint, bound = split(hint)
    if typing.get_origin(hint) is Literal:
        options = typing.get_args(hint)
        if value in options:
            return value
        raise ConfigError(f"config key {name!r} must be one of {', '.join(options)}, not {shown(value)}")
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"config key {name!r} must be a list, not {shown(value)}")
        if bound is not None and not bound.allows(value):  # type: ignore[arg-type]
            raise ConfigError(f"config key {name!r} must be a list of {bound.wanted}, not of {len(value)}")
        return tuple(_typed(one, typing.get_args(hint)[0], name) for one in value)
    is_number = hint is float and type(value) is int
    if type(value) is not hint and not is_number:
        raise ConfigError(f"config key {name!r} must be {hint.__name__}, not {shown(value)}")
    if bound is not None and not bound.allows(value):
        kind = "text of " if hint is str else ""
        raise ConfigError(
            f"config key {name!r} must be {kind}{bound.wanted}{' bytes' * (hint is str)}, not {shown(value)}"
        )
    if hint is str and any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise ConfigError(f"config key {name!r} must be UTF-8 without control characters, not {shown(value)}")
    return float(value) if is_number else value


def _validate(config: Config) -> None:
    """Raise ConfigError for values that do not go together."""
    engine, speculation = config.engine, config.speculation
    _validate_coupling(speculation)
    _validate_devices(config)
    words = engine.max_num_seqs * (speculation.budget + 1) * (speculation.lookahead + 1)
    words *= 1 + speculation.sent_probabilities
    if words > MOST_WORDS:
        keys = "engine.max_num_seqs, speculation.budget and speculation.lookahead"
        keys += ", with speculation.top_m," * bool(speculation.sent_probabilities)
        raise ConfigError(f"config keys {keys} make frames of {words} numbers, above {MOST_WORDS}: lower one of them")
    if engine.pool_blocks * engine.block_size > MOST_SLOTS:
        keys = (
            "engine.num_blocks and engine.block_size" if engine.num_blocks else "engine.max_num_seqs and max_model_len"
        )
        raise ConfigError(f"config keys {keys} make a pool of more than {MOST_SLOTS} KV slots: lower one of them")
    if config.draft.tensor_parallel != 1:
        raise ConfigError("config key 'draft.tensor_parallel' must be 1: a draft is one rank; start several instead")
    for role, model in (("target", config.target), ("draft", config.draft)):
        if config.link.backend == "nccl" and model.device == "cpu":
            raise ConfigError(
                f"config key 'link.backend' = nccl carries frames between GPUs, and the {role} is on a CPU: "
                f'set {role}.device = "cuda", or link.backend = "auto"'
            )
    if config.serve.announce and not config.serve.is_wildcard:
        host = config.serve.host
        raise ConfigError(
            f"config key 'serve.announce' is for serve.host = 0.0.0.0; here {host} is what others are told"
        )


def _validate_devices(config: Config) -> None:
    deployment = config.deployment
    if deployment.share_gpu and not config.target.device == config.draft.device == "cuda":
        raise ConfigError(
            "config key 'deployment.share_gpu' is for both roles on GPUs: set target.device = draft.device = \"cuda\""
        )
    held = [("draft", "target")] if deployment.holds_draft(config.speculation.mode) else []
    for role, process in [("target", "target"), ("draft", "draft"), *held]:
        dtype, device = getattr(config, role).dtype, getattr(config, process).device
        if not runs_on(dtype, device):
            where = f"{process}.device = {device}" + ", where a draft in its process is too" * (role != process)
            raise ConfigError(
                f"config key '{role}.dtype' = {dtype} runs on the CPU only, not on {where}: set {role}.dtype = bf16"
            )


def _validate_coupling(speculation: SpeculationConfig) -> None:
    top_m, c, f = speculation.top_m, speculation.saguaro_c, speculation.saguaro_f
    if c == 1.0:
        return
    if speculation.coupling != "rejection":
        wanted = 'set speculation.coupling = "rejection", or leave saguaro_c at 1.0'
        raise ConfigError(f"config key 'speculation.saguaro_c' is for rejection sampling: {wanted}")
    if f >= top_m:
        wanted = f"set saguaro_f below speculation.top_m = {top_m}"
        raise ConfigError(f"config key 'speculation.saguaro_f' = {f} scales all tokens alike, to no effect: {wanted}")
