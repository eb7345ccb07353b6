"""Methods by name: each stands in one file, which registers it, and everything that lists methods reads the registry.

A method is a mixer, a schedule, an optimizer or whatever else a stage chooses by name. Its file defines its settings (a
:class:`~rewarm.config.section.Section`), what it does, and one line that joins them::

    @MIXERS.register("my_mixer", settings=MyMixerConfig)
    class MyMixer(Mixer): ...

The configuration's schema, its reference, the command line and the tests take the names and settings from here.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeVar

from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from rewarm.config.section import Section, ignored
from rewarm.errors import UserError, nearest

T = TypeVar("T")
SectionT = TypeVar("SectionT", bound=Section)


@dataclass(frozen=True, slots=True)
class Method(Generic[T]):
    """A registered method."""

    name: str
    settings: type[Section] | None
    """Its section of the configuration; None if it has no settings."""
    target: T
    """What the registering file decorated: a class or a function."""
    module: str
    """The module that registered it."""

    @property
    def summary(self) -> str:
        """One line for tables: the first sentence of its settings' docstring, else of its own."""
        text = (self.settings.__doc__ if self.settings is not None else None) or self.target.__doc__ or ""
        return re.split(r"(?<!\bal)\.(?:\s|$)", " ".join(text.split()))[0]

    @property
    def required(self) -> list[str]:
        """Settings without a default."""
        fields = {} if self.settings is None else self.settings.model_fields
        return [name for name, field in fields.items() if field.is_required()]


class Registry(Generic[T]):
    """The methods of one kind.

    Args:
        kind: what they are, in messages: ``"mixer"``.
        setting: where a stage names one: ``"mixture.mixer"``.
        package: whose modules define the built-in ones, or the one module that does; imported when the registry is
            first read.
    """

    def __init__(self, kind: str, setting: str, package: str) -> None:
        self.kind, self.setting = kind, setting
        self._package = package
        self._loaded = False
        self._methods: dict[str, Method[T]] = {}
        self._sections: dict[tuple[Method[Any], ...], type[Section]] = {}

    def register(self, name: str, *, settings: type[Section] | None = None) -> Callable[[T], T]:
        """Decorate a class or function as the method of a name.

        Args:
            name: as it is written in a configuration.
            settings: its section.

        Raises:
            ValueError: if another module has registered the name.
        """

        def add(target: T) -> T:
            module = str(getattr(target, "__module__", ""))
            known = self._methods.get(name)
            if known is not None and known.module != module:
                raise ValueError(f"{self.kind} {name!r} is registered by {known.module} and by {module}")
            self._methods[name] = Method(name, settings, target, module)
            return target

        return add

    def load(self) -> None:
        """Import the modules of the built-in methods, so that all of them are registered."""
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self._package)
        for module in sorted(info.name for info in pkgutil.iter_modules(getattr(package, "__path__", []))):
            importlib.import_module(f"{self._package}.{module}")

    def __getitem__(self, name: str) -> Method[T]:
        """The method of a name.

        Raises:
            UserError: if there is none; it names the nearest.
        """
        self.load()
        if name not in self._methods:
            guess = nearest(name, list(self))
            raise UserError(
                f"there is no {self.kind} {name!r} for {self.setting}: {', '.join(self)}",
                fix=f"did you mean {guess!r}?" if guess else "name one of them, or your own module in extensions",
            )
        return self._methods[name]

    def __contains__(self, name: object) -> bool:
        self.load()
        return name in self._methods

    def __iter__(self) -> Iterator[str]:
        self.load()
        return iter(sorted(self._methods))

    def __len__(self) -> int:
        self.load()
        return len(self._methods)

    def methods(self) -> list[Method[T]]:
        """All of them, by name."""
        return [self[name] for name in self]

    def choice(self, field: FieldInfo) -> tuple[Any, Any]:
        """Type and definition of a field that takes the registered names, and says what each of them is."""
        table = "; ".join(f"{method.name}: {method.summary}" for method in self.methods())
        return Literal[*self], Field(field.default, description=f"{field.description} {table}.")

    def section(
        self, base: type[SectionT], choice: str, more: Mapping[str, Registry[Any]] = MappingProxyType({})
    ) -> type[SectionT]:
        """A section whose ``choice`` takes the registered names, with one optional section for each method that has
        settings, under the method's name.

        Args:
            base: the section without the methods; its field ``choice`` has the default and the documentation.
            choice: the field that names the method.
            more: other fields of the section that take the names of another registry.
        """
        self._base, self._choice, self._more = base, choice, more
        fields: dict[str, Any] = {choice: self.choice(base.model_fields[choice])}
        for name, registry in more.items():
            fields[name] = registry.choice(base.model_fields[name])
        for method in self.methods():
            if method.settings is not None:
                empty = Field(None, description=f"Settings of {self.kind} {method.name}.")
                fields[method.name] = (method.settings | None, empty)
        name = base.__name__.replace("Base", "Config")
        made = create_model(name, __base__=base, __module__=base.__module__, __doc__=base.__doc__, **fields)
        self._sections[self._key()] = made
        return made

    @property
    def current(self) -> type[Section]:
        """The section with the methods that are registered now: the one made first, unless extensions added some."""
        if self._key() not in self._sections:
            self.section(self._base, self._choice, self._more)
        return self._sections[self._key()]

    def _key(self) -> tuple[Method[Any], ...]:
        """What a section depends on."""
        return tuple(method for registry in (self, *self._more.values()) for method in registry.methods())


