"""The models of one rank, loaded; the KV pool that fits beside them; what is said where memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from launcher.ranks.announcer import Announcer
from ssd_runtime.comm.control.launcher_messages import Progress
from ssd_runtime.config import Config, EngineConfig, ModelConfig
from ssd_runtime.errors import ConfigError
from ssd_runtime.host.cores import Role
from ssd_runtime.host.topology import Placement
from ssd_runtime.model import memory
from ssd_runtime.model.architecture import Architecture
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.device_memory import enough_for, free_and_total, ran_out, told
from ssd_runtime.model.files.catalogue import resolve
from ssd_runtime.model.files.header import open_weights
from ssd_runtime.model.load import load_decoder
from ssd_runtime.model.parallel import ALONE, Collective

log = logging.getLogger("ssd.rank")


class Models:
    """Those of one rank.

    Args:
        config: of the run.
        place: role and device of the rank.
        announcer: told how loading goes on.
    """

    def __init__(self, config: Config, place: Placement, announcer: Announcer) -> None:
        self._config = config
        self._place = place
        self._announcer = announcer
        self._shapes: dict[Role, Architecture] = {}

    def load(self, role: Role, group: Collective = ALONE) -> Decoder:
        """The model of this rank's role, or a draft in the target's process.

        Raises:
            ConfigError: as `load_decoder`; a model too short for engine.max_model_len, or too large for the device.
        """
        config, place = self._config, self._place
        model: ModelConfig = getattr(config, role)
        phase = role if role == place.role else f"{role} in the {place.role}'s process"

        def progress(fraction: float) -> None:
            self._announcer.say(Progress(place.role, place.rank, f"load {phase}", fraction))

        def needs() -> str:
            size = memory.weight_bytes(_header(config, role).part(group.size), model.dtype, model.device)
            return f"{size / memory.GIB:.1f} GiB of weights"

        progress(0.0)
        more = "more ranks (target.tensor_parallel) or " * (role == "target")
        remedy = f"use {more}a smaller dtype or model"
        with self._enough_for(f"loading the {phase} model {model.model}", needs, remedy):
            decoder = load_decoder(resolve(model.model), model.dtype, place.device, progress, group)
        decoder.arch.check_length(config.engine.max_model_len, f"{phase} model {model.model}")
        self._shapes[role] = decoder.arch
        return decoder

    def blocks_that_fit(self) -> int:
        """KV blocks for sequences that this rank may have beside its models, which are loaded."""
        config, place = self._config, self._place
        if place.device.type == "cpu":
            return config.engine.pool_blocks
        if memory.shares_gpu(config):
            other: Role = "draft" if place.role == "target" else "target"
            self._shapes[other] = _header(config, other)
        return memory.blocks_that_fit(config, place.role, self._shapes, *free_and_total(place.device))

    def engine_of(self, blocks: int) -> EngineConfig:
        """The engine with so many KV blocks for sequences.

        Raises:
            ConfigError: as `memory.with_pool`.
        """
        config = self._config
        try:
            engine = memory.with_pool(config.engine, blocks)
        except ConfigError as error:
            raise ConfigError(f"{self._who} on {self._place.device}: {error}") from None
        log.info("%s; %s", memory.about_pool(config.engine, blocks), self._pool_size(blocks))
        return engine

    def making_pool(self, blocks: int) -> AbstractContextManager[None]:
        """Around what makes the pools. Raises ConfigError where the device's memory runs out in it."""
        remedy = f"lower engine.{'num_blocks' if self._config.engine.num_blocks else 'kv_memory'}"
        return self._enough_for("making the KV pool", lambda: self._pool_size(blocks), remedy)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around all the work of the rank: what nobody contains ends it. Raises as `making_pool`."""
        try:
            yield
        except RuntimeError as error:
            if not ran_out(error):
                raise
            raise ConfigError(f"{self._who} on {self._place.device}: {told(error)}") from error

    def _enough_for(self, doing: str, needs: Callable[[], str], remedy: str) -> AbstractContextManager[None]:
        return enough_for(doing, self._who, self._place.device, needs, remedy)

    @property
    def _who(self) -> str:
        return f"{self._place.role} rank {self._place.rank}"

    def _pool_size(self, blocks: int) -> str:
        demands = memory.demands_of_rank(self._config, self._place.role, self._shapes)
        return f"{sum(one.pool(blocks) for one in demands) / memory.GIB:.2f} GiB"


def _header(config: Config, role: Role) -> Architecture:
    """The shape that the file of a role's model tells."""
    return open_weights(resolve(getattr(config, role).model)).architecture
