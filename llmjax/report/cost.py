"""What a run cost: device-hours of all its starts, and by stated assumptions energy, CO2 and money."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from llmjax.parallel.device_facts import find_facts
from llmjax.report.files import RunFiles
from llmjax.report.markup import escape, missing_part, section, table

# Where the config does not say. PUE: from a machine without a data centre to the mean of the Uptime Institute's survey
# of 2023. Grid, g of CO2 equivalent per kWh: Norway and India in 2023 by Ember; the mean of the world was 481.
PUE = (1.0, 1.58)
GRID_INTENSITY = (30.0, 713.0)

Range = tuple[float, float]  # the low and the high end


@dataclasses.dataclass(frozen=True)
class DeviceTime:
    """The starts of a run on one kind of device.

    hours   device-hours
    watts   of one device; None where unknown
    """

    device: str
    starts: int
    hours: float
    watts: Range | None


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of training.

    kwh, co2_kg  energy, and CO2 equivalent in kg; None where the power of a device is unknown
    price        of a device-hour; 0: unknown
    unmeasured   starts that ended before they logged a step, whose time is not counted
    """

    devices: Sequence[DeviceTime]
    pue: Range
    grid_intensity: Range
    kwh: Range | None
    co2_kg: Range | None
    price: float
    currency: str
    unmeasured: int

    @property
    def hours(self) -> float:
        """Device-hours of all starts."""
        return sum(device.hours for device in self.devices)

    @property
    def money(self) -> float | None:
        """Price of all device-hours; None without a price."""
        return self.price * self.hours if self.price else None


def compute(run: RunFiles) -> Cost | None:
    """The cost of a run by its files; None where run.json does not record its starts."""
    starts = (run.run or {}).get("starts")
    if not starts:
        return None
    settings = (run.config or {}).get("report") or {}
    seconds = measure_seconds(starts, run.metrics)
    by_kind: dict[str, list[float]] = {}
    for start, value in zip(starts, seconds, strict=True):
        if value is not None:
            by_kind.setdefault(start["device"], []).append(value * count_devices(start) / 3600)
    devices = [DeviceTime(kind, len(hours), sum(hours), _find_watts(kind, settings)) for kind, hours in by_kind.items()]
    pue, grid = _read_range(settings.get("pue"), PUE), _read_range(settings.get("grid_intensity"), GRID_INTENSITY)
    kwh = None
    known = [(device.hours, device.watts) for device in devices if device.watts is not None]
    if known and len(known) == len(devices):
        low, high = (sum(hours * watts[end] for hours, watts in known) * pue[end] / 1000 for end in (0, 1))
        kwh = (low, high)
    return Cost(
        devices=devices,
        pue=pue,
        grid_intensity=grid,
        kwh=kwh,
        co2_kg=None if kwh is None else (kwh[0] * grid[0] / 1000, kwh[1] * grid[1] / 1000),
        price=settings.get("price_per_device_hour") or 0.0,
        currency=settings.get("currency", ""),
        unmeasured=seconds.count(None),
    )


