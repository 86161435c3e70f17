"""The ranges of a sweep: `FIELD=log(LOW,HIGH)` and others, parsed and checked against the config."""

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import itertools
import math
import re

from optuna import distributions

from llmjax.binding import parse_override
from llmjax.data.store.settings import collect_settings
from llmjax.errors import UserError, suggest
from llmjax.run.config import RunConfig

Resolve = Callable[[Sequence[tuple[str, str]]], RunConfig]  # further overrides -> the config of a trial
KINDS = ("log", "uniform", "int", "choice")
_DIGITS = 5  # significant digits of a number, so that an override is short; the trial uses these
_MAX_COMBINATIONS = 200  # of values of other ranges, with which a value is tried
_INNER = 0.381966  # of a range, for a value that is neither of its ends
# Fields that the sweep itself sets.
_RESERVED = ("train.stop_at", "eval.metric")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """The values of one config field.

    kind      log (numbers, uniform in their logarithm), uniform (numbers), int (integers) or choice
    low, high the ends, both included; step: of an int
    choices   of a choice, as overrides are written
    """

    field: str
    kind: str
    text: str
    low: float = 0.0
    high: float = 0.0
    step: int = 1
    choices: tuple[str, ...] = ()

    @property
    def distribution(self) -> distributions.BaseDistribution:
        """As Optuna has it."""
        if self.kind == "choice":
            return distributions.CategoricalDistribution(self.choices)
        if self.kind == "int":
            return distributions.IntDistribution(int(self.low), int(self.high), step=self.step)
        return distributions.FloatDistribution(self.low, self.high, log=self.kind == "log")

    def write(self, value: object) -> str:
        """A value as the text of an override."""
        return f"{value:.{_DIGITS}g}" if isinstance(value, float) else str(value)

    @property
    def grid(self) -> tuple[str | int, ...]:
        """All values. Raises UserError for a range of numbers, which has no grid."""
        if self.kind == "choice":
            return self.choices
        if self.kind == "int":
            return tuple(range(int(self.low), int(self.high) + 1, self.step))
        raise UserError(f"--over={self.text}: a grid needs values, not a range; write {self.field}=choice(A,B,C)")

    @property
    def examples(self) -> tuple[str, ...]:
        """The values that are checked: all choices, or the ends and a value between them."""
        if self.kind == "choice":
            return self.choices
        if self.kind == "int":
            return tuple(str(value) for value in dict.fromkeys((int(self.low), self.grid[-1])))
        inner = self.low + _INNER * (self.high - self.low)
        return tuple(self.write(value) for value in (self.low, inner, self.high))


def parse(texts: Sequence[str]) -> list[Range]:
    """The ranges of `--over`. Raises UserError for text that is none, and for a field that has two."""
    ranges = [_parse_one(text) for text in texts]
    fields = [each.field for each in ranges]
    for field in fields:
        if fields.count(field) > 1:
            raise UserError(f"--over: {field} has {fields.count(field)} ranges; give one")
        if field in _RESERVED:
            raise UserError(f"--over={field}: trials with different values cannot be compared; choose another field")
    return ranges


def _parse_one(text: str) -> Range:
    matched = re.fullmatch(r"\s*([\w.]+)\s*=\s*(\w+)\s*\((.*)\)\s*", text, re.DOTALL)
    example = "write FIELD=log(1e-4,1e-2), uniform(0,1), int(2,8) or choice(a,b)"
    if not matched:
        raise UserError(f"--over={text}: not a range; {example}")
    field, kind, inner = matched.groups()
    field = field.removeprefix("config.")
    if kind not in KINDS:
        raise UserError(f"--over={text}: unknown kind of range {kind!r}{suggest(kind, KINDS)}; {example}")
    values = _split(inner, text)
    if kind == "choice":
        if len(values) < 2 or len(set(values)) < len(values):
            raise UserError(f"--over={text}: give two or more different values, such as {field}=choice(a,b)")
        return Range(field=field, kind=kind, text=text, choices=tuple(values))
    if len(values) != 2 and not (kind == "int" and len(values) == 3):
        raise UserError(f"--over={text}: expected {kind}(LOW,HIGH{'[,STEP]' if kind == 'int' else ''})")
    numbers = [_parse_number(value, kind, text) for value in values]
    low, high, *step = numbers
    if not low < high:
        raise UserError(f"--over={text}: {values[0]} must be below {values[1]}")
    if kind == "log" and low <= 0:
        raise UserError(f"--over={text}: {values[0]} has no logarithm; give a low end above 0, or write uniform")
    if step and step[0] < 1:
        raise UserError(f"--over={text}: the step {values[2]} must be at least 1")
    return Range(field=field, kind=kind, text=text, low=low, high=high, step=int(step[0]) if step else 1)


