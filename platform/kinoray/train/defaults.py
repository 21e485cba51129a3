"""What the flags of `train` and `tune` are laid upon: nothing, a preset, the settings of a run, a network's own recipe.

Flags are read twice where what they are laid upon follows from them. Easy to break: a flag that says what is the
default anyway is the user's word, too, so nothing here may be found out by comparing settings with their defaults. And
torch, which takes seconds, is imported only where a network must be built to know its clips.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import tyro

from kinoray.config.file import MAX_FILE_BYTES, config_from_bytes
from kinoray.config.shared import ClipConfig, ModelConfig
from kinoray.errors import ConfigError, StorageError
from kinoray.network.resolve import is_whole
from kinoray.train.config import PRESETS, TrainConfig

__all__ = ["like", "on_its_network", "preset_of"]

Settings = TypeVar("Settings", bound=TrainConfig)
_FED_BY_DEFAULT = ("vcm_sdd", "vcm_sdd_r101")  # the defaults of the settings are theirs


def preset_of(cls: type[Settings], preset: str) -> Settings:
    """The config with a preset's recipe in it; what a verb needs besides stays open.

    Raises:
        ConfigError: there is no such preset.
    """
    if preset not in PRESETS:
        raise ConfigError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    recipe = PRESETS[preset]()
    return cls(**{field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)})


def like(cls: type[Settings], run: str, parse: Callable[[Any], Settings]) -> Settings:
    """The settings of a run. Where to write, the store, the cluster and the cache's folder are this command's own.

    Raises:
        ConfigError: there is no run, or its settings cannot be read.
    """
    from kinoray.storage.objects import Storage, join

    own = parse(cls(catalog="", out=""))
    try:
        data = Storage(own.storage).read(join(run, "config.yaml"), max_bytes=MAX_FILE_BYTES)
    except StorageError as error:
        raise ConfigError(f"--like must name the run folder of a training, got {run}: {error}") from error
    found = config_from_bytes(cls, data, f"--like {run}: config.yaml")
    resources = dataclasses.replace(found.resources, address=own.resources.address)
    cache = dataclasses.replace(found.cache, folder=own.cache.folder)
    return dataclasses.replace(found, out=tyro.MISSING, storage=own.storage, resources=resources, cache=cache)


def on_its_network(
    cls: type[Settings],
    config: Settings,
    default: Settings | None,
    parse: Callable[[Any], Settings],
    *,
    is_preset: bool,
) -> Settings:
    """Settings that were made for one network, where flags name another one, and those that a network brings along.

    Options go to the network that they were written for. Published weights bring the recipe of fine-tuning, and later
    their own clips (kinoray.train.verb.with_start). A preset's clips are fitted to another network. What a file or a
    run says stays.

    Args:
        config: the flags, laid upon `default`; None: upon nothing.
        parse: lays the flags upon other settings.
    """
    is_published = is_whole(config.init_from)
    if default is None:
        if is_published:
            return parse(preset_of(cls, "finetune"))
        return config if config.model.factory in _FED_BY_DEFAULT else parse(_fed_by_recipe(cls, config.model))
    is_other = config.model.factory != default.model.factory
    bare = ModelConfig(factory=config.model.factory)
    if is_preset and is_published:
        model = bare if is_other else ModelConfig()
        return parse(dataclasses.replace(default, model=model, clip=ClipConfig()))
    if not is_other:  # options that flags name join those of the file or preset, as all other flags do
        options = {**default.model.options, **config.model.options}
        return dataclasses.replace(config, model=dataclasses.replace(config.model, options=options))
    config = parse(dataclasses.replace(default, model=bare))
    if not is_preset:
        return config
    return parse(dataclasses.replace(default, model=bare, clip=_fitted(config.model, default)))


def _fed_by_recipe(cls: type[Settings], model: ModelConfig) -> Settings:
    """The defaults of a verb, with the clip of the network's own recipe."""
    from kinoray.network.build import clip_of_network

    values: dict[str, Any] = {"clip": clip_of_network(model), "model": model}
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            values[field.name] = tyro.MISSING
    return cls(**values)


def _fitted(model: ModelConfig, preset: TrainConfig) -> ClipConfig:
    """A preset's clip for another network than its own; the network's where the preset says nothing of clips."""
    from kinoray.network.build import clip_of_network, clip_on

    return clip_of_network(model) if preset.clip == ClipConfig() else clip_on(model, preset.clip, preset.model)
