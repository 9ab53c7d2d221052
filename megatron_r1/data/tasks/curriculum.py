"""Levels of difficulty: reasoning-gym's curricula as settings of a dataset."""

from collections.abc import Mapping
from typing import Any

from reasoning_gym.coaching.attributes import AttributeDefinition, RangeAttributeDefinition, ScalarAttributeDefinition
from reasoning_gym.factory import CURRICULA, create_curriculum

from megatron_r1.errors import ConfigError, nearest


class Curriculum:
    """The attributes of a dataset that have levels, each a list of values from easy to hard.

    Raises:
        ConfigError: the dataset has no curriculum.
    """

    def __init__(self, dataset: str) -> None:
        self._where = f"reasoning-gym dataset {dataset!r}"
        if dataset not in CURRICULA:
            raise ConfigError(f"{self._where} has no curriculum: choose its difficulty by `options`")
        self._dataset = dataset
        self._attributes: dict[str, AttributeDefinition] = dict(create_curriculum(dataset).attributes)
        self.highest = max(len(attribute.levels) for attribute in self._attributes.values()) - 1
        """The level from which on nothing gets harder."""

    def settings(self, level: int | None, levels: Mapping[str, int]) -> dict[str, Any]:
        """Settings of the dataset at a level.

        Args:
            level: of every attribute; one that has fewer levels is at its highest. None = `levels` alone.
            levels: of single attributes.

        Raises:
            ConfigError: no such attribute or level.
        """
        if level is not None and level > self.highest:
            raise ConfigError(f"{self._where} has the levels 0 to {self.highest}, not {level}")
        curriculum = create_curriculum(self._dataset)
        if level is not None:
            curriculum.set_global_level(level)
        for name, chosen in levels.items():
            if name not in self._attributes:
                known = ", ".join(self._attributes)
                raise ConfigError(
                    f"{self._where}: no attribute {name!r}{nearest(name, self._attributes)}; it has {known}"
                )
            top = len(self._attributes[name].levels) - 1
            if chosen > top:
                raise ConfigError(f"{self._where}: attribute {name!r} has the levels 0 to {top}, not {chosen}")
            curriculum.set_attr_level(name, chosen)
        generated = curriculum.generate_configuration()
        used = self._attributes if level is not None else levels
        return {key: getattr(generated, key) for name in used for key in _fields(self._attributes[name])}


def _fields(attribute: AttributeDefinition) -> tuple[str, ...]:
    """The settings of the dataset that an attribute stands for."""
    if isinstance(attribute, RangeAttributeDefinition):
        return attribute.lower_field_name, attribute.upper_field_name
    assert isinstance(attribute, ScalarAttributeDefinition)
    return (attribute.field_name,)