def _parse_number(value: str, kind: str, text: str) -> float:
    with contextlib.suppress(ValueError):
        number = float(value)
        if math.isfinite(number) and (kind != "int" or number.is_integer()):
            return number
    raise UserError(f"--over={text}: {value!r} is not {'an integer' if kind == 'int' else 'a finite number'}")


def _split(inner: str, text: str) -> list[str]:
    """The values between commas that are in no brackets and no quotes. Quotes around a value are removed."""
    values, depth, quote = [""], 0, ""
    for character in inner:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if character == "," and depth == 0 and not quote:
            values.append("")
        else:
            values[-1] += character
    if depth or quote:
        raise UserError(f"--over={text}: a bracket or a quote is not closed")
    stripped = [_unquote(value.strip()) for value in values]
    if "" in stripped and stripped != [""]:
        raise UserError(f"--over={text}: a value between two commas is empty; remove a comma")
    return [value for value in stripped if value]


def _unquote(value: str) -> str:
    with contextlib.suppress(ValueError, SyntaxError):
        literal = ast.literal_eval(value)
        if isinstance(literal, str):
            return literal
    return value


def check(
    ranges: Sequence[Range],
    overrides: Sequence[tuple[str, str]],
    resolve: Resolve,
) -> None:
    """Raise UserError for a range whose field does not exist, or whose values the config does not take.

    overrides  of the command line
    resolve    further overrides -> the config of a trial; raises UserError for an invalid one
    """
    overridden = {field for field, _ in overrides}
    for each in ranges:
        if each.field in overridden:
            raise UserError(f"--config.{each.field} and --over={each.text} both set {each.field}: set only one of them")
        for value in each.examples:
            with _named(each):
                parse_override(RunConfig, each.field, value)
    store = collect_settings(
        resolve([(each.field, each.examples[0]) for each in ranges if each.field == "data.store"]).data
    )
    for each in ranges:
        for value in each.examples:
            with _named(each):
                config = _resolve_with(each, value, ranges, resolve)
            if each.field.startswith("data.") and collect_settings(config.data) != store:
                raise UserError(
                    f"--over={each.text}: {each.field} changes the token store, shared by all trials; prepare a store "
                    "for each value with `llmjax prepare`, and write data.store=choice(DIR,DIR)"
                )


@contextlib.contextmanager
def _named(each: Range) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"--over={each.text}: {error}") from error


def _resolve_with(each: Range, value: str, ranges: Sequence[Range], resolve: Resolve) -> RunConfig:
    """The config with a value of one range: alone, else with values of the other ranges that fit."""
    try:
        return resolve([(each.field, value)])
    except UserError as error:
        others = [other for other in ranges if other is not each]
        combinations = itertools.product(*(other.examples for other in others))
        for values in itertools.islice(combinations, _MAX_COMBINATIONS):
            with contextlib.suppress(UserError):
                fields = zip((other.field for other in others), values, strict=True)
                return resolve([(each.field, value), *fields])
        raise error


def write_overrides(ranges: Sequence[Range], params: Mapping[str, object]) -> list[tuple[str, str]]:
    """(FIELD, TEXT) of a trial's parameters, in the order of the ranges."""
    return [(each.field, each.write(params[each.field])) for each in ranges if each.field in params]
