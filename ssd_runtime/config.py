"""The configuration of one run: frozen dataclasses read from TOML. Knows no devices, opens no model files.

Read once, passed down; each class takes what it uses. A file is data of strangers: every number has a range and every
text and list a size, said in its annotation (typed.py). Unknown keys and values that are not as they must be are errors
that name the key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from ssd_runtime.errors import ConfigError
from ssd_runtime.reading import read_text
from ssd_runtime.typed import Unfit, shown, typed

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
_LINE = r"^[^\x00-\x1f\x7f-\x9f\ud800-\udfff]*\Z"  # no control character, and nothing that is not UTF-8
Seconds = Annotated[float, Meta(ge=0.01, le=86400)]
ModelPath = Annotated[str, Meta(max_length=4096, pattern=_LINE)]
Host = Annotated[str, Meta(max_length=255, pattern=_LINE)]
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

    model: ModelPath = "smollm2-135m-instruct"
    dtype: Dtype = "bf16"
    device: Device = "cpu"
    threads: Annotated[int, Meta(ge=1, le=1024)] = 1
    cores: Annotated[tuple[Annotated[int, Meta(ge=0, le=8191)], ...], Meta(max_length=1024)] = ()
    tensor_parallel: Annotated[int, Meta(ge=1, le=256)] = 1


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

    max_model_len: Annotated[int, Meta(ge=2, le=1 << 20)] = 2048
    max_num_seqs: Annotated[int, Meta(ge=1, le=4096)] = 4
    block_size: Annotated[int, Meta(ge=1, le=1 << 16)] = 16
    num_blocks: Annotated[int, Meta(ge=0, le=1 << 24)] = 0
    kv_memory: Annotated[float, Meta(ge=0.05, le=1)] = 0.9
    prefill_chunk: Annotated[int, Meta(ge=1, le=1 << 16)] = 256
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
    lookahead: Annotated[int, Meta(ge=0, le=MOST_LOOKAHEAD)] = 6
    adapt: bool = True
    fan_out: Literal["uniform", "geometric", "confidence"] = "confidence"
    budget: Annotated[int, Meta(ge=1, le=1024)] = 8
    recycle: Annotated[int, Meta(ge=0, le=1024)] = 3
    backup: Literal["draft", "ngram", "none"] = "draft"
    coupling: Coupling = "shared-noise"
    top_m: Annotated[int, Meta(ge=1, le=1024)] = 32
    saguaro_c: Annotated[float, Meta(ge=0, le=1)] = 1.0
    saguaro_f: Annotated[int, Meta(ge=1, le=1024)] = 4

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

    drafts: Annotated[int, Meta(ge=1, le=256)] = 1
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
        backend: "gloo" between CPUs, also of ranks on GPUs; "nccl" between GPUs; "auto": the better one, as measured.
    """

    backend: Literal["auto", "gloo", "nccl"] = "auto"

    @property
    def carrier(self) -> Literal["gloo", "nccl"]:
        """What `backend` comes to: "auto" is Gloo until ops/gpu/third.sh has shown NCCL right and not slower."""
        return "gloo" if self.backend == "auto" else self.backend


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

    host: Host = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 0
    max_queued_requests: Annotated[int, Meta(ge=1, le=1 << 20)] = 1024
    max_stop_strings: Annotated[int, Meta(ge=0, le=256)] = 16
    max_stop_bytes: Annotated[int, Meta(ge=1, le=1 << 16)] = 1024
    announce: Host = ""
    allow_shutdown: bool = False

    @property
    def is_wildcard(self) -> bool:
        """Whether `host` is all addresses, and so none to tell others."""
        return self.host.strip("[]") in ("0.0.0.0", "::", "*")


@dataclass(frozen=True)
class Config:
    """A complete run."""

    target: ModelConfig = ModelConfig()
    draft: ModelConfig = ModelConfig(dtype="int8")
    engine: EngineConfig = EngineConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    timeouts: TimeoutConfig = TimeoutConfig()
    serve: ServeConfig = ServeConfig()
    deployment: DeploymentConfig = DeploymentConfig()
    link: LinkConfig = LinkConfig()

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
        shared = {name: dataclasses.asdict(getattr(self, name)) for name in ("engine", "speculation")}
        shared["link"] = {"backend": self.link.carrier}
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


