"""The target's rank: loads the model, opens the front door, meets the draft, serves."""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click

from launcher.ranks import rendezvous
from launcher.ranks.rank import Rank, forget_loading, link_timing
from ssd_runtime.comm.control.codec import ASKED
from ssd_runtime.comm.control.launcher_messages import Ready
from ssd_runtime.comm.control.server import ControlServer
from ssd_runtime.comm.link.setup import LinkHost
from ssd_runtime.comm.protocol import FrameShape
from ssd_runtime.config import EngineConfig, Mode
from ssd_runtime.draft.colocated import ColocatedSpeculator
from ssd_runtime.draft.drafter import Drafter
from ssd_runtime.engine.engine import Engine
from ssd_runtime.engine.speculator import NoSpeculation, Speculator
from ssd_runtime.errors import ConfigError
from ssd_runtime.host import topology
from ssd_runtime.leader.acceptor import DraftAcceptor, Terms
from ssd_runtime.leader.drafts import Drafts
from ssd_runtime.leader.leader import Leader, Stop
from ssd_runtime.leader.link_speculator import LinkSpeculator
from ssd_runtime.leader.replay import LeadingDecoder
from ssd_runtime.model.batch import Model
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.files.catalogue import resolve
from ssd_runtime.model.text.tokenizer import Tokenizer
from ssd_runtime.speculation.planning.cost_model import CostModel
from ssd_runtime.speculation.planning.planner import AdaptivePlanner, FixedPlanner

log = logging.getLogger("ssd.target")


@dataclass(frozen=True)
class _OwnDraft:
    """A draft in the target's process, and the tokens that both share."""

    decoder: Decoder
    vocab_size: int


@dataclass(frozen=True)
class _Loaded:
    """The models of this process, and the engine with the KV pool that fits beside them."""

    target: Model
    draft: _OwnDraft | None
    engine: EngineConfig


