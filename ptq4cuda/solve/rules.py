"""What a choice of QuantConfig is that others may add to: a class with a name."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self


class Rule(ABC):
    """A way to do something, chosen by its name.

    The direct subclasses are kinds of rules. Of these, a subclass with a `name` is a rule: from then on QuantConfig
    takes that name.

    Attributes:
        name: by which it is chosen.
    """

    name: ClassVar[str]
    _rules: ClassVar[dict[str, Any]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if Rule in cls.__bases__:
            cls._rules = {}
        elif "name" in vars(cls):
            cls._rules[cls.name] = cls()

    @classmethod
    def named(cls, name: str) -> Self:
        """Return the rule of this kind with a name."""
        rule: Self = cls._rules[name]
        return rule

    @classmethod
    def all(cls) -> tuple[Self, ...]:
        """Return all rules of this kind, in the order in which they were defined."""
        return tuple(cls._rules.values())