def load_config(source: str | Path | ConfigFile | None, overrides: Sequence[str] = ()) -> Config:
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
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise ConfigError(f"config {file.path} is not valid TOML: {reason}") from None
    for override in overrides:
        _override(tree, override)
    return config_from_dict(tree)


def config_from_dict(tree: dict[str, Any]) -> Config:
    """Build and validate a `Config` from nested dicts; raises ConfigError naming the key at fault."""
    draft = tree.get("draft")
    if isinstance(draft, dict):  # its defaults are its own
        tree = {**tree, "draft": {**dataclasses.asdict(Config.draft), **draft}}
    try:
        config = typed(tree, Config)
    except Unfit as unfit:
        raise ConfigError(f"config key {unfit.path!r} {unfit.reason}") from None
    for conflict in _conflicts(config):
        raise ConfigError(f"config key {conflict}")
    return config


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


def _conflicts(config: Config) -> Iterator[str]:
    """What is wrong with values that do not go together, each naming a key and a remedy."""
    yield from _size_conflicts(config.engine, config.speculation)
    yield from _coupling_conflicts(config.speculation)
    yield from _device_conflicts(config)
    if config.draft.tensor_parallel != 1:
        yield "'draft.tensor_parallel' must be 1: a draft is one rank; start several instead"
    if config.serve.announce and not config.serve.is_wildcard:
        yield f"'serve.announce' is for serve.host = 0.0.0.0; here {config.serve.host} is what others are told"


def _size_conflicts(engine: EngineConfig, speculation: SpeculationConfig) -> Iterator[str]:
    words = engine.max_num_seqs * (speculation.budget + 1) * (speculation.lookahead + 1)
    words *= 1 + speculation.sent_probabilities
    if words > MOST_WORDS:
        others = "speculation.budget and lookahead" + ", and top_m" * bool(speculation.sent_probabilities)
        frames = f"frames of {words} numbers, above {MOST_WORDS}"
        yield f"'engine.max_num_seqs' with {others} makes {frames}: lower one of them"
    if engine.pool_blocks * engine.block_size > MOST_SLOTS:
        keys = "num_blocks' with block_size" if engine.num_blocks else "max_num_seqs' with max_model_len"
        yield f"'engine.{keys} makes a pool of more than {MOST_SLOTS} KV slots: lower one of them"


def _coupling_conflicts(speculation: SpeculationConfig) -> Iterator[str]:
    top_m, f = speculation.top_m, speculation.saguaro_f
    if speculation.saguaro_c == 1.0:
        return
    if speculation.coupling != "rejection":
        wanted = 'set speculation.coupling = "rejection", or leave saguaro_c at 1.0'
        yield f"'speculation.saguaro_c' is for rejection sampling: {wanted}"
    if f >= top_m:
        wanted = f"set saguaro_f below speculation.top_m = {top_m}"
        yield f"'speculation.saguaro_f' = {f} scales all tokens alike, to no effect: {wanted}"


def _device_conflicts(config: Config) -> Iterator[str]:
    deployment = config.deployment
    if deployment.share_gpu and not config.target.device == config.draft.device == "cuda":
        yield "'deployment.share_gpu' is for both roles on GPUs: set target.device = draft.device = \"cuda\""
    held = [("draft", "target")] if deployment.holds_draft(config.speculation.mode) else []
    for role, process in [("target", "target"), ("draft", "draft"), *held]:
        dtype, device = getattr(config, role).dtype, getattr(config, process).device
        if not runs_on(dtype, device):
            where = f"{process}.device = {device}" + ", where a draft in its process is too" * (role != process)
            yield f"'{role}.dtype' = {dtype} runs on the CPU only, not on {where}: set {role}.dtype = bf16"
        if config.link.backend == "nccl" and device == "cpu":
            remedy = f'set {process}.device = "cuda", or link.backend = "auto"'
            yield f"'link.backend' = nccl carries frames between GPUs, and the {process} is on a CPU: {remedy}"
