"""What can be told before ranks are started: models, vocabularies, the port, the prompt. Reads headers, no weights.

Never imports torch, which takes seconds, unless a device is a GPU: torch is asked whether there is one.
"""

from __future__ import annotations

import os
import resource
import socket
from dataclasses import replace

from launcher.nodes import ONE_NODE, Nodes, num_ranks
from ssd_runtime.comm import hosts
from ssd_runtime.comm.control.client_messages import Generate
from ssd_runtime.config import Config
from ssd_runtime.engine.stop_strings import check_stop_strings
from ssd_runtime.errors import ConfigError, RequestError
from ssd_runtime.host import topology
from ssd_runtime.host.allotment import model_of
from ssd_runtime.host.topology import Group, Role
from ssd_runtime.model.files.catalogue import resolve
from ssd_runtime.model.files.header import ModelHeader, inspect_model
from ssd_runtime.model.memory import GIB, demand
from ssd_runtime.model.random.models import random_model
from ssd_runtime.model.text.tokenizer import Tokenizer
from ssd_runtime.speculation.limits import check_processors, check_sampling

LEAST_FILES = 256  # descriptors that a rank may need to come up, with a link to each of a few drafts
LOOPBACK_S = 2.0


def check_engine(config: Config, nodes: Nodes = ONE_NODE, group: Group | None = None) -> None:
    """Raise ConfigError for what would keep the engine from starting; each of several nodes checks its devices."""
    check_host()
    if group is not None and group.role == "draft":
        check_target(group)
        check_memory(config, "draft", inspect_model(resolve(config.draft.model)))
        return
    if nodes.leads:
        check_port(config)
    if nodes.count == 1 and group is None:
        check_devices(config)
    mode = config.speculation.mode
    loads_draft = (mode != "ar" and group is None) or config.deployment.holds_draft(mode)
    target, draft = inspect(config if loads_draft else replace(config, draft=config.target))
    check_shards(config, target)
    reason = target.vocabulary.difference(draft.vocabulary)
    if reason is not None:
        raise ConfigError(f"target {config.target.model} and draft {config.draft.model} do not fit: {reason}")
    check_memory(config, "target", target)
    if loads_draft:
        check_memory(config, "draft", draft)


def check_host() -> None:
    """Raise ConfigError for a host on which no rank would come up: too few open files, or no loopback interface.

    A soft limit of open files is raised, for the ranks too, where the hard one allows it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < LEAST_FILES:  # negative is no limit
        if 0 <= hard < LEAST_FILES:
            raise ConfigError(f"only {hard} files may be open here, and ranks need {LEAST_FILES}: raise ulimit -n")
        resource.setrlimit(resource.RLIMIT_NOFILE, (LEAST_FILES, hard))
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), LOOPBACK_S).close()
    except OSError as error:
        reason = error.strerror or "no answer"
        raise ConfigError(
            f"this host does not reach itself at 127.0.0.1 ({reason}), where its ranks meet: ip link set lo up"
        ) from None


def inspect(config: Config) -> tuple[ModelHeader, ModelHeader]:
    """The headers of target and draft. Raises ConfigError for a target that is to agree with itself."""
    if (model := random_model(config.target.model)) is not None and model.agreement < 1.0:
        raise ConfigError(f"target model {config.target.model}: its text is the script; give an agreement to the draft")
    target_path, draft_path = resolve(config.target.model), resolve(config.draft.model)
    target = inspect_model(target_path)
    return target, target if draft_path == target_path else inspect_model(draft_path)


def check_shards(config: Config, target: ModelHeader) -> None:
    """Raise ConfigError for a target that does not divide among target.tensor_parallel ranks."""
    if config.target.tensor_parallel > 1:
        target.arch.check_divides(config.target.tensor_parallel, f"target model {config.target.model}")


def check_memory(config: Config, role: Role, header: ModelHeader) -> None:
    """Raise ConfigError for a KV pool of one rank on the CPU that is larger than this host's memory."""
    model, engine = getattr(config, role), config.engine
    pool = demand(config, role, header.arch, model.device).pool(engine.pool_blocks)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if model.device == "cpu" and pool > memory:
        keys = "engine.num_blocks" if engine.num_blocks else "engine.max_num_seqs or engine.max_model_len"
        needs = f"the KV pool of the {role} needs {pool / GIB:.1f} GiB"
        raise ConfigError(f"{needs}, and this host has {memory / GIB:.1f} GiB of memory: lower {keys}")


def check_port(config: Config) -> None:
    """Raise ConfigError if the configured port is taken or the host, or the address to announce, is not ours."""
    host, port = config.serve.host, config.serve.port
    try:
        family, address = hosts.resolve(host, port)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        remedy = "set serve.port to another, or to 0 for any free one"
        raise ConfigError(
            f"cannot listen on {hosts.join(hosts.bare(host), port)}: {error.strerror}; {remedy}"
        ) from None
    if config.serve.announce and not hosts.is_own(config.serve.announce):
        raise ConfigError(f"serve.announce = {config.serve.announce} is not an address of this node")


def check_target(group: Group) -> None:
    """Raise ConfigError for a draft's --target that is no address."""
    try:
        hosts.split(group.target or "")
    except ValueError as error:
        raise ConfigError(f"--target {group.target!r} is not an address; {error}") from None


def check_devices(config: Config) -> None:
    """Raise ConfigError for GPUs and cores that this host does not have, and for a link that cannot be between them."""
    topology.link_backend(config, os.environ)
    here = range(num_ranks(config))
    topology.cores_by_role(config, len(here))  # raises for a named core that is not ours
    roles = topology.roles_of(config, here)
    if any(model_of(config, role).device != "cpu" for role in roles):
        topology.devices_of(config, roles)


def check_request(request: Generate, config: Config) -> None:
    """Raise RequestError or ConfigError for a request that the engine of `config` would refuse."""
    check_not_empty(request)
    check_stop(request)
    check_stop_strings(request.stop, config.serve.max_stop_strings, config.serve.max_stop_bytes)
    params = request.params
    check_sampling(params)
    if params.logit_bias or params.allowed_tokens is not None or params.banned_tokens:
        header = inspect_model(resolve(config.target.model))
        check_processors(params, header.arch.vocab_size, header.eos_token_ids)
    length = count_tokens(request, Tokenizer.from_model(resolve(config.target.model)))
    limit = config.engine.max_model_len
    if length >= limit:
        raise RequestError(
            f"the prompt has {length} tokens, which leaves no room for an answer in engine.max_model_len = {limit}"
        )


def check_not_empty(request: Generate) -> None:
    """Raise RequestError for a request that says nothing."""
    said = request.prompt if request.messages is None else "".join(m.content for m in request.messages).strip()
    if not said:
        raise RequestError("the prompt is empty; give one with --prompt, or --prompt - to read standard input")


def check_stop(request: Generate) -> None:
    """Raise RequestError for a stop string that every text would meet at once."""
    if "" in request.stop:
        raise RequestError("--stop is empty: every text would end at once")


def count_tokens(request: Generate, tokenizer: Tokenizer) -> int:
    """Tokens of the prompt as the engine will see it."""
    if request.messages is None:
        return len(tokenizer.encode(request.prompt or ""))
    chat = tokenizer.chat([{"role": m.role, "content": m.content} for m in request.messages])
    return len(tokenizer.encode(chat, add_special=False))
