"""CLDR as text: pages of names, dates and quantities in every language that it describes well.

A page lists what things are called, the English name beside the native one; or dates; or units in
their plural forms. CLDR's data is Babel's own copy (Unicode licence), read through Babel.
"""

import functools
import pickle
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, timedelta
from typing import Any

from babel import Locale, dates, localedata

from herdling.errors import ConfigError

_LINES = 60
"""Most lines of a page."""
_FEWEST_TERRITORIES = 50
"""A language that names fewer territories itself is taken to be only sketched in CLDR."""
_DAYS = tuple(date(2001, 1, 1) + timedelta(days=97 * i) for i in range(_LINES))
_COUNTS = (1, 2, 3, 5, 21, 0, 100)  # between them they ask for every plural form there is
NAMES = ("territories", "languages", "scripts", "currency_names")


def pages() -> Iterator[tuple[str, str]]:
    """Every page as (name, text); names are such as 'multilingual/de/territories/0'."""
    english = own_data("en")
    for language in languages():
        data = own_data(language)
        locale = Locale.parse(language)
        title = f"{locale.get_display_name()} ({locale.get_display_name('en')})"
        for section, lines in _sections(locale, data, english).items():
            for start in range(0, len(lines), _LINES):
                text = "\n".join([title, *lines[start : start + _LINES]]) + "\n"
                yield f"multilingual/{language}/{section}/{start // _LINES}", text


def languages() -> list[str]:
    """Identifiers of the languages (and scripts of languages) with names of their own."""
    found = []
    for name in sorted(localedata.locale_identifiers()):
        # A part in capitals or digits is a territory: 'de_AT' differs from 'de' in a few words.
        parts = name.split("_")[1:]
        if all(part.istitle() for part in parts):
            territories = own_data(name).get("territories", {})
            if len(territories) >= _FEWEST_TERRITORIES:
                found.append(name)
    return found


def check_languages(codes: Sequence[str]) -> None:
    """Raise ConfigError for a code that CLDR does not have."""
    for code in codes:
        if not localedata.exists(code):
            raise ConfigError(f"language {code!r} is unknown to CLDR; use codes such as de")


@functools.lru_cache(maxsize=64)
def own_data(language: str) -> Mapping[str, Any]:
    """What CLDR says of a language itself, without what it inherits.

    Read past babel's cache: `localedata.load(..., merge_inherited=False)` would leave there what every
    later user of the locale then gets, without its calendar's names.
    """
    with open(localedata.resolve_locale_filename(language), "rb") as file:
        return pickle.load(file)


def _sections(
    locale: Locale, data: Mapping[str, Any], english: Mapping[str, Any]
) -> dict[str, list[str]]:
    found = {name: _pairs(data.get(name, {}), english[name]) for name in NAMES}
    cities = _cities(data)
    found["cities"] = _pairs(cities, {zone: _english_city(zone, english) for zone in cities})
    if _has_calendar(data):
        found["dates"] = [dates.format_date(day, "full", locale) for day in _DAYS]
    found["units"] = _units(locale, data)
    return found


def _pairs(native: Mapping[str, str], english: Mapping[str, str]) -> list[str]:
    """'Germany: Deutschland', sorted by code; the name alone where English has the same or none."""
    lines = []
    for code in sorted(native):
        name, other = native[code], english.get(code)
        lines.append(name if other is None or other == name else f"{other}: {name}")
    return lines


def _has_calendar(data: Mapping[str, Any]) -> bool:
    """Whether Babel can write a full date; for languages without one it raises KeyError."""
    months = data.get("months", {}).get("format", {})
    return "full" in data.get("date_formats", {}) and {"abbreviated", "wide"} <= months.keys()


def _cities(data: Mapping[str, Any]) -> dict[str, str]:
    zones = data.get("time_zones", {})
    return {zone: names["city"] for zone, names in zones.items() if "city" in names}


def _english_city(zone: str, english: Mapping[str, Any]) -> str:
    # CLDR gives an English name only where it is not the last part of the zone's identifier.
    given = english["time_zones"].get(zone, {}).get("city")
    return given or zone.rpartition("/")[2].replace("_", " ")


def _units(locale: Locale, data: Mapping[str, Any]) -> list[str]:
    """'1 Stunde, 2 Stunden', a unit a line with each of its plural forms once."""
    lines = []
    for _, widths in sorted(data.get("unit_patterns", {}).items()):
        forms = widths.get("long", {}) if isinstance(widths, dict) else {}
        if isinstance(forms, dict) and "{0}" in str(forms.get("other")):
            words: dict[str, str] = {}
            for n in _COUNTS:
                form = str(forms.get(locale.plural_form(n), forms["other"]))
                words.setdefault(form, form.replace("{0}", str(n)))
            lines.append(", ".join(words.values()))
    return lines
