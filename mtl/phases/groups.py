"""A phase's parameter groups, with peak learning rate and weight decay, checked against its optimizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mtl.config import SettingError, mistake_of
from mtl.config.phase import WrittenPhase
from mtl.freeze import FreezePlan, trainable_parameters
from mtl.optim.balance.balance import Balance
from mtl.optim.optimizers import (
    UncoveredError,
    build_optimizer,
    by_pattern,
    group_parameters,
    is_decayed,
    layer_factors,
)
from mtl.patterns import PatternError, select
from mtl.patterns.module_tree import join
from mtl.phases.freeze_rules import PhaseResolver, ResolveContext


@dataclass(frozen=True)
class Groups:
    """A phase's parameter groups.

    Attributes:
        groups: As an optimizer takes them, with the peak rate and the decay of each.
        trains_trunk: Whether anything of the trunk trains.
        used: Patterns of the tables `lr` and `weight_decay` whose number some parameter has, by key.
        borrows_lr: Whether the balancing method's weights have the run's rate, since the phase's table has none.
    """

    groups: list[dict[str, Any]]
    trains_trunk: bool
    used: Mapping[str, Collection[str]]
    borrows_lr: bool


class GroupResolver(PhaseResolver):
    """Works out the groups of one written phase; `resolve` is the way in."""

    def __init__(self, context: ResolveContext, written: WrittenPhase) -> None:
        super().__init__(context, written)
        self.optim = context.config.optim_of(written.config)
        self.every_name = [name for name, _ in context.root.named_parameters(remove_duplicate=False)]

    def resolve(self, plan: FreezePlan | None, balance: Balance) -> Groups:
        """Resolves the groups; without a plan, their settings are only checked.

        Raises:
            ConfigError: A table is wrong, or the optimizer does not take these groups.
        """
        if self.written.config.evaluate_only:
            return Groups([], False, {}, False)
        steps_itself = {id(parameter) for group in balance.param_groups for parameter in group["params"]}
        trainable = {} if plan is None else trainable_parameters(self.root, plan)
        parameters = {n: p for n, p in trainable.items() if id(p) not in steps_itself}
        excluded = self._excluded_from_decay()
        decayed = [name for name, parameter in parameters.items() if is_decayed(name, parameter, excluded)]
        lr_of = self._by_pattern("lr", list(parameters))
        decay_of = dict.fromkeys(parameters, 0.0) | self._by_pattern("weight_decay", decayed)
        used = {key: self._used(key, numbers) for key, numbers in (("lr", lr_of), ("weight_decay", decay_of))}
        lr_of = {name: lr * self.optim.lr_scale for name, lr in lr_of.items()}
        if self.optim.layer_decay < 1:
            factors = layer_factors(self.optim.layer_decay, self.tree.depths("trunk"))
            lr_of = {name: lr * factors.get(name, 1.0) for name, lr in lr_of.items()}
        # The balancing method's apart: the model may be sharded over ranks, and torch steps no list of both.
        own = {name: p for name, p in parameters.items() if name.startswith("balance.")}
        model = {name: p for name, p in parameters.items() if name not in own}
        groups = group_parameters(model, lr_of, decay_of) + group_parameters(own, lr_of, decay_of)
        try:
            if groups:
                build_optimizer(self.optim.optimizer, groups)
        except SettingError as error:
            raise mistake_of(self.config, error, self.config.path_of(self.written, "optimizer")[:-1]) from error
        trains_trunk = any(name.startswith("trunk.") for name in model)
        table = self._table("lr")
        borrows_lr = isinstance(table, dict) and not own.keys() <= self._decided(table).keys()
        return Groups(groups, trains_trunk, used, borrows_lr)

    def _table(self, key: str) -> float | dict[str, float]:
        value: float | dict[str, float] = getattr(self.optim, key)
        if key == "lr" and isinstance(value, dict) and not list(self.root.get_submodule("balance").parameters()):
            # A rate for the balancing method's weights may stay when the method is changed for one without any.
            return {pattern: rate for pattern, rate in value.items() if pattern.split(".")[0] != "balance"}
        return value

    def _by_pattern(self, key: str, names: list[str]) -> dict[str, float]:
        value, default = self._table(key), self.config.optim.lr
        otherwise = {}
        if isinstance(value, dict) and key == "lr" and isinstance(default, float):
            otherwise = {name: default for name in names if name.startswith("balance.")}
        try:
            return by_pattern(value, names, self.every_name, self.tree, otherwise)
        except PatternError as error:
            pattern = list(value)[error.index] if isinstance(value, dict) else ""
            raise self.mistake_about(key, str(error), pattern) from error
        except UncoveredError as error:
            raise self.mistake_about(key, str(error)) from error

    def _used(self, key: str, numbers: Mapping[str, float]) -> set[str]:
        """The patterns of a table whose number some parameter has."""
        table = self._table(key)
        if not isinstance(table, dict):
            return set()
        decided = self._decided(table)
        return {decided[name] for name, number in numbers.items() if name in decided and table[decided[name]] == number}

    def _decided(self, table: Mapping[str, float]) -> dict[str, str]:
        """The pattern that decides the number of each parameter for which one does."""
        patterns = list(table)
        places = select(patterns, self.every_name, self.tree).decided_by
        return {name: patterns[place] for name, place in places.items()}

    def _excluded_from_decay(self) -> list[str]:
        """Parameters that the trunk itself lists as not to be decayed, such as position embeddings."""
        method: Any = getattr(self.root.get_submodule("trunk"), "no_weight_decay", None)
        return [] if method is None else [join("trunk", name) for name in method()]