class TargetRank(Rank):
    """Rank 0: the leader."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._stop = Stop()

    def serve(self) -> None:
        config, has_peers = self._config, self._place.world_size > 1
        known_as = self._own_host() if has_peers or self._place.drafts_may_come else None
        server = ControlServer.bind(
            config.serve.host,
            config.serve.port,
            known_as=known_as,
            limits=ASKED.for_prompts(config.engine.max_model_len),
        )
        with contextlib.closing(server):
            store = rendezvous.store(config) if has_peers else None  # kept: it may be this rank's own to serve
            if store is not None:
                store.set(rendezvous.CONTROL_KEY, server.address)
            tokenizer = Tokenizer.from_model(resolve(config.target.model))
            with (
                self._loaded(store, tokenizer) as loaded,
                self._speculators(server, loaded, tokenizer) as (
                    speculators,
                    link,
                    acceptor,
                ),
            ):
                speculation = config.speculation
                with self._models.making_pool(loaded.engine.pool_blocks):
                    engine = Engine.on(
                        loaded.target,
                        loaded.engine,
                        speculation.lookahead,
                        speculators,
                        self._tracer,
                        speculation.coupling,
                    )
                cores = topology.cores_by_role(config, self._place.world_size, self._place.here)
                key = secrets.token_hex(16)
                leader = Leader(config, engine, tokenizer, server, link, acceptor, cores, self._stop, key)
                self._on_stop = self._set_stop
                forget_loading()
                self._announcer.say(Ready(server.address, cores, key))
                if self._announcer.socket is None:  # started by hand: nobody else says it
                    click.echo(f"address: {server.address}")
                log.info("ready at %s", server.address)
                leader.run()
                log.info("leaving: %s", self._stop.reason)

    def _own_host(self) -> str:
        """Where the other ranks reach this one, and drafts of other torchruns, if there is a place for these."""
        place = self._place
        guests = place.drafts_may_come and place.num_drafts < self._config.deployment.drafts
        return rendezvous.own_host(self._config, guests=guests)

    @contextlib.contextmanager
    def _loaded(self, store: Any, tokenizer: Tokenizer) -> Iterator[_Loaded]:
        """The target model, whole or shared with the ranks that follow, and the draft that this process may hold."""
        config, models = self._config, self._models
        if self._place.num_targets == 1:
            target, draft = models.load("target"), self._own_draft(tokenizer)
            yield _Loaded(target, draft, models.engine_of(models.blocks_that_fit()))
            return
        with rendezvous.target_joined(config, self._place, store) as group:
            part, draft = models.load("target", group.tensors), self._own_draft(tokenizer)
            engine = models.engine_of(group.all_loaded(models.blocks_that_fit()))
            heartbeat = config.timeouts.idle_heartbeat
            with contextlib.closing(LeadingDecoder(part, group.frames, engine.block_size, heartbeat)) as decoder:
                decoder.start()
                yield _Loaded(decoder, draft, engine)

    def _set_stop(self, reason: str) -> None:
        self._stop.reason = self._stop.reason or reason

    @contextlib.contextmanager
    def _speculators(
        self, server: ControlServer, loaded: _Loaded, tokenizer: Tokenizer
    ) -> Iterator[tuple[dict[Mode, Speculator], LinkSpeculator | None, DraftAcceptor | None]]:
        """How this engine can speculate: every mode the ranks at hand allow, and what drafts need."""
        config = self._config
        speculators: dict[Mode, Speculator] = {"ar": NoSpeculation()}
        if loaded.draft is not None:
            with self._models.making_pool(loaded.engine.pool_blocks):
                drafter = Drafter(loaded.draft.decoder, loaded.engine, config.speculation, loaded.draft.vocab_size)
            speculators["sd-colocated"] = ColocatedSpeculator(drafter)
        if not self._place.drafts_may_come:
            yield speculators, None, None
            return
        with contextlib.closing(LinkHost(self._own_host())) as host:
            host.check()
            acceptor = self._acceptor(server, host, tokenizer, loaded.engine.pool_blocks)
            try:
                if awaited := self._place.num_drafts or int(config.deployment.draft_required):
                    patience = config.timeouts.load + config.timeouts.handshake
                    acceptor.await_first(awaited, patience, lambda: bool(self._stop))
                speculation, costs = config.speculation, CostModel()
                most = speculation.lookahead, speculation.budget
                planner = AdaptivePlanner(*most, costs) if speculation.adapt else FixedPlanner(*most)
                drafts = Drafts(acceptor, config.timeouts.link)
                link = LinkSpeculator(drafts, speculation.backup, loaded.target.arch.vocab_size, costs, planner)
                link.check()
                speculators |= {"ssd": link, "sd": link}
                yield speculators, link, acceptor
            finally:
                acceptor.close(self._stop.reason or "the target failed")

    def _own_draft(self, tokenizer: Tokenizer) -> _OwnDraft | None:
        """The draft in this process, if it is to hold one."""
        config = self._config
        if not config.deployment.holds_draft(config.speculation.mode):
            return None
        draft = Tokenizer.from_model(resolve(config.draft.model)).vocabulary()
        reason = tokenizer.vocabulary().difference(draft)
        if reason is not None:
            raise ConfigError(f"target {config.target.model} and draft {config.draft.model} do not fit: {reason}")
        return _OwnDraft(self._models.load("draft"), len(draft.tokens))

    def _acceptor(self, server: ControlServer, host: LinkHost, tokenizer: Tokenizer, num_blocks: int) -> DraftAcceptor:
        config, speculation = self._config, self._config.speculation
        shape = FrameShape.of(
            config.engine.max_num_seqs,
            max(1, speculation.lookahead),
            speculation.budget,
            speculation.sent_probabilities,
        )
        first = self._place.num_targets
        ranks = range(first, first + config.deployment.drafts)
        terms = Terms(
            config.digest(),
            tokenizer.vocabulary().digest(),
            shape,
            link_timing(config),
            ranks,
            self._place.num_drafts,
            num_blocks,
            self._place.link_gpu,
        )
        return DraftAcceptor(server, host, terms)
