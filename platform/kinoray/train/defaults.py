"""What the settings of a training are before flags: a preset's, those of another run, those of a network's recipe.

Flags always win: what is made here is parsed over again (`parse`). What is easy to break: options and clips were
written for one network, and must not go to another one; torch is not imported where the default network is trained.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import tyro

from kinoray.config.file import MAX_FILE_BYTES, config_from_bytes
from kinoray.errors import ConfigError, StorageError
from kinoray.network.resolve import is_whole
from kinoray.storage.objects import Storage, join
from kinoray.train.config import PRESETS

__all__ = ["fit_to_network", "preset_settings", "settings_of_run", "with_options"]

Parse = Callable[[Any], Any]
"""The settings that the flags of the command line make of some defaults."""

_FED_BY_DEFAULT = ("vcm_sdd", "vcm_sdd_r101")  # the defaults of the settings are theirs


def preset_settings(cls: type[Any], preset: str) -> Any:
    """The config of a verb that trains with a preset's recipe in it. Raises ConfigError: there is none of that name."""
    if preset not in PRESETS:
        raise ConfigError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    recipe = PRESETS[preset]()
    return cls(**{field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)})


def settings_of_run(cls: type[Any], run: str, parse: Parse) -> Any:
    """The settings of a run. Where it wrote, the store, the cluster and the cache's folder are this command's own.

    Raises:
        ConfigError: there is no run, or its settings cannot be read.
    """
    own = parse(cls(catalog="", out=""))
    try:
        data = Storage(own.storage).read(join(run, "config.yaml"), max_bytes=MAX_FILE_BYTES)
    except StorageError as error:
        raise ConfigError(f"--like must name the run folder of a training, got {run}: {error}") from error
    found = config_from_bytes(cls, data, f"--like {run}: config.yaml")
    resources = dataclasses.replace(found.resources, address=own.resources.address)
    cache = dataclasses.replace(found.cache, folder=own.cache.folder)
    return dataclasses.replace(found, out=tyro.MISSING, storage=own.storage, resources=resources, cache=cache)


def fit_to_network(cls: type[Any], config: Any, default: Any, parse: Parse, *, is_preset: bool) -> Any:
    """Settings that were made for one network, where flags name another one; and the recipe of published weights.

    Options go to the network that they were written for. A preset's clips are fitted to the other network, but a
    published one has its own (kinoray.train.verb.with_start).
    """
    published = is_whole(config.init_from)
    if default is None:
        if published:
            return parse(preset_settings(cls, "finetune"))
        return config if config.model.factory in _FED_BY_DEFAULT else parse(_fed_by_recipe(cls, config))
    model = type(config.model)(factory=config.model.factory)
    is_other = config.model.factory != default.model.factory
    if published and is_preset:
        clip = type(default.clip)()
        return parse(dataclasses.replace(default, model=model if is_other else type(model)(), clip=clip))
    if not is_other:
        return config
    config = parse(dataclasses.replace(default, model=model))
    if not is_preset or default.clip == type(default.clip)():
        return config
    from kinoray.network.build import clip_on

    clip = clip_on(config.model, default.clip, default.model)
    return parse(dataclasses.replace(default, model=model, clip=clip))


def _fed_by_recipe(cls: type[Any], config: Any) -> Any:
    """The defaults of a verb that trains, with the clip of the network's own recipe; flags are read over them again.

    A preset or a file says how its network is fed, so this is for flags alone.
    """
    from kinoray.network.build import clip_of_network

    values = {"clip": clip_of_network(config.model), "model": config.model}
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            values[field.name] = tyro.MISSING
    return cls(**values)


def with_options(config: Any, default: Any) -> Any:
    """Options of the network that flags name join those of the file or preset, as all other flags do."""
    if config.model.factory != default.model.factory:
        return config
    options = {**default.model.options, **config.model.options}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, options=options))