def check_chosen(registry: Registry[Any], section: Section, choice: str) -> None:
    """Refuse the settings of a method that was not chosen, and a method without the settings that it needs.

    Args:
        registry: of the methods.
        section: made by :meth:`Registry.section`.
        choice: the field that names the method.

    Raises:
        ValueError: naming the setting.
    """
    place, name = registry.setting.rpartition(".")[0], getattr(section, choice)
    for method in registry.methods():
        given = method.settings is not None and getattr(section, method.name) is not None
        if given and method.name != name:
            raise ignored(f"{place}.{method.name}", f"{registry.setting}={name}")
        if not given and method.name == name and method.required:
            raise ValueError(f"{registry.setting}={name} needs {place}.{name}.{method.required[0]}")


def chosen_settings(registry: Registry[Any], section: Section, choice: str) -> Section | None:
    """The section of the chosen method, with its defaults where it is not given; None if it has no settings."""
    method = registry[getattr(section, choice)]
    if method.settings is None:
        return None
    given: Section | None = getattr(section, method.name)
    return given if given is not None else method.settings()


class SwitchRegistry(Registry[T]):
    """Methods that a stage switches on, any number of them, each by giving its section: ``hooks: {my_hook: {}}``.

    One without settings is part of every stage, and so must be built in.
    """

    def register(self, name: str, *, settings: type[Section] | None = None) -> Callable[[T], T]:
        """Decorate a class as the method of a name.

        Args:
            name: as it is written in a configuration.
            settings: its section, which may be empty.

        Raises:
            ValueError: if another module has registered the name, or it could not be switched on.
        """
        add = super().register(name, settings=settings)

        def checked(target: T) -> T:
            module = str(getattr(target, "__module__", ""))
            if settings is None and not module.startswith(f"{self._package}."):
                raise ValueError(
                    f"{self.kind} {name!r} has no settings, by which {self.setting}.{name} could switch it on: "
                    "register it with a section, which may be empty"
                )
            return add(target)

        return checked

    def switches(self, base: type[SectionT]) -> type[SectionT]:
        """A section with one optional section for each method that can be switched on; as it stands if there is none.

        Args:
            base: the section without the methods.
        """
        key = tuple(self.methods())
        if key not in self._sections:
            fields: dict[str, Any] = {}
            for method in self.methods():
                if method.settings is not None:
                    text = f"{method.summary}. Null leaves it out."
                    fields[method.name] = (method.settings | None, Field(None, description=text))
            made: dict[str, Any] = {"__base__": base, "__module__": base.__module__, "__doc__": base.__doc__}
            self._sections[key] = create_model(base.__name__, **made, **fields) if fields else base
        return typing.cast("type[SectionT]", self._sections[key])


FAMILIES: Registry[Any] = Registry("family", "model.family", "rewarm.model.families")
"""Subclasses of :class:`rewarm.model.families.base.Family`, by transformers' ``model_type``."""

MIXERS: Registry[Any] = Registry("mixer", "mixture.mixer", "rewarm.mixing.mixers")
"""Subclasses of :class:`rewarm.mixing.mixers.base.Mixer`."""

HOOKS: SwitchRegistry[Any] = SwitchRegistry("hook", "hooks", "rewarm.train.hooks")
"""Subclasses of :class:`rewarm.train.hooks.base.Hook`."""

OPTIMIZERS: Registry[Any] = Registry("optimizer", "optimizer.name", "rewarm.optimizers")
"""Subclasses of :class:`rewarm.optimizers.base.UpdateRule`."""

SCHEDULES: Registry[Any] = Registry("schedule", "schedule.kind", "rewarm.schedule.kinds")
"""Subclasses of :class:`rewarm.schedule.kinds.base.Schedule`."""

SHAPES: Registry[Any] = Registry("decay shape", "schedule.decay_shape", "rewarm.schedule.curves")
"""Functions of progress and the two ends, see :mod:`rewarm.schedule.curves`."""