def measure_seconds(starts: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Seconds from set-up to end of each start in run.json; None where it logged no step and recorded no end."""
    last = metrics[-1].get("time", 0.0) if metrics else 0.0
    ends = [None] * (len(starts) - 1) + [last]  # the next start has recorded the end of the one before it
    return [
        start.get("seconds", end - start["time"] if end is not None and end > start["time"] else None)
        for start, end in zip(starts, ends, strict=True)
    ]


def count_devices(start: Mapping[str, Any]) -> int:
    """Devices of a start. A process on CPUs is one, however many it emulates."""
    return start["processes"] if start["device"] == "cpu" else start["num_devices"]


def to_json(cost: Cost | None) -> dict[str, Any] | None:
    """The cost for report.json; None where it is unknown."""
    return None if cost is None else {"device_hours": cost.hours, **dataclasses.asdict(cost), "money": cost.money}


def render(run: RunFiles) -> str:
    """The part of the report about costs: numbers, their formulas and assumptions."""
    cost = compute(run)
    if cost is None:
        text = "run.json does not record when the run started and ended."
        return section("Cost", missing_part(text, f"llmjax train --workdir={run.workdir}"))
    head = ("Device", "starts", "device-hours", "power of a device, W")
    rows = [
        (device.device, device.starts, format_amount(device.hours), format_range(device.watts) or "unknown")
        for device in cost.devices
    ]
    amounts = [(name[:1].upper() + name[1:], formula, value) for name, value, formula in list_amounts(cost)]
    lines = "".join(f"<li>{escape(line)}</li>" for line in list_assumptions(cost))
    body = (
        f"{table(('Amount', 'formula', 'value'), amounts, texts=2)}{table(head, rows)}"
        f"<ul class='assumptions note'>{lines}</ul>"
    )
    note = "Of training alone: without the training of an imported model, curation and `llmjax eval`."
    return section("Cost", body, note=note)


def list_amounts(cost: Cost) -> list[tuple[str, str, str]]:
    """(name, value, formula) of what a run took; what is unknown says so, and money without a price is left out."""
    amounts = [("device-hours", format_amount(cost.hours), "device-hours = sum over starts of devices x hours")]
    unknown = f"unknown: no power of {', '.join(device.device for device in cost.devices if device.watts is None)}"
    energy, co2 = format_range(cost.kwh), format_range(cost.co2_kg)
    amounts.append(("energy, kWh", energy or unknown, "kWh = device-hours x W / 1,000 x PUE"))
    amounts.append(("CO2 equivalent, kg", co2 or "unknown, as the energy is", "kg = kWh x grams per kWh / 1,000"))
    if cost.money is not None:
        name = f"price, {cost.currency}" if cost.currency else "price"
        amounts.append((name, format_amount(cost.money), "price = device-hours x price of one"))
    return amounts


def list_assumptions(cost: Cost) -> list[str]:
    """What the formulas assume, as sentences."""
    lines = []
    if any(device.device == "cpu" for device in cost.devices):
        lines.append("A process on CPUs counts as one device, of a laptop (15 W) or a server's socket (350 W).")
    if cost.unmeasured:
        lines.append(f"Not counted: {describe_unmeasured(cost)}.")
    if any(device.watts is None for device in cost.devices):
        lines.append("To get the energy, set report.device_watts=(low, high).")
    if any(device.device != "cpu" and device.watts for device in cost.devices):
        lines.append(
            "Power: from half to all of a GPU's maximum by its data sheet, or from the least to the most that Google "
            "measured of a TPU v4, unless report.device_watts is set. Hosts of accelerators, network and storage are "
            "not counted."
        )
    lines.append(_describe("PUE", cost.pue, PUE, "report.pue", "no data centre, to the mean of a survey in 2023"))
    names = "Norway to India in 2023"
    lines.append(_describe("Grams per kWh", cost.grid_intensity, GRID_INTENSITY, "report.grid_intensity", names))
    if cost.money is None:
        lines.append("Money: set report.price_per_device_hour.")
    else:
        lines.append(
            f"Price of a device-hour: {cost.price:g} {cost.currency}, by report.price_per_device_hour.".strip()
        )
    return lines


def describe_unmeasured(cost: Cost) -> str:
    """Which starts `hours` leaves out."""
    starts = "1 start" if cost.unmeasured == 1 else f"{cost.unmeasured} starts"
    return f"{starts} that ended before the first line of metrics.jsonl"


def format_amount(value: float) -> str:
    """Three significant digits, and all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def format_range(ends: Range | None) -> str:
    """`low to high`, or one number where they are the same; "" for None."""
    if ends is None:
        return ""
    low, high = map(format_amount, ends)
    return low if low == high else f"{low} to {high}"


def _find_watts(kind: str, settings: Mapping[str, Any]) -> Range | None:
    if watts := settings.get("device_watts"):
        return watts[0], watts[1]
    facts = find_facts(kind)
    return None if facts is None else facts.watts


def _read_range(value: float | None, default: Range) -> Range:
    return (value, value) if value else default


def _describe(name: str, ends: Range, default: Range, field: str, meaning: str) -> str:
    if ends == default:
        return f"{name}: {format_range(ends)} ({meaning}), since {field} is not set."
    return f"{name}: {format_range(ends)}, by {field}."
